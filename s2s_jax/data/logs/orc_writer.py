"""Arrow tables → the ORC files of a log, with stripes of the size that reads best.

Shapes: N rows of a table.
"""

# pyarrow.compute makes its functions at run time.
# pyright: reportAttributeAccessIssue=false

import contextlib
import errno
import fcntl
import io
import os
import re
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.orc

from s2s_jax.data.logs.arrow import is_list, list_lengths
from s2s_jax.errors import UserError

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer as Buffer

# Training draws from more places of a log with more stripes, and reads stripes of 200,000 to 800,000
# positions fastest; the writer cannot end a stripe whose compressed columns are too short.
_STRIPES_OF_A_LOG = 160
# What the names of directories begin with in which events are sorted.
SORTING = ".sorting_"
_LARGE_STRIPE, _SMALL_STRIPE = 250_000, 16_000


def stripe_positions(positions: int) -> int:
    """Positions that a stripe should hold in a log of `positions`."""
    return min(max(positions // _STRIPES_OF_A_LOG, _SMALL_STRIPE), _LARGE_STRIPE)


@contextlib.contextmanager
def open_log(
    out: Path, overwrite: bool, positions_per_file: int | None = None
) -> Iterator["LogWriter"]:
    """A log to write to; its files appear at the end of the `with` block, unless that raises.

    Args:
      out: the directory; made where it does not exist.
      overwrite: whether part-N.orc files that are in it are replaced, when all is written.
      positions_per_file: positions with which a file ends; None: only `LogWriter.end_file` ends it.

    Raises:
      UserError: the directory cannot be written or holds other ORC files. The flags that messages
        name are `--out` and `--overwrite`.
    """
    try:
        made = not out.exists()
        earlier = _prepare(out, overwrite)
        with _alone(out):
            _remove_leftovers(out)
            log = LogWriter(out, positions_per_file)
            try:
                yield log
                log.end_file()
                _undisturbed(lambda: log.show(instead_of=earlier))
            except BaseException:
                log.discard()
                if made:
                    with contextlib.suppress(OSError):
                        out.rmdir()
                raise
    except OSError as error:
        raise UserError(f"--out: {out} cannot be written ({error})") from error


class LogWriter:
    """Writes the files part-0.orc, part-1.orc … of one log.

    Readers pass over names that begin with a dot, as the files' do until `show`.

    Attributes:
      paths: the files, as they will be called.
      rows: rows of them, so far.
      positions: positions of these, so far: the longest list of each, or 1 where no column has lists.
      positions_per_stripe: positions with which a stripe ends; may be set.
    """

    def __init__(self, out: Path, positions_per_file: int | None):
        self.paths: list[Path] = []
        self.rows = self.positions = 0
        self.positions_per_stripe = _LARGE_STRIPE
        self._out = out
        self._positions_per_file = positions_per_file
        self._schema: pa.Schema | None = None
        self._writer: pyarrow.orc.ORCWriter | None = None
        self._sink: _Sink | None = None
        self._batch_size = 0
        # Rows that wait until they fill a stripe; their positions, and those of the whole file.
        self._waiting: list[pa.Table] = []
        self._in_stripe = self._in_file = 0

    def write(self, table: pa.Table) -> None:
        """Adds rows. Where the columns are other than before, a new file begins."""
        if table.schema != self._schema:
            self.end_file()
            self._schema = table.schema
        positions_N = _positions(table)
        self.rows += table.num_rows
        self.positions += int(positions_N.sum())
        # Rows without positions take room, too.
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
        """Ends the file, if any is begun: what is written next goes into another."""
        self._end_stripe()
        self._close()
        self._in_file = 0

    def show(self, instead_of: list[Path]) -> None:
        """Gives all files their names, after those of an earlier log are removed."""
        for path in instead_of:
            path.unlink()
        for path in self.paths:
            _hidden(path).rename(path)

    def discard(self) -> None:
        """Removes the files."""
        with contextlib.suppress(OSError, pa.ArrowException):
            self._close()
        for path in self.paths:
            _hidden(path).unlink(missing_ok=True)

    def _end_stripe(self) -> None:
        if self._waiting:
            table = pa.concat_tables(self._waiting)
            self._waiting, self._in_stripe = [], 0
            # A slice would carry the buffers of the whole table; what `take` returns does not.
            self._write_stripe(table.take(pa.array(np.arange(table.num_rows))))

    def _write_stripe(self, table: pa.Table) -> None:
        entries = _entries(table)
        if self._writer is not None and entries > self._batch_size:
            # Longer lists or larger bags than in the first stripe of the file.
            if table.num_rows > 1:
                half = table.num_rows // 2
                self._write_stripe(table.slice(0, half))
                self._write_stripe(table.slice(half))
                return
            self._close()
            self._in_file = 0
        try:
            if self._writer is None:
                self._open(entries)
            assert self._writer is not None
            assert self._sink is not None
            self._writer.write(table)
            self._sink.check()
        except (pa.ArrowNotImplementedError, pa.ArrowTypeError) as error:
            raise UserError(
                f"--out: pyarrow cannot write these columns as ORC "
                f"({' '.join(str(error).split())}); they are {_columns(table.schema)}"
            ) from error

    def _open(self, entries: int) -> None:
        path = self._out / f"part-{len(self.paths)}.orc"
        self.paths.append(path)
        # In one write, pyarrow grows the memory for lists entry by entry, each time with a copy, where
        # they have more entries than batch_size: with 300,000 that takes a minute. And it ends a stripe
        # after a write with which stripe_size is exceeded, so each write becomes a stripe.
        self._batch_size = entries + entries // 4
        self._sink = _Sink(_hidden(path))
        self._writer = pyarrow.orc.ORCWriter(
            self._sink, compression="zstd", stripe_size=1, batch_size=self._batch_size
        )

    def _close(self) -> None:
        writer, self._writer = self._writer, None
        if writer is not None:
            assert self._sink is not None
            writer.close()
            self._sink.end()


def _prepare(out: Path, overwrite: bool) -> list[Path]:
    """Makes the directory and returns the files of an earlier log, which are to be replaced."""
    if out.exists() and not out.is_dir():
        raise UserError(f"--out: expected a directory, found the file {out}; give another name")
    out.mkdir(parents=True, exist_ok=True)
    there = sorted(p for p in out.rglob("*.orc") if p.name[0] not in "._")
    own = [p for p in there if p.parent == out and re.fullmatch(r"part-\d+\.orc", p.name)]
    others = [p for p in there if p not in own]
    if own and not overwrite:
        raise UserError(
            f"--out: {out} already holds {own[0].name}, which new files would mix with; "
            f"give another directory or --overwrite True"
        )
    if others:
        raise UserError(
            f"--out: {out} holds {others[0].relative_to(out)}, which new files would mix with; "
            f"give another directory"
        )
    return own


@contextlib.contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Keeps others from writing a log to the directory at the same time."""
    directory = os.open(out, os.O_RDONLY)
    try:
        try:
            fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"--out: another program is writing a log to {out}; wait for it, or give another "
                f"directory"
            ) from error
        except OSError as error:
            # Some network file systems have no locks.
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EBADF):
                raise
        yield
    finally:
        os.close(directory)


def _remove_leftovers(out: Path) -> None:
    """Removes what a program that was killed left in the directory."""
    for path in out.iterdir():
        if re.fullmatch(r"\.part-\d+\.orc", path.name):
            path.unlink()
        elif path.name.startswith(SORTING) and path.is_dir():
            shutil.rmtree(path)


def _undisturbed(work: Callable[[], None]) -> None:
    """Does something to its end: signals are answered after it."""
    if threading.current_thread() is not threading.main_thread():
        # Python answers signals in the main thread only.
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
    """A file whose errors are kept until they are asked for: pyarrow would end the process."""

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
        """Ends the file, with which pyarrow has done. May be called again.

        Raises:
          OSError: it could not be written.
        """
        self._file.close()
        self.check()

    def check(self) -> None:
        """Raises the error of what was written so far."""
        if self.error is not None:
            raise self.error


def _hidden(path: Path) -> Path:
    return path.with_name(f".{path.name}")


def _columns(schema: pa.Schema) -> str:
    return ", ".join(f"{field.name} {field.type}" for field in schema)


# ------------------------------------------------------------------------------- lengths of lists


def positions(batch: pa.RecordBatch) -> int:
    """Positions of rows: the longest list of each, or 1 where no column has lists."""
    return int(_positions(pa.Table.from_batches([batch])).sum())


def _positions(table: pa.Table) -> np.ndarray:
    """int64 `[N]`, positions of each row."""
    lengths = [
        np.concatenate([list_lengths(chunk) for chunk in column.chunks])
        for column in table.columns
        if is_list(column.type) and column.num_chunks
    ]
    return np.maximum.reduce(lengths) if lengths else np.ones(table.num_rows, np.int64)


def _entries(table: pa.Table) -> int:
    """The most entries that a column has at any level of its lists."""
    most = table.num_rows
    for column in table.columns:
        while is_list(column.type):
            column = pa.chunked_array(
                [chunk.flatten() for chunk in column.chunks], column.type.value_type
            )
            most = max(most, len(column))
    return most
