"""Reads logs in Python programs."""

import os

import pyarrow as pa

from s2s_jax.data.logs import orc
from s2s_jax.data.logs.files import find, split_names
from s2s_jax.errors import UserError


class Log:
    """ORC files with a row for each user; rows are read on request.

    Examples:
      >>> log = read_log("data/quickstart")
      >>> log
      Log of 2,000 rows in 4 files: user_id, item_id, cate_id, behavior_id, timestamp
      >>> histories = log.head(3).to_pylist()
      >>> sorted(histories[0])
      ['behavior_id', 'cate_id', 'item_id', 'timestamp', 'user_id']
    """

    def __init__(self, files: tuple[orc.OrcFile, ...]):
        """Makes a log of at least one file.

        Args:
          files: the files, all with the same columns.
        """
        self._files = files

    def __repr__(self) -> str:
        return (
            f"Log of {self.rows:,} rows in {len(self._files)} files: {', '.join(self.column_names)}"
        )

    @property
    def rows(self) -> int:
        """The number of rows of all files."""
        return sum(file.rows for file in self._files)

    @property
    def schema(self) -> pa.Schema:
        """The names and types of the columns."""
        return self._files[0].schema

    @property
    def column_names(self) -> list[str]:
        """The names of the columns."""
        return self.schema.names

    def head(self, rows: int = 5) -> pa.Table:
        """The first rows. Only the stripes with these rows are read.

        `.to_pylist()` turns them into histories for `Run.recommend`.

        Raises:
          UserError: a stripe cannot be read.
        """
        parts, left = [], rows
        for file in self._files:
            for stripe, there in enumerate(file.stripe_rows):
                if left > 0 and there:
                    batch = orc.read_stripe(file, stripe, self.column_names)
                    parts.append(batch.slice(0, left))
                    left -= there
        return pa.Table.from_batches(parts, self.schema)


def read_log(paths: str | os.PathLike[str]) -> Log:
    """Finds the ORC files of a log and reads their footers.

    Args:
      paths: files and directories, separated by commas, as in `io.data_paths`.

    Raises:
      UserError: a file does not exist or cannot be read, or its columns differ from those of the first.
    """
    names = split_names(os.fspath(paths))
    files = [file for file in map(orc.read_footer, find(names).files) if file.rows]
    if not files:
        raise UserError(f"{os.fspath(paths)}: expected ORC files with rows, found none")
    for file in files:
        if not file.schema.equals(files[0].schema):
            raise UserError(
                f"{file.path}: expected the columns of {files[0].path}, {_columns(files[0])}, found "
                f"{_columns(file)}; read such files one by one"
            )
    return Log(tuple(files))


def _columns(file: orc.OrcFile) -> str:
    """The names and types of the columns, for messages."""
    return ", ".join(f"{field.name}: {field.type}" for field in file.schema)
