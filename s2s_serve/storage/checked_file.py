"""A file of a store that is read through Arrow, with clear errors."""

import io
from collections.abc import Callable
from contextlib import AbstractContextManager

import pyarrow as pa


class CheckedFile(io.RawIOBase):
    """A file whose failing reads are told from contents that Arrow cannot make sense of.

    Arrow raises `OSError` for both.
    """

    def __init__(self, source: pa.NativeFile, asked: Callable[[], AbstractContextManager[None]]):
        """Begins at the first byte.

        Args:
          source: the file.
          asked: in what it gives, errors of the store become other ones.
        """
        self._source, self._asked, self._at = source, asked, 0
        with asked():
            self._size = source.size()

    def readable(self) -> bool:
        """True."""
        return True

    def seekable(self) -> bool:
        """True."""
        return True

    def tell(self) -> int:
        """The place of the next byte."""
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Goes to a place, and returns it."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = base + offset
        return self._at

    def read(self, size: int = -1) -> bytes:
        """The next bytes."""
        left = max(self._size - self._at, 0)
        wanted = left if size < 0 else min(size, left)
        with self._asked():
            data = self._source.read_at(wanted, self._at)
            if len(data) != wanted:
                raise OSError(f"expected {wanted:,} bytes, found {len(data):,}")
        self._at += wanted
        return data
