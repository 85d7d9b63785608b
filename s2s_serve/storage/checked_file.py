"""A file of a store that is read through Arrow, with clear errors."""

from collections.abc import Callable
from contextlib import AbstractContextManager

import pyarrow as pa

from s2s_serve.storage.seekable_file import SeekableFile


class CheckedFile(SeekableFile):
    """A file whose failing reads are told from contents that Arrow cannot make sense of.

    Arrow raises `OSError` for both.
    """

    def __init__(self, source: pa.NativeFile, asked: Callable[[], AbstractContextManager[None]]):
        """Begins at the first byte.

        Args:
          source: the file.
          asked: in what it gives, errors of the store become other ones.
        """
        with asked():
            super().__init__(source.size())
        self._source, self._asked = source, asked

    def _bytes(self, begin: int, end: int) -> bytes:
        with self._asked():
            data = self._source.read_at(end - begin, begin)
            if len(data) != end - begin:
                raise OSError(f"expected {end - begin:,} bytes, found {len(data):,}")
        return data
