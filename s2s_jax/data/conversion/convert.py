"""Converts event logs to logs for training: `s2s convert FILE_OR_DIR… --output DIR`.

Sources are CSV, Parquet, JSON or MovieLens files, or tables, with one event per row or lists of events.
The resulting ORC log has one row per user: `user_id` and, for `timestamp` and each feature, a list over
the user's events, oldest first. Logs that are already ORC are rewritten with the same columns and rows,
in stripes of a good size for training.
"""

import contextlib
import dataclasses
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from s2s_jax.config import refuse_addresses, refuse_addresses_in
from s2s_jax.data.conversion import times
from s2s_jax.data.conversion.description import CsvFlags, Description
from s2s_jax.data.conversion.outcome import Converted, counted
from s2s_jax.data.conversion.progress import bar
from s2s_jax.data.conversion.reading import merging, movielens, sources
from s2s_jax.data.conversion.reading.fetching import local_copies
from s2s_jax.data.conversion.rewriting import rewrite
from s2s_jax.data.conversion.selection import Selection, parse
from s2s_jax.data.conversion.settings import Settings, check_encoding, check_flags, check_numbers
from s2s_jax.data.logs import orc_writer
from s2s_jax.data.logs.log_directory import SORTING
from s2s_jax.errors import UserError
from s2s_serve.storage.address import is_address

if TYPE_CHECKING:
    from s2s_jax.data.conversion.duckdb_engine import DuckDBEngine
    from s2s_jax.data.conversion.spark.engine import SparkEngine

_ONE_EVENT = (
    "warning: every user has one event, with several ids; if these ids are the user's events in order, "
    "give --grouped"
)


def convert(settings: Settings) -> Converted:
    """Converts event logs, and writes the resulting log.

    Columns of integers, and of texts that are all int64 numbers, are written as int64; others as
    strings. Rows are sorted by user id.

    Raises:
      UserError: a setting is impossible, a source cannot be read, or the directory cannot be written
        or contains other ORC files. No file is then created or replaced.
      MachineError: a store does not answer, or does not allow something.
    """
    _refuse_addresses(settings)
    check_numbers(settings)
    with local_copies(settings.paths, settings.output, settings.temp_dir) as copies:
        there = dataclasses.replace(settings, paths=copies.paths)
        done = _convert(there, copies.path_of(settings.output))
    named = copies.with_addresses
    return dataclasses.replace(
        done,
        skipped=tuple(map(named, done.skipped)),
        notes=tuple(map(named, (*copies.notes, *done.notes))),
    )


def _convert(settings: Settings, out: Path | None) -> Converted:
    """Converts sources of this machine; of those in a directory, files below `out` are left out."""
    found = _find(settings, out)
    check_encoding(settings.encoding)
    times.check_formats(settings.time_format)
    layout = found.layout
    if settings.merge and layout != "orc":
        raise UserError(f"--merge: has no effect for sources of format {layout}; leave it out")
    # Merged logs are read the same way as events.
    check_flags(settings, "parquet" if settings.merge else layout)
    if layout == "orc" and not settings.merge:
        return dataclasses.replace(rewrite(settings, found.files), notes=tuple(found.notes))
    notes = found.notes
    if settings.merge:
        found = found._replace(files=merging.with_rows(found.files))
        settings, left_out = _columns_found(settings, found.files[0])
        notes = [*notes, *left_out]
    done = _sort(settings, found, _description(settings, found))
    return dataclasses.replace(done, notes=(*notes, *done.notes))


def _refuse_addresses(settings: Settings) -> None:
    addresses = [path for path in settings.paths if is_address(path)]
    if addresses and settings.engine == "spark":
        raise UserError(
            f"FILE_OR_DIR …: expected a path that all executors have, found the address "
            f"{addresses[0]}; let Spark read it, with --format table and 'parquet.`{addresses[0]}`'"
        )
    refuse_addresses("FILE_OR_DIR …", settings.paths, of_stores=False)
    refuse_addresses_in(dataclasses.replace(settings, paths=()), "--")


def _find(settings: Settings, out: Path | None) -> sources.Sources:
    """The files or tables to convert."""
    chosen = None if settings.format == "auto" else settings.format
    if chosen == "table" and settings.engine != "spark":
        raise UserError("--format table: only Spark reads tables; give --engine spark, too")
    if chosen == "table":
        return sources.tables(settings.paths)
    return sources.find(settings.paths, chosen, out)


