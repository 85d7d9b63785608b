"""Files of text with a line an event: how they are cut, and what is in their first line."""

import csv
import dataclasses
import io
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa

from s2s_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class CsvFormat:
    """How the lines of a text file are cut.

    Attributes:
      delimiter: between columns.
      quote: around texts that hold delimiters; empty: none.
      columns: names, where the first line does not have them.
    """

    delimiter: str
    quote: str
    columns: tuple[str, ...] | None


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
    raise UserError(f"{path}: expected a line with the names of columns, found an empty file")


def read_rows(path: Path, form: CsvFormat, encoding: str) -> Iterator[list[str]]:
    """The lines of a file, cut.

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
                yield from csv.reader(lines, delimiter=form.delimiter, quotechar=form.quote)
            else:
                yield from csv.reader(lines, delimiter=form.delimiter, quoting=csv.QUOTE_NONE)
    except (OSError, ValueError, pa.ArrowException, csv.Error) as error:
        raise UserError(f"{path}: expected text, but {' '.join(str(error).split())}") from error


def is_array(path: Path) -> bool:
    """Whether JSON is one array; else it is an object a line.

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
