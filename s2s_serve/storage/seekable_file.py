"""A file for Arrow whose bytes come from anywhere."""

import io
from abc import abstractmethod


class SeekableFile(io.RawIOBase):
    """A file to read, of which a subclass gives any range of bytes."""

    def __init__(self, size: int):
        """Begins at the first byte.

        Args:
          size: the number of bytes.
        """
        self._size, self._at = size, 0

    @abstractmethod
    def _bytes(self, begin: int, end: int) -> bytes:
        """The bytes from `begin` to `end - 1`, all of them in the file."""

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
        end = self._size if size < 0 else min(self._at + size, self._size)
        if end <= self._at:
            return b""
        data = self._bytes(self._at, end)
        self._at = end
        return data