def _description(settings: Settings, found: sources.Sources) -> Description:
    """What is converted, as both engines carry it out."""
    if found.layout == "movielens":
        selection = movielens.selection(found.files[0])
    else:
        selection = Selection(
            user=settings.user_column,
            time=None if settings.time_column == times.NO_COLUMN else settings.time_column,
            features=parse(settings.features, settings.bags, settings.bag_separator),
            missing=settings.missing,
            time_formats=settings.time_format,
        )
    csv = CsvFlags(
        columns=settings.columns,
        delimiter=settings.delimiter,
        quote=settings.quote,
        escape=settings.escape,
        encoding=settings.encoding,
    )
    return Description(
        layout=found.layout,
        selection=selection,
        csv=csv,
        grouped=settings.grouped,
        skip=settings.on_error == "skip",
        min_events=settings.min_events,
    )


def _columns_found(settings: Settings, path: Path) -> tuple[Settings, list[str]]:
    """The settings with the columns of an ORC log, and a sentence about columns that are left out."""
    found = merging.columns_of(path, settings.user_column, settings.time_column)
    settings = dataclasses.replace(settings, user_column=found.user, time_column=found.time)
    if settings.features != Settings.features:
        return settings, []
    settings = dataclasses.replace(settings, features=found.features)
    names = ", ".join(found.left_out)
    return settings, [
        f"left out columns that do not have one entry per event: {names}"
    ] if names else []


def _sort(settings: Settings, found: sources.Sources, description: Description) -> Converted:
    """Sorts the events of the sources by user and time, and writes them as rows."""
    with (
        orc_writer.open_log(
            settings.output, settings.overwrite, settings.events_per_file, settings.temp_dir
        ) as log,
        _temp_dir(settings) as directory,
        _engine(settings, found, description, directory) as engine,
    ):
        with bar("reading", engine.progress):
            checked = engine.load()
        log.positions_per_stripe = orc_writer.stripe_positions(checked.events)
        with bar("sorting and writing", engine.progress):
            for table in engine.rows():
                log.write(table)
        if log.rows == 0:
            raise UserError(f"--min_events: no user has {settings.min_events} events; lower it")
    tally = engine.tally
    bags = {name: most for name, most in tally.largest_bags.items() if most > 1}
    may_be_lists = bool(bags) and found.layout in ("parquet", "jsonl", "table")
    selection = description.selection
    left_out = (
        counted(engine.bad_lines, "unreadable line"),
        counted(checked.no_user, "event", f"without {selection.user}"),
        counted(checked.no_time, "event", f"without {selection.time}"),
        counted(tally.short_users, "user", f"with fewer than {settings.min_events} events"),
        counted(tally.short_events, "event", "of these users"),
    )
    return Converted(
        paths=log.paths,
        rows=log.rows,
        events=log.positions,
        skipped=tuple(words for words in left_out if words[0] != "0"),
        bags=bags,
        notes=(_ONE_EVENT,) if may_be_lists and log.rows == log.positions else (),
    )


def _engine(
    settings: Settings, found: sources.Sources, description: Description, directory: Path
) -> "DuckDBEngine | SparkEngine":
    """The engine that `--engine` names; both read files with DuckDB."""
    try:
        from s2s_jax.data.conversion.duckdb_engine import DuckDBEngine
    except ModuleNotFoundError as error:
        if error.name != "duckdb":
            raise
        raise UserError(
            "DuckDB, which sorts events, is not installed; pip install 's2s-jax[convert]'"
        ) from error
    if settings.engine == "duckdb":
        return DuckDBEngine(description, found.files, directory, settings.memory_limit)
    try:
        from s2s_jax.data.conversion.spark.engine import SparkEngine
    except ModuleNotFoundError as error:
        if error.name not in ("pyspark", "pandas", "py4j"):
            raise
        raise UserError(
            "PySpark, which --engine spark needs, is not installed; pip install 's2s-jax[spark]'"
        ) from error
    names = found.tables or [str(path) for path in found.files]
    return SparkEngine(description, names, directory, settings.memory_limit, settings.temp_dir)


@contextlib.contextmanager
def _temp_dir(settings: Settings) -> Iterator[Path]:
    of_output = (
        settings.output if isinstance(settings.output, Path) else Path(tempfile.gettempdir())
    )
    parent = settings.temp_dir or of_output
    with contextlib.suppress(OSError):
        for left in parent.glob(f"{SORTING}*"):
            print(
                f"warning: {left} belongs to a conversion that is running or was killed; if it was "
                f"killed, remove it",
                file=sys.stderr,
            )
    try:
        made = tempfile.TemporaryDirectory(prefix=SORTING, dir=parent)
    except OSError as error:
        raise UserError(f"--temp_dir: {parent} cannot be written ({error})") from error
    with made as name:
        yield Path(name)
