"""A file of a store in which only some ranges were read, for readers that ask for small pieces.

Each request to a store takes tens of milliseconds, whatever it asks for, and ORC's reader asks for 128
KB at a time. Its requests are local if a few large ranges are read first, at the same time.
"""

import bisect
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa

from s2s_serve.storage.seekable_file import SeekableFile

# Bytes of a request; more are asked for in several requests at the same time.
_REQUEST = 2**23
# Bytes that are read ahead where nothing is known; they take about as long as a request's latency.
_AHEAD = 2**20
# Requests at the same time, of all readers of this process.
_REQUESTS = 32
_pool = ThreadPoolExecutor(_REQUESTS, "s2s-store")


class StoreError(OSError):
    """A store did not give what a file should have."""


def fetch(source: pa.NativeFile, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
    """The bytes of some ranges `(begin, end)`, requested at the same time.

    Raises:
      StoreError: they cannot be read.
    """
    pieces = [
        (begin, min(begin + _REQUEST, end))
        for first, end in ranges
        for begin in range(first, end, _REQUEST)
    ]
    if len(pieces) == 1:
        ((begin, end),) = pieces
        return [_read(source, begin, end)]
    read = _pool.map(lambda piece: _read(source, *piece), pieces)
    by_begin = {begin: data for (begin, _), data in zip(pieces, read, strict=True)}
    return [
        b"".join(by_begin[begin] for begin in range(first, end, _REQUEST)) for first, end in ranges
    ]


def _read(source: pa.NativeFile, begin: int, end: int) -> bytes:
    try:
        data = source.read_at(end - begin, begin)
    except OSError as error:
        raise StoreError(str(error)) from error
    if len(data) != end - begin:
        raise StoreError(
            f"expected {end - begin:,} bytes from byte {begin:,} on, found {len(data):,}"
        )
    return data


class RangeFile(SeekableFile):
    """A file of which known ranges are in memory.

    Of the rest, 1 MiB is requested at a time, from the first byte on that is asked for.
    """

    def __init__(self, source: pa.NativeFile, size: int):
        """Begins without known ranges.

        Args:
          source: the file.
          size: its size in bytes.
        """
        super().__init__(size)
        self._source = source
        self._begins: list[int] = []
        self._parts: list[bytes] = []

    def add(self, begin: int, data: bytes) -> None:
        """Keeps the bytes that begin at a place."""
        place = bisect.bisect_left(self._begins, begin)
        self._begins.insert(place, begin)
        self._parts.insert(place, data)

    def _bytes(self, begin: int, end: int) -> bytes:
        place = bisect.bisect_right(self._begins, begin) - 1
        if place >= 0:
            first = self._begins[place]
            if end <= first + len(self._parts[place]):
                return self._parts[place][begin - first : end - first]
        data = _read(self._source, begin, min(max(end, begin + _AHEAD), self._size))
        self.add(begin, data)
        return data[: end - begin]
