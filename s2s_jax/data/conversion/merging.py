"""ORC logs with several rows of a user → files whose events can be sorted anew."""

from collections.abc import Collection, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet

from s2s_jax.data import orc
from s2s_jax.errors import UserError


def with_rows(paths: Sequence[Path]) -> list[Path]:
    """The ORC files that have rows.

    Raises:
      UserError: none has, or one cannot be read.
    """
    found = [path for path in paths if orc.read_footer(path).rows]
    if not found:
        raise UserError(f"{paths[0]}: expected rows, found none; name other files")
    return found


def as_parquet(path: Path, columns: Collection[str], directory: Path) -> Path:
    """A copy of an ORC file, as Parquet.

    Args:
      path: the file.
      columns: the columns that are copied, of those that it has.
      directory: for the copy.

    Raises:
      UserError: the file cannot be read, or the copy not be written.
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
        raise UserError(f"{path}: it cannot be copied to {directory} ({error})") from error
    return copy
