"""Reads the titles of items, from CSV, Parquet or MovieLens files."""

import codecs
import csv
import io
import re
from collections import Counter
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.parquet

from s2s_jax.errors import UserError
from s2s_serve.storage import file_systems
from s2s_serve.storage.address import Place

# The first column, quoted or not, and the delimiter after it.
_FIRST_COLUMN = re.compile(r'(?:"(?:[^"]|"")*"|[^",;|\t]*)([,;|\t])')
_FIRST_LINES = 50
_EXPECTED = "expected an item's id and its title in the first two columns"


def read_titles(path: Place) -> dict[str, str]:
    """The title of each item, by the text of the item's id.

    Columns after the second are ignored. A CSV file may begin with a line of column names, since no item
    has such an id. If an item has several titles, the first one is used.

    Args:
      path: `.parquet`, MovieLens' `.dat` (`id::title::genres`), `.tsv`, or any other text file whose
        first column ends with a comma, semicolon, tab or `|`. Text is UTF-8, UTF-16 with a byte order
        mark, or else Windows-1252.

    Raises:
      UserError: the file cannot be read, or a line has fewer than two columns.
    """
    try:
        pairs = _of_parquet(path) if path.suffix == ".parquet" else _of_text(path)
        titles: dict[str, str] = {}
        for item, title in pairs:
            titles.setdefault(item, title)
    except (pa.ArrowException, OSError, ValueError, csv.Error) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"--titles: {path} cannot be read ({reason}); give a CSV or Parquet file of two columns, "
            f"or MovieLens' movies.dat"
        ) from error
    return titles


def _of_parquet(path: Place) -> Iterator[tuple[str, str]]:
    with file_systems.opened(path) as source:
        table = pyarrow.parquet.read_table(source)
    if table.num_columns < 2:
        raise UserError(f"--titles: {path}: {_EXPECTED}, found {table.num_columns} columns")
    for item, title in zip(table[0].to_pylist(), table[1].to_pylist(), strict=True):
        if item is not None and title is not None:
            yield str(item), str(title)


def _of_text(path: Place) -> Iterator[tuple[str, str]]:
    text = _decoded(path.read_bytes())
    delimiter = _delimiter(path, text)
    if delimiter in ("::", "|"):
        # MovieLens does not quote. `splitlines` would also split at characters that do not end lines.
        lines = (line.rstrip("\r").split(delimiter) for line in text.split("\n"))
        rows = enumerate(lines, 1)
    else:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
        rows = ((reader.line_num, row) for row in reader)
    for number, row in rows:
        if row in ([], [""]):
            continue
        if len(row) < 2:
            raise UserError(f"--titles: {path}: line {number}: {_EXPECTED}, found {row[0][:80]!r}")
        yield row[0].strip(), row[1].strip()


def _decoded(raw: bytes) -> str:
    if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return raw.decode("utf-16")
    # MovieLens-100K and 1M are in Latin-1, and Excel's CSV files in its Windows variant.
    for encoding in ("utf-8-sig", "cp1252"):
        try:
            return raw.decode(encoding)
        except UnicodeDecodeError:
            continue
    return raw.decode("latin-1")


def _delimiter(path: Place, text: str) -> str:
    """The character that follows the first column in most of the first lines."""
    if path.suffix == ".dat":
        return "::"
    if path.suffix == ".tsv":
        return "\t"
    first = (_FIRST_COLUMN.match(line) for line in text.split("\n", _FIRST_LINES)[:_FIRST_LINES])
    found = Counter(match[1] for match in first if match)
    return found.most_common(1)[0][0] if found else ","
