"""Gives each user one row: `python -m s2s_jax.data.merge FILE_OR_DIR… --out DIR [--user user_id]`.

For logs that have several rows of a user, such as a row a user and day, or rows that are not in the
order of time. Rows are taken apart into events, which `s2s_jax.data.convert` sorts by user and time and
puts together again.

Shapes: N rows of a stripe, P events.
"""

import contextlib
import dataclasses
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tyro

from s2s_jax.config import refuse_addresses_in
from s2s_jax.data import files, orc, user_rows
from s2s_jax.data.columns import is_list, list_lengths
from s2s_jax.data.convert import Converted, convert
from s2s_jax.data.convert import Settings as ConvertSettings
from s2s_jax.data.time_facts import time_columns
from s2s_jax.errors import EXIT_DONE, UserError, run_door


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What to merge, and into what."""

    paths: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="FILE_OR_DIR …")]
    """ORC files, and directories that are searched as training does"""
    out: Path
    """Directory for part-0.orc, part-1.orc …; made where it does not exist"""
    user: str | None = None
    """Column of users, written as user_id; by default as names tell"""
    time: str | None = None
    """Column of the times of events, written as timestamp; by default as names and types tell"""
    overwrite: bool = False
    """Replace the part-N.orc files that are in the directory, when all is merged"""
    memory_limit: str | None = None
    """Memory for sorting, such as 4GB; by default 80% of all"""


def merge(settings: Settings) -> tuple[Converted, list[str]]:
    """Writes the merged log; returns what came of it, and the columns that were left out.

    Raises:
      UserError: no column names users or times, a file cannot be read or has other columns than the
        first, lists of a row disagree in length, or see `convert`.
    """
    refuse_addresses_in(settings, "--", positional=("paths",))
    paths = [orc.read_footer(path) for path in files.find(settings.paths).files]
    paths = [file for file in paths if file.rows]
    if not paths:
        raise UserError(f"{settings.paths[0]}: expected rows, found none; name other files")
    schema = paths[0].schema
    user, time = _user(schema, settings.user), _time(schema, settings.time)
    lists = [field.name for field in schema if is_list(field.type)]
    left_out = [name for name in schema.names if name not in (user, *lists)]
    try:
        settings.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out: {settings.out} cannot be written ({error})") from error
    with tempfile.TemporaryDirectory(prefix=".merging_", dir=settings.out) as directory:
        events = Path(directory) / "events.parquet"
        try:
            _write_events(paths, user, time, lists, events)
        except OSError as error:
            raise UserError(f"--out: {events} cannot be written ({error})") from error
        done = convert(
            ConvertSettings(
                paths=(str(events),),
                out=settings.out,
                user=user,
                time=time,
                features=tuple(name for name in lists if name != time),
                overwrite=settings.overwrite,
                memory_limit=settings.memory_limit,
            )
        )
    return done, left_out


def main(argv: list[str]) -> int:
    """Runs the command line `argv` and returns the exit code.

    Raises:
      UserError: see `merge`.
    """
    settings = tyro.cli(
        Settings,
        args=argv,
        prog="python -m s2s_jax.data.merge",
        description="Gives each user of an ORC log one row.",
        config=(tyro.conf.FlagConversionOff,),
        use_underscores=True,
    )
    refuse_addresses_in(settings, "--", positional=("paths",))
    done, left_out = merge(settings)
    print(f"wrote {done.rows:,} users with {done.events:,} events to {settings.out}")
    if left_out:
        print(f"left out columns without an entry an event: {', '.join(left_out)}")
    return EXIT_DONE


def _user(schema: pa.Schema, named: str | None) -> str:
    found = user_rows.user_column(schema) if named is None else named
    if found is None or not user_rows.is_user_column(schema, found):
        what = "none that names users" if named is None else f"no such column {named}"
        raise UserError(
            f"--user: expected a column with one number or text a row, found {what} in "
            f"{', '.join(schema.names)}"
        )
    return found


def _time(schema: pa.Schema, named: str | None) -> str:
    known = list(time_columns(schema, None)) if named is None else [named]
    if len(known) != 1 or known[0] not in schema.names or not is_list(schema.field(known[0]).type):
        raise UserError(
            f"--time: expected the one column with the time of each event, by which rows of a user are "
            f"put in order, found {' and '.join(known) or 'none'} in {', '.join(schema.names)}"
        )
    return known[0]


def _write_events(
    paths: Sequence[orc.OrcFile], user: str, time: str, lists: Sequence[str], out: Path
) -> None:
    """A Parquet file with a row an event."""
    with contextlib.ExitStack() as stack:
        writer = None
        for table in _events(paths, user, time, lists):
            if writer is None:
                writer = stack.enter_context(pq.ParquetWriter(str(out), table.schema))
            writer.write_table(table.cast(writer.schema))


def _events(
    paths: Sequence[orc.OrcFile], user: str, time: str, lists: Sequence[str]
) -> Iterator[pa.Table]:
    for file in paths:
        _check_columns(file, paths[0], (user, *lists))
        first_row = 0
        for stripe, rows in enumerate(file.stripe_rows):
            batch = orc.read_stripe(file, stripe, [user, *lists])
            length_N = np.maximum.reduce([list_lengths(batch.column(name)) for name in lists])
            row_P = pa.array(np.repeat(np.arange(rows), length_N))
            columns = {user: batch.column(user).take(row_P)}
            for name in lists:
                place = f"{file.path}: row {{}}, column {name}"
                entries = _entries(batch.column(name), length_N, first_row, place)
                columns[name] = _single(entries) if name == time else entries
            yield pa.table(columns)
            first_row += rows


def _check_columns(file: orc.OrcFile, first: orc.OrcFile, names: Sequence[str]) -> None:
    for name in names:
        there = file.schema.names.count(name) == 1
        kind = file.schema.field(name).type if there else None
        if kind != first.schema.field(name).type:
            raise UserError(
                f"{file.path}: expected column {name} of {first.schema.field(name).type} as in "
                f"{first.path}, found {kind or 'none'}; merge files of the same columns"
            )


def _entries(lists: pa.Array, length_N: np.ndarray, first_row: int, place: str) -> pa.Array:
    """An entry for each event; null where a row lacks the column."""
    found_N = list_lengths(lists)
    wrong_N = (found_N != length_N) & (found_N != 0)
    if wrong_N.any():
        row = int(np.argmax(wrong_N))
        raise UserError(
            f"{place.format(first_row + row)} has {found_N[row]} entries and another column "
            f"{length_N[row]}; every column of a row needs one entry an event"
        )
    there_P = np.repeat(found_N > 0, length_N)
    entry_P = np.cumsum(there_P) - 1
    return lists.flatten().take(pa.array(entry_P, mask=~there_P))


def _single(times: pa.Array) -> pa.Array:
    """The first of each list; null where it is empty."""
    if not is_list(times.type):
        return times
    length_P = list_lengths(times)
    begin_P = np.cumsum(length_P) - length_P
    return times.flatten().take(pa.array(begin_P, mask=length_P == 0))


if __name__ == "__main__":
    run_door(main)
