"""Scans of the sources of a conversion, whatever their layout."""

import dataclasses
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet

from s2s_jax.data.conversion import times
from s2s_jax.data.conversion.description import Description
from s2s_jax.data.conversion.reading import (
    grouped,
    merging,
    movielens,
    sources,
    sql,
    text_files,
)
from s2s_jax.data.conversion.reading.database import Database, reason
from s2s_jax.data.conversion.reading.text_files import CsvFormat, default_delimiter, read_header
from s2s_jax.errors import UserError


def scan_file(
    description: Description, path: Path, database: Database, directory: Path
) -> sql.Scan:
    """The scan of a file, with columns for the values in the names of its directories.

    Args:
      description: what is read.
      path: the file.
      database: the database that will read it.
      directory: a directory for a copy, if the database cannot read the file itself.

    Raises:
      UserError: the file cannot be read, lacks a column, or has it in a type that cannot be used.
    """
    names = description.selection.columns
    if description.layout == "parquet":
        scan = _parquet(path, database)
    elif description.layout == "orc":
        copy = merging.as_parquet(path, names, directory)
        scan = dataclasses.replace(_parquet(copy, database), source=str(path))
    elif description.layout == "jsonl":
        scan = sql.scan_json(path, names, text_files.is_array(path))
    else:
        scan = _csv(description, path, directory)
    scan = sql.with_partitions(scan, sources.partition_values(path))
    return of_events(description, scan, database)


def of_events(description: Description, scan: sql.Scan, database: Database) -> sql.Scan:
    """The scan with one row per event.

    Raises:
      UserError: a column is missing, or has a type that cannot be used.
    """
    selection = description.selection
    _check_columns(description, scan)
    scan = grouped.unrolled(scan, selection, description.grouped, database)
    for column, flag in selection.columns.items():
        found = scan.columns[column].type
        if not sql.supported(found, lists=flag == "--features"):
            raise UserError(
                f"{scan.source}: column {column} ({flag}): expected integers, texts or times, "
                f"found {found}"
            )
    return scan


def _parquet(path: Path, database: Database) -> sql.Scan:
    scan = sql.scan_parquet(path)
    found = database.run(f"DESCRIBE SELECT * FROM {scan}", str(path))
    try:
        # From the file itself: DuckDB renames columns whose names differ only in case.
        names = pyarrow.parquet.read_schema(path).names
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: expected a Parquet file ({reason(error)})") from error
    assert len(names) == len(found)
    pairs = zip(names, found, strict=True)
    columns = {name: sql.Column(sql.name(row[0]), row[1]) for name, row in pairs}
    return sql.Scan(str(path), scan, columns, sql.repeated(names))


def _csv(description: Description, path: Path, directory: Path) -> sql.Scan:
    flags = description.csv
    if description.layout == "movielens":
        form = movielens.ratings_format(path)
    else:
        delimiter = default_delimiter(path)
        if flags.delimiter is not None:
            delimiter = flags.delimiter.replace("\\t", "\t")
        form = CsvFormat(delimiter, flags.quote, flags.columns or None, flags.escape)
    content, new_line = text_files.as_utf8(path, flags.encoding, directory)
    form = dataclasses.replace(form, new_line=new_line)
    return sql.scan_csv(path, content, form, form.columns or read_header(content, form))


def _check_columns(description: Description, scan: sql.Scan) -> None:
    for column, flag in description.selection.columns.items():
        if column not in scan.columns:
            remedy = ""
            if flag == "--time_column":
                remedy = (
                    f"; if the order of lines is the order of events: "
                    f"--time_column {times.NO_COLUMN}"
                )
            elif len(scan.columns) == 1 and any(
                sign in next(iter(scan.columns)) for sign in ",;|\t"
            ):
                remedy = "; give the delimiter with --delimiter"
            elif any(known.isdigit() for known in scan.columns):
                remedy = "; if the first line is an event, give names of columns with --columns"
            raise UserError(
                f"{scan.source}: no column {column} ({flag}); it has "
                f"{', '.join(scan.columns) or 'no columns'}{remedy}"
            )
        if column in scan.twice:
            raise UserError(
                f"{scan.source}: {column} ({flag}) is the name of several columns; rename them"
            )
