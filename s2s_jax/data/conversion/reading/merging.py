"""Prepares ORC files with one event per row, or several rows per user, so that they can be sorted."""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet

from s2s_jax.data.inspection import user_rows
from s2s_jax.data.inspection.time_facts import time_columns
from s2s_jax.data.logs import orc
from s2s_jax.errors import UserError
from s2s_serve.encoding.arrow import is_list


class Columns(NamedTuple):
    """The columns of ORC files to merge.

    Attributes:
      user: the column of user ids.
      time: the column of event times.
      features: the other columns with entries of events: lists or, if a row is an event, all columns.
      left_out: columns that do not have one entry for each event.
    """

    user: str
    time: str
    features: tuple[str, ...]
    left_out: tuple[str, ...]


def columns_of(path: Path, user: str, time: str) -> Columns:
    """The columns of an ORC log, found by their names and types.

    Args:
      path: a file of the log.
      user: the name of the column of user ids; used if there is such a column.
      time: the name of the column of times; used if there is such a column.

    Raises:
      UserError: the file cannot be read, or its columns of users and times cannot be identified.
    """
    schema = orc.read_footer(path).schema
    listed = ", ".join(schema.names)
    users = user if user in schema.names else user_rows.user_column(schema)
    if users is None:
        raise UserError(
            f"--user_column: {path} has no column {user}; expected the column of user ids, found "
            f"{listed}"
        )
    known = [time] if time in schema.names else list(time_columns(schema, None))
    if len(known) != 1:
        raise UserError(
            f"--time_column: {path} has no column {time}; expected the column of times, "
            f"found {' and '.join(known) or 'none'} in {listed}"
        )
    if not is_list(schema.field(known[0]).type):
        # Each row is an event.
        features = tuple(name for name in schema.names if name not in (users, known[0]))
        return Columns(users, known[0], features, ())
    lists = [field.name for field in schema if is_list(field.type)]
    return Columns(
        users,
        known[0],
        tuple(name for name in lists if name != known[0]),
        tuple(name for name in schema.names if name not in (users, *lists)),
    )


def with_rows(paths: Sequence[Path]) -> list[Path]:
    """The ORC files that have rows.

    Raises:
      UserError: no file has rows, or a file cannot be read.
    """
    found = [path for path in paths if orc.read_footer(path).rows]
    if not found:
        raise UserError(f"{paths[0]}: expected rows, found none; give other files")
    return found


def as_parquet(path: Path, columns: Collection[str], directory: Path) -> Path:
    """Copies an ORC file to a Parquet file, and returns its path.

    Args:
      path: the file.
      columns: the columns to copy, if the file has them.
      directory: the directory of the copy.

    Raises:
      UserError: the file cannot be read, or the copy cannot be written.
    """
    file = orc.read_footer(path)
    names = [name for name in file.schema.names if name in columns]
    copy = directory / f"{len(list(directory.iterdir()))}.parquet"
    schema = pa.schema([file.schema.field(name) for name in names])
    try:
        with pyarrow.parquet.ParquetWriter(copy, schema, compression="zstd") as writer:
            for stripe in range(len(file.stripe_rows)):
                writer.write_batch(orc.read_stripe(file, stripe, names))
    except OSError as error:
        raise UserError(f"{path} cannot be copied to {directory} ({error})") from error
    return copy
