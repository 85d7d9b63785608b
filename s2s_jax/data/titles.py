"""Titles of items, for people who look at recommendations: CSV, Parquet, or MovieLens' movies.dat."""

import csv
import io
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet

from s2s_jax.errors import UserError

_EXPECTED = "expected an item's id and its title in the first two columns"


def read_titles(path: Path) -> dict[str, str]:
    """The title of each item, under its id as text.

    What is in further columns does not matter, nor whether the first line of a CSV file holds names of
    columns: no item has such an id. Of several titles of an item, the first counts.

    Args:
      path: by its ending `.parquet`, MovieLens' `.dat` (`id::title::genres`), `.tsv` or else CSV.

    Raises:
      UserError: it cannot be read, or a line has less than two columns.
    """
    try:
        pairs = _of_parquet(path) if path.suffix == ".parquet" else _of_text(path)
        titles: dict[str, str] = {}
        for item, title in pairs:
            titles.setdefault(item, title)
    except (pa.ArrowException, OSError, ValueError, csv.Error) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"--titles: {path} cannot be read ({reason}); give a CSV or Parquet file of two columns, "
            f"or MovieLens' movies.dat"
        ) from error
    return titles


def _of_parquet(path: Path) -> Iterator[tuple[str, str]]:
    with pa.OSFile(str(path)) as source:
        table = pyarrow.parquet.read_table(source)
    if table.num_columns < 2:
        raise UserError(f"--titles: {path}: {_EXPECTED}, found {table.num_columns} columns")
    for item, title in zip(table[0].to_pylist(), table[1].to_pylist(), strict=True):
        if item is not None and title is not None:
            yield str(item), str(title)


def _of_text(path: Path) -> Iterator[tuple[str, str]]:
    raw = path.read_bytes()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        if path.suffix != ".dat":
            raise
        # MovieLens-1M is in Latin-1, 10M and later are in UTF-8.
        text = raw.decode("latin-1")
    if path.suffix == ".dat":
        rows = enumerate((line.split("::") for line in text.splitlines()), 1)
    else:
        reader = csv.reader(io.StringIO(text), delimiter="\t" if path.suffix == ".tsv" else ",")
        rows = ((reader.line_num, row) for row in reader)
    for number, row in rows:
        if row in ([], [""]):
            continue
        if len(row) < 2:
            raise UserError(f"--titles: {path}: line {number}: {_EXPECTED}, found {row[0][:80]!r}")
        yield row[0].strip(), row[1].strip()
