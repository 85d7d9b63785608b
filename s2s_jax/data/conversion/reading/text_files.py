"""Reads text files with one event per line: their format, header and encoding."""

import codecs
import csv
import dataclasses
import io
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa

from s2s_jax.errors import UserError

_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_PIECE = 2**20


@dataclasses.dataclass(frozen=True)
class CsvFormat:
    """How the lines of a text file are split into columns.

    Attributes:
      delimiter: the delimiter of columns.
      quote: the quotation mark around texts that contain delimiters; empty: nothing is quoted.
      columns: the names of the columns, if the first line does not have them.
      escape: the character before a quotation mark, or itself, inside quotes; empty: quotation marks
        inside quotes are doubled.
      new_line: the line ending.
    """

    delimiter: str
    quote: str
    columns: tuple[str, ...] | None
    escape: str = ""
    new_line: str = "\n"


def default_delimiter(path: Path) -> str:
    """A tab in .tsv files, else a comma."""
    return "\t" if ".tsv" in path.suffixes[-2:] else ","


def read_header(path: Path, form: CsvFormat) -> list[str]:
    """The names in the first line.

    Raises:
      UserError: the file cannot be read or has no line.
    """
    for row in read_rows(path, form, "utf-8-sig"):
        return row
    raise UserError(
        f"{path}: expected a line with the names of columns, found an empty file; give another file"
    )


def read_rows(path: Path, form: CsvFormat, encoding: str) -> Iterator[list[str]]:
    """The lines of a file, split into columns.

    Raises:
      UserError: the file cannot be read.
    """
    try:
        with (
            pa.input_stream(str(path), compression="detect") as source,
            io.TextIOWrapper(source, encoding, errors="replace", newline="") as lines,
        ):
            if len(form.delimiter) > 1:
                yield from (line.rstrip("\r\n").split(form.delimiter) for line in lines)
            elif form.quote:
                yield from csv.reader(
                    lines,
                    delimiter=form.delimiter,
                    quotechar=form.quote,
                    escapechar=form.escape or None,
                    doublequote=not form.escape,
                )
            else:
                yield from csv.reader(lines, delimiter=form.delimiter, quoting=csv.QUOTE_NONE)
    except (OSError, ValueError, pa.ArrowException, csv.Error) as error:
        raise UserError(f"{path}: expected text, but {' '.join(str(error).split())}") from error


def as_utf8(path: Path, encoding: str | None, directory: Path) -> tuple[Path, str]:
    """A file in UTF-8 with one kind of line ending: the file itself, or a converted copy.

    Args:
      path: the file.
      encoding: the encoding of the file; None: UTF-16 if it begins with a byte order mark, else UTF-8.
      directory: the directory of a copy.

    Returns:
      The file, and its line ending.

    Raises:
      UserError: it cannot be read, is in another encoding, or cannot be copied.
    """
    is_utf8 = encoding is None or codecs.lookup(encoding).name in ("utf-8", "utf-8-sig")
    ends = {b"\r": 0, b"\n": 0, b"\r\n": 0}
    for number, piece in enumerate(_pieces(path)):
        if number == 0 and encoding is None:
            encoding = "utf-16" if piece.startswith(_UTF16) else "utf-8"
            is_utf8 = encoding == "utf-8"
        if not is_utf8:
            break
        for end in ends:
            ends[end] += piece.count(end)
    alike = is_utf8 and ends[b"\r\n"] in (0, ends[b"\n"])
    if alike:
        return path, "\r\n" if ends[b"\r\n"] else "\n" if ends[b"\n"] or not ends[b"\r"] else "\r"
    copy = directory / f"{len(list(directory.iterdir()))}.csv"
    decoder = codecs.getincrementaldecoder(encoding or "utf-8")
    try:
        # Invalid UTF-8 is reported later, with its line.
        decode = decoder("surrogateescape" if is_utf8 else "strict").decode
        with copy.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
            for piece in _pieces(path):
                file.write(decode(piece).replace("\r\n", "\n").removeprefix("\ufeff"))
            file.write(decode(b"", True))
    except UnicodeError as error:
        raise UserError(f"{path}: expected text in {encoding} (--encoding), but {error}") from error
    except OSError as error:
        raise UserError(f"{path} cannot be copied to {copy.parent} ({error})") from error
    return copy, "\n"


def _pieces(path: Path) -> Iterator[bytes]:
    """The decompressed content; no piece ends within a line ending or a UTF-16 character."""
    try:
        with pa.input_stream(str(path), compression="detect") as source:
            while piece := source.read(_PIECE):
                while piece.endswith(b"\r") or (len(piece) % 2 and piece.startswith(_UTF16)):
                    more = source.read(1)
                    piece += more
                    if not more:
                        break
                yield piece
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path}: expected text, but {' '.join(str(error).split())}") from error


def is_array(path: Path) -> bool:
    """Whether a JSON file is one array; otherwise it has one object per line.

    Raises:
      UserError: the file cannot be read.
    """
    try:
        with pa.input_stream(str(path), compression="detect") as source:
            while (byte := source.read(1)) in (b" ", b"\t", b"\r", b"\n"):
                pass
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path}: expected text, but {' '.join(str(error).split())}") from error
    return byte == b"["
