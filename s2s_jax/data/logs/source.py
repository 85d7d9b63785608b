"""Opens the files of a log, on this machine or in a store."""

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa

from s2s_jax.storage.ranges import RangeFile, fetch
from s2s_serve.storage import file_systems
from s2s_serve.storage.address import Place, StorePath

# Bytes at the end of a file that are read first. Footers are shorter, except those of very many stripes.
_TAIL = 2**17


class Source(NamedTuple):
    """An open file.

    Attributes:
      file: what Arrow reads.
      size: its size in bytes.
      modified_ns: time of the last modification, in nanoseconds since 1970; 0 in a store.
      version: what a store says that changes with every change of the file; "" if nothing.
      store: the file in a store; None on this machine.
    """

    file: pa.NativeFile
    size: int
    modified_ns: int
    version: str
    store: pa.NativeFile | None

    def read(self, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """The bytes of some ranges `(begin, end)`.

        Raises:
          OSError: they cannot be read.
        """
        if self.store is not None:
            return fetch(self.store, ranges)
        return [self.file.read_at(end - begin, begin) for begin, end in ranges]


@contextlib.contextmanager
def open_source(path: Place, ahead: tuple[int, int] | None = None) -> Iterator[Source]:
    """Opens a file of a log.

    Args:
      path: the file.
      ahead: a range `(begin, end)` that is about to be read. A store is asked for all of it at once;
        what else is read takes a request for each MiB.

    Raises:
      OSError: it cannot be opened.
      MachineError: the store cannot be reached.
    """
    if isinstance(path, Path):
        # OSFile instead of a memory map: if a mapped file shrinks, the process is killed.
        with pa.OSFile(str(path)) as file:
            yield Source(file, file.size(), path.stat().st_mtime_ns, "", None)
        return
    with file_systems.open_file(path) as store:
        size, version = store.size(), file_systems.version_of(store)
        known = RangeFile(store, size)
        if ahead is not None:
            (data,) = fetch(store, [ahead])
            known.add(ahead[0], data)
        if size:
            known.add(*_tails.of(path, version, store))
        yield Source(pa.PythonFile(known, mode="r"), size, 0, version, store)


class _Tails:
    """The ends of files, which are read for each stripe."""

    def __init__(self, most: int):
        """Keeps the ends of at most `most` files."""
        self._most = most
        self._kept: OrderedDict[tuple[StorePath, str], tuple[int, bytes]] = OrderedDict()
        self._lock = threading.Lock()

    def of(self, path: StorePath, version: str, store: pa.NativeFile) -> tuple[int, bytes]:
        """The place where the end of a file begins, and its bytes.

        Raises:
          OSError: they cannot be read.
        """
        with self._lock:
            if (path, version) in self._kept:
                self._kept.move_to_end((path, version))
                return self._kept[path, version]
        begin = max(store.size() - _TAIL, 0)
        (data,) = fetch(store, [(begin, store.size())])
        found = begin, data
        # Without a version, the file may be another one the next time.
        if version:
            with self._lock:
                self._kept[path, version] = found
                while len(self._kept) > self._most:
                    self._kept.popitem(last=False)
        return found


_tails = _Tails(512)
