"""Files of arrays in the safetensors format, written part by part and read through memory maps.

The format (https://github.com/huggingface/safetensors): eight bytes with the length of a JSON header,
the header, then the numbers of all arrays. The library of that name holds whole arrays in memory, both
to write and to read them; tables of an export may be larger than memory.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from s2s_serve.errors import UserError

_CODES = {
    "F32": "<f4",
    "F64": "<f8",
    "I32": "<i4",
    "I64": "<i8",
    "U64": "<u8",
    "U8": "|u1",
}
_NAMES = {np.dtype(code): name for name, code in _CODES.items()}
# Numbers begin at a multiple of this, so that memory maps are aligned.
_ALIGNMENT = 64
_LONGEST_HEADER = 2**20


class Layout(NamedTuple):
    """The type and the shape of an array in a file."""

    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """The number of bytes of the array."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


def write(
    path: Path, layouts: Mapping[str, Layout], parts: Mapping[str, Iterable[np.ndarray]]
) -> None:
    """Writes arrays, one part of the first axis at a time.

    Args:
      path: the file, which must not exist.
      layouts: the arrays, in the order in which they are written.
      parts: the parts of each array, which together have its shape.

    Examples:
      >>> import tempfile
      >>> path = Path(tempfile.mkdtemp()) / "a.safetensors"
      >>> rows = np.arange(6, dtype=np.float32).reshape(3, 2)
      >>> write(path, {"rows": Layout(rows.dtype, rows.shape)}, {"rows": [rows[:2], rows[2:]]})
      >>> read(path)["rows"].tolist()
      [[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]]
    """
    header, begin = {}, 0
    for name, layout in layouts.items():
        header[name] = {
            "dtype": _NAMES[layout.dtype.newbyteorder("<")],
            "shape": list(layout.shape),
            "data_offsets": [begin, begin + layout.nbytes],
        }
        begin += layout.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-(len(text) + 8) % _ALIGNMENT)
    with path.open("xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, layout in layouts.items():
            written = 0
            for part in parts[name]:
                assert part.dtype == layout.dtype, f"{name} has the type of its layout"
                file.write(np.ascontiguousarray(part, part.dtype.newbyteorder("<")).data)
                written += part.nbytes
            assert written == layout.nbytes, f"{name} has the size of its layout"


def read(path: Path, remedy: str = "export the run again") -> dict[str, np.ndarray]:
    """Maps all arrays of a file into memory; their pages are read when they are used.

    Args:
      path: the file.
      remedy: what the user can do about a file that cannot be read.

    Raises:
      UserError: the file is not there, or is not in this format.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(_LONGEST_HEADER, size - 8):
                raise ValueError(f"a header of {length:,} bytes in a file of {size:,}")
            header = json.loads(file.read(length))
        return dict(_arrays(path, header, 8 + length, size))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise UserError(
            f"{path}: expected arrays in the safetensors format, found none ({reason}); {remedy}"
        ) from error


def _arrays(path: Path, header: Mapping, first: int, size: int) -> Iterator[tuple[str, np.ndarray]]:
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in _CODES:
            raise ValueError(f"{name} has numbers of type {entry['dtype']}")
        layout = Layout(np.dtype(_CODES[entry["dtype"]]), tuple(entry["shape"]))
        begin, end = entry["data_offsets"]
        if end - begin != layout.nbytes or begin < 0 or first + end > size:
            raise ValueError(f"{name} at bytes {begin} to {end}")
        if layout.nbytes == 0:
            yield name, np.zeros(layout.shape, layout.dtype)
        else:
            mapped = np.memmap(path, layout.dtype, "r", first + begin, layout.shape)
            # Without the subclass, indexing is faster.
            yield name, np.asarray(mapped)
