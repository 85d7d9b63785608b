"""A DuckDB database on disk, whose errors become one-sentence messages.

The extra `convert` installs DuckDB.
"""

import concurrent.futures
import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

import duckdb
import pyarrow as pa

from s2s_jax.data.conversion.reading import sql
from s2s_jax.errors import UserError

_SHOWN = 80

T = TypeVar("T")


class Database:
    """A database that keeps all its files in one directory."""

    def __init__(self, directory: Path, memory_limit: str | None):
        """Creates the database.

        Args:
          directory: the directory of the database and of temporary files of the sort.
          memory_limit: the memory limit of DuckDB, such as "4GB"; None: 80% of the memory.

        Raises:
          UserError: memory_limit is not a valid size.
        """
        self._worker = concurrent.futures.ThreadPoolExecutor(1, "duckdb")
        try:
            self._connection = duckdb.connect(str(directory / "events.duckdb"))
        except duckdb.Error as error:
            self._worker.shutdown()
            raise UserError(f"--temp_dir: {directory} cannot be used ({reason(error)})") from error
        settings = {"temp_directory": str(directory), "TimeZone": "UTC"}
        # We show our own progress bar.
        settings |= {"enable_progress_bar": "true", "enable_progress_bar_print": "false"}
        # Never download extensions.
        settings |= {"autoinstall_known_extensions": "false"}
        for key, value in settings.items():
            self.run(f"SET {key} = {sql.text(value)}")
        if memory_limit is not None:
            try:
                self._connection.execute(f"SET memory_limit = {sql.text(memory_limit)}")
            except duckdb.Error as error:
                self._connection.close()
                raise UserError(
                    f"--memory_limit: expected a size such as 4GB, found {memory_limit}"
                ) from error

    def close(self) -> None:
        """Closes the database."""
        self._worker.shutdown()
        with _as_user_error("the events"):
            self._connection.close()

    def progress(self) -> float:
        """Percent done of the running query. May be called from another thread."""
        return max(self._connection.query_progress(), 0.0)

    def run(self, query: str, what: str = "the events") -> list[tuple]:
        """The rows of a query's result.

        Args:
          query: the SQL query.
          what: the subject of error messages, such as the file that is read.

        Raises:
          UserError: the query fails.
        """
        with _as_user_error(what):
            return self._interruptible(lambda: self._connection.execute(query).fetchall())

    def aggregate(
        self, aggregates: Mapping[str, str], table: str, what: str = "the events"
    ) -> dict:
        """The values of aggregates over a table, under the same names."""
        if not aggregates:
            return {}
        (values,) = self.run(f"SELECT {', '.join(aggregates.values())} FROM {table}", what)
        return dict(zip(aggregates, values, strict=True))

    def stream(self, query: str) -> Iterator[pa.RecordBatch]:
        """The result of a query, in batches, so that it need not fit in memory.

        Raises:
          UserError: the query fails, for example because the disk is full.
        """
        with _as_user_error("the events"):
            reader = self._interruptible(
                lambda: iter(pa.RecordBatchReader.from_stream(self._connection.sql(query)))
            )
            while (batch := self._interruptible(lambda: next(reader, None))) is not None:
                yield batch

    def _interruptible(self, work: Callable[[], T]) -> T:
        """The result of `work`. If a signal raises an exception, DuckDB's query is interrupted.

        DuckDB ignores signals, and Python handles them only outside of DuckDB.
        """
        result = self._worker.submit(work)
        try:
            return result.result()
        except BaseException:
            self._connection.interrupt()
            raise

    def register(self, name: str, table: pa.Table) -> None:
        """Lets queries read an Arrow table under a name."""
        self._connection.register(name, table)


@contextlib.contextmanager
def _as_user_error(what: str) -> Iterator[None]:
    """Raises errors of the `with` block as a `UserError` about `what`."""
    try:
        yield
    except duckdb.OutOfMemoryException as error:
        raise UserError(
            f"{what}: more memory or disk space is needed ({reason(error)}); raise --memory_limit, "
            f"or give a directory on a larger disk with --temp_dir"
        ) from error
    except duckdb.IOException as error:
        full = ""
        if any(words in str(error) for words in ("No space left", "Disk quota", "Could not write")):
            full = "; give a directory on a larger disk with --temp_dir"
        raise UserError(f"{what}: DuckDB failed: {reason(error)}{full}") from error
    except (duckdb.Error, pa.ArrowException, OSError) as error:
        raise UserError(f"{what}: DuckDB failed: {reason(error)}") from error


def reason(error: Exception) -> str:
    """The first line of an error message; the other lines quote the query."""
    lines = str(error).split("\n")
    return " ".join(lines[0].split()) or type(error).__name__


def shorten(text: str) -> str:
    """A text as it is shown in a message."""
    text = " ".join(text.split())
    return text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…"
