"""ORC files → stripes → Arrow record batches, with errors that name file, stripe and column."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.orc

from s2s_jax.errors import UserError

# What pyarrow raises on broken files. ORC has no checksums: damage to uncompressed data may pass.
_READ_ERRORS = (pa.ArrowException, OSError, ValueError)


@dataclasses.dataclass(frozen=True)
class OrcFile:
    """What an ORC file's footer says.

    Attributes:
      path: the file.
      size: its bytes.
      schema: names and types of its columns.
      stripe_rows: rows of each stripe.
    """

    path: Path
    size: int
    schema: pa.Schema
    stripe_rows: tuple[int, ...]

    @property
    def rows(self) -> int:
        """Rows of the file."""
        return sum(self.stripe_rows)


def find_files(data_paths: str) -> list[Path]:
    """The ORC files that a comma-separated list of files and directories names, in order.

    A directory gives, sorted by path, the files ending in .orc below it or, where there are none,
    all files. Files and directories whose names start with `.` or `_` are passed over: other programs
    keep unfinished or left-over files there (`_temporary`, `_SUCCESS`, `.ipynb_checkpoints`).

    Raises:
      UserError: nothing is named, a path does not exist, a directory is empty, or a file is named
        twice.
    """
    names = [name.strip() for name in data_paths.split(",") if name.strip()]
    if not names:
        raise UserError("io.data_paths: expected ORC files or directories, found none")
    files: list[Path] = []
    for name in names:
        path = Path(name).expanduser()
        if path.is_file():
            files.append(path)
        elif path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.is_file() and not _hidden(p, path))
            found = [p for p in inside if p.suffix == ".orc"] or inside
            if not found:
                raise UserError(f"io.data_paths: directory {path} holds no ORC files")
            files += found
        else:
            raise UserError(f"io.data_paths: {path} does not exist")
    resolved: set[Path] = set()
    for path in files:
        if path.resolve() in resolved:
            raise UserError(f"io.data_paths: {path} is named twice; its rows would count double")
        resolved.add(path.resolve())
    return files


def _hidden(path: Path, below: Path) -> bool:
    return any(part[0] in "._" for part in path.relative_to(below).parts)


def read_footer(path: Path) -> OrcFile:
    """Reads the footer of `path`.

    Raises:
      UserError: it is no readable ORC file.
    """
    with _open(path) as source:
        try:
            reader = pyarrow.orc.ORCFile(source)
            schema = reader.schema
            # Names are decoded when they are first asked for.
            _ = schema.names, str(schema)
            stripe_rows = tuple(_stripe_rows(reader.reader.serialized_file_tail()))
            nrows, nstripes = reader.nrows, reader.nstripes
        except _READ_ERRORS as error:
            raise UserError(f"{path}: expected an ORC file, but {_reason(error)}") from error
    if sum(stripe_rows) != nrows or len(stripe_rows) != nstripes:
        raise UserError(
            f"{path}: its footer is damaged: {len(stripe_rows)} stripes with {sum(stripe_rows)} "
            f"rows, expected {nstripes} with {nrows}; write the file anew"
        )
    return OrcFile(path, path.stat().st_size, schema, stripe_rows)


def read_stripe(file: OrcFile, stripe: int, columns: Sequence[str]) -> pa.RecordBatch:
    """Reads some columns of one stripe.

    Args:
      file: the file, as `read_footer` saw it.
      stripe: index of the stripe.
      columns: names of top-level columns that the file has.

    Raises:
      UserError: the stripe cannot be read, or has changed since its footer was read.
    """
    # OSFile, not a memory map: a file that shrinks while mapped kills the process.
    with _open(file.path) as source:
        try:
            batch = pyarrow.orc.ORCFile(source).read_stripe(stripe, columns=list(columns))
        except _READ_ERRORS as error:
            raise UserError(
                f"{file.path}: stripe {stripe} cannot be read ({_reason(error)}); "
                f"write the file anew or take it out of io.data_paths"
            ) from error
    if batch.num_rows != file.stripe_rows[stripe]:
        raise UserError(
            f"{file.path}: stripe {stripe} has {batch.num_rows} rows, expected "
            f"{file.stripe_rows[stripe]} as its footer said; do not change files while they are read"
        )
    return batch


def _open(path: Path) -> pa.OSFile:
    try:
        return pa.OSFile(str(path))
    except _READ_ERRORS as error:
        raise UserError(f"{path}: cannot be opened ({_reason(error)})") from error


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


# -------------------------------------------------------------------- rows of each stripe
#
# pyarrow does not tell how many rows a stripe has, but hands out the serialized FileTail message
# (orc_proto.proto): FileTail.footer is field 2, Footer.stripes field 3, and
# StripeInformation.numberOfRows field 5.


def _stripe_rows(file_tail: bytes) -> Iterator[int]:
    for number, footer in _fields(file_tail):
        if number == 2 and isinstance(footer, bytes):
            for number_, stripe in _fields(footer):
                if number_ == 3 and isinstance(stripe, bytes):
                    rows = [value for field, value in _fields(stripe) if field == 5]
                    yield int(rows[-1]) if rows else 0


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Field numbers and values of a serialized protocol buffer message."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        number, wire_type = key >> 3, key & 7
        if wire_type == 0:
            value, at = _varint(message, at)
            yield number, value
            continue
        if wire_type == 2:
            size, at = _varint(message, at)
        else:
            sizes = {1: 8, 5: 4}
            if wire_type not in sizes:
                raise ValueError(f"its footer is damaged (wire type {wire_type})")
            size = sizes[wire_type]
        if at + size > len(message):
            raise ValueError("its footer is damaged (a field ends past the end)")
        yield number, message[at : at + size]
        at += size


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if at >= len(message):
            raise ValueError("its footer is damaged (a number ends past the end)")
        byte = message[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
