"""Writes Arrow tables as the ORC files of a log, in stripes of a good size for training.

Shapes: N rows of a table.
"""

# pyarrow.compute makes its functions at run time.
# pyright: reportAttributeAccessIssue=false

import contextlib
import io
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.orc

from s2s_jax.data.logs.log_directory import LogDirectory, log_directory
from s2s_jax.errors import UserError
from s2s_serve.encoding.arrow import is_list, list_lengths
from s2s_serve.storage.address import Place

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer as Buffer

# More stripes let training shuffle better, but stripes of 200,000 to 800,000 positions are the fastest
# to read, and the ORC writer cannot end a stripe whose compressed columns are too short.
_STRIPES_OF_A_LOG = 160
_LARGE_STRIPE, _SMALL_STRIPE = 250_000, 16_000


def stripe_positions(positions: int) -> int:
    """The number of positions that a stripe should hold in a log of `positions` positions."""
    return min(max(positions // _STRIPES_OF_A_LOG, _SMALL_STRIPE), _LARGE_STRIPE)


@contextlib.contextmanager
def open_log(
    out: Place,
    overwrite: bool,
    positions_per_file: int | None = None,
    temp_dir: Path | None = None,
) -> Iterator["LogWriter"]:
    """A log to write to; its files appear at the end of the `with` block, unless the block raises.

    Args:
      out: the directory; created if it does not exist.
      overwrite: whether to replace existing part-N.orc files, once everything is written.
      positions_per_file: a file ends when it has this many positions; None: only `LogWriter.end_file`
        ends a file.
      temp_dir: a directory of this machine for the file that is being written, if `out` is in a store;
        None: `TMPDIR`.

    Raises:
      UserError: the directory cannot be written or holds other ORC files. Messages refer to the flags
        `--output`, `--overwrite` and `--temp_dir`.
      MachineError: the store does not take a file. Those that it took are removed if it answers.
    """
    directory = log_directory(out, temp_dir)
    try:
        with directory.reserved(overwrite):
            log = LogWriter(directory, positions_per_file)
            try:
                yield log
                log.end_file()
                deferring_signals(log.show)
            except BaseException:
                log.discard()
                raise
    except OSError as error:
        raise UserError(directory.not_written(error)) from error


class LogWriter:
    """Writes the files part-0.orc, part-1.orc … of one log.

    Attributes:
      paths: the final places of the files.
      rows: rows written so far.
      positions: positions written so far: for each row its longest list, or 1 if no column has lists.
      positions_per_stripe: a stripe ends when it has this many positions; may be changed.
    """

    def __init__(self, directory: LogDirectory, positions_per_file: int | None):
        self.paths: list[Place] = []
        self.rows = self.positions = 0
        self.positions_per_stripe = _LARGE_STRIPE
        self._directory = directory
        self._positions_per_file = positions_per_file
        self._schema: pa.Schema | None = None
        self._writer: pyarrow.orc.ORCWriter | None = None
        self._sink: _Sink | None = None
        self._batch_size = 0
        # Rows that wait for their stripe to be full, and the numbers of positions of stripe and file.
        self._waiting: list[pa.Table] = []
        self._in_stripe = self._in_file = 0

    def write(self, table: pa.Table) -> None:
        """Adds rows. If the columns differ from the previous ones, a new file begins."""
        if table.schema != self._schema:
            self.end_file()
            self._schema = table.schema
        positions_N = _positions(table)
        self.rows += table.num_rows
        self.positions += int(positions_N.sum())
        # Rows without positions also take up space.
        until_N = np.cumsum(np.maximum(positions_N, 1))
        start = done = 0
        while start < table.num_rows:
            room = self.positions_per_stripe - self._in_stripe
            if self._positions_per_file is not None:
                room = min(room, self._positions_per_file - self._in_file)
            stop = min(int(np.searchsorted(until_N, done + room)) + 1, table.num_rows)
            self._waiting.append(table.slice(start, stop - start))
            added = int(until_N[stop - 1]) - done
            self._in_stripe += added
            self._in_file += added
            if self._in_stripe >= self.positions_per_stripe:
                self._end_stripe()
            if self._positions_per_file is not None and self._in_file >= self._positions_per_file:
                self.end_file()
            start, done = stop, int(until_N[stop - 1])

    def end_file(self) -> None:
        """Ends the current file, if there is one; the next rows go into a new file."""
        self._end_stripe()
        self._end_file()

    def show(self) -> None:
        """Replaces the files of an earlier log by those that are written."""
        self._directory.show([path.name for path in self.paths])

    def discard(self) -> None:
        """Removes the files."""
        with contextlib.suppress(OSError, pa.ArrowException):
            self._close()
        self._directory.discard([path.name for path in self.paths])

    def _end_stripe(self) -> None:
        if self._waiting:
            table = pa.concat_tables(self._waiting)
            self._waiting, self._in_stripe = [], 0
            # A slice would keep the buffers of the whole table; `take` copies.
            self._write_stripe(table.take(pa.array(np.arange(table.num_rows))))

    def _write_stripe(self, table: pa.Table) -> None:
        entries = _entries(table)
        if self._writer is not None and entries > self._batch_size:
            # The lists are longer, or the bags larger, than in the first stripe of the file.
            if table.num_rows > 1:
                half = table.num_rows // 2
                self._write_stripe(table.slice(0, half))
                self._write_stripe(table.slice(half))
                return
            self._end_file()
        try:
            if self._writer is None:
                self._open(entries)
            assert self._writer is not None
            assert self._sink is not None
            self._writer.write(table)
            self._sink.check()
        except (pa.ArrowNotImplementedError, pa.ArrowTypeError) as error:
            raise UserError(
                f"--output: pyarrow cannot write these columns as ORC "
                f"({' '.join(str(error).split())}); they are {_columns(table.schema)}"
            ) from error

    def _open(self, entries: int) -> None:
        name = f"part-{len(self.paths)}.orc"
        self.paths.append(self._directory.place_of(name))
        # If a write has more list entries than batch_size, pyarrow grows its memory entry by entry, each
        # time with a copy; 300,000 entries take a minute. It also ends the stripe after each write that
        # exceeds stripe_size, so here each write becomes one stripe.
        self._batch_size = entries + entries // 4
        self._sink = _Sink(self._directory.unfinished(name))
        self._writer = pyarrow.orc.ORCWriter(
            self._sink, compression="zstd", stripe_size=1, batch_size=self._batch_size
        )

    def _end_file(self) -> None:
        if self._writer is not None:
            self._close()
            self._directory.ended(self.paths[-1].name)
        self._in_file = 0

    def _close(self) -> None:
        writer, self._writer = self._writer, None
        if writer is not None:
            assert self._sink is not None
            writer.close()
            self._sink.end()


def deferring_signals(work: Callable[[], None]) -> None:
    """Runs `work`, and handles signals only after it."""
    if threading.current_thread() is not threading.main_thread():
        # Python handles signals only in the main thread.
        work()
        return
    noted: list[int] = []
    before = {}
    try:
        for number in (signal.SIGTERM, signal.SIGINT):
            before[number] = signal.getsignal(number)
            signal.signal(number, lambda number, _: noted.append(number))
        work()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for number in noted:
            signal.raise_signal(number)


class _Sink(io.RawIOBase):
    """A file that keeps its errors until `check`, because inside pyarrow they would end the process."""

    def __init__(self, path: Path):
        self.error: OSError | None = None
        self._file = path.open("wb", buffering=0)
        self._size = 0

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._size

    def write(self, data: "Buffer") -> int:
        rest = memoryview(data).cast("B")
        size = len(rest)
        self._size += size
        try:
            while self.error is None and len(rest):
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            self.error = error
        return size

    def end(self) -> None:
        """Closes the file, after pyarrow has finished with it. May be called again.

        Raises:
          OSError: it could not be written.
        """
        self._file.close()
        self.check()

    def check(self) -> None:
        """Raises the error of earlier writes, if there was one."""
        if self.error is not None:
            raise self.error


def _columns(schema: pa.Schema) -> str:
    return ", ".join(f"{field.name} {field.type}" for field in schema)


# ------------------------------------------------------------------------------- lengths of lists


def positions(batch: pa.RecordBatch) -> int:
    """Number of positions of all rows: for each row its longest list, or 1 if no column has lists."""
    return int(_positions(pa.Table.from_batches([batch])).sum())


def _positions(table: pa.Table) -> np.ndarray:
    """Number of positions of each row, int64 `[N]`."""
    lengths = [
        np.concatenate([list_lengths(chunk) for chunk in column.chunks])
        for column in table.columns
        if is_list(column.type) and column.num_chunks
    ]
    return np.maximum.reduce(lengths) if lengths else np.ones(table.num_rows, np.int64)


def _entries(table: pa.Table) -> int:
    """The most entries of any column, at any level of its lists."""
    most = table.num_rows
    for column in table.columns:
        while is_list(column.type):
            column = pa.chunked_array(
                [chunk.flatten() for chunk in column.chunks], column.type.value_type
            )
            most = max(most, len(column))
    return most
