"""Columns with more about the items of an export, such as titles and genres, from files of the user.

Files are read before the items are known, because finding out the items takes long.
"""

# pyarrow.compute makes its functions at run time.
# pyright: reportAttributeAccessIssue=false

from collections.abc import Mapping
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet

from s2s_jax.data.items.catalogue import item_text
from s2s_jax.data.items.titles import read_titles
from s2s_jax.errors import UserError
from s2s_serve.encoding.arrow import is_list, leaves
from s2s_serve.encoding.ids import is_text
from s2s_serve.items import OWN_COLUMNS
from s2s_serve.storage import file_systems
from s2s_serve.storage.address import Place

TITLE = "title"


class Files(NamedTuple):
    """The contents of files with more about items.

    Attributes:
      titles: the file of titles, and the title of each item by the text of its id; None: no file.
      columns: a Parquet file, and its table, whose first column has ids; None: no file.
    """

    titles: tuple[Place, Mapping[str, str]] | None
    columns: tuple[Place, pa.Table] | None


def read_files(titles: Place | None, columns: Place | None) -> Files:
    """Reads the files.

    Args:
      titles: see `read_titles`.
      columns: a Parquet file whose first column has the ids of items, as in the log.

    Raises:
      UserError: a file cannot be read, has an item twice, or has structs or times that Python cannot
        hold.
    """
    return Files(
        None if titles is None else (titles, read_titles(titles)),
        None if columns is None else (columns, _read_columns(columns)),
    )


def columns_of(files: Files, items: pa.Array) -> dict[str, pa.Array]:
    """Return the columns of the files for each item, null for items that they do not have.

    Args:
      files: the files.
      items: ids as in the log.

    Raises:
      UserError: a file has none of the items.
    """
    found: dict[str, pa.Array] = {}
    if files.titles is not None:
        found[TITLE] = _joined_titles(*files.titles, items)
    if files.columns is not None:
        found |= _joined_columns(*files.columns, items)
    return found


def _joined_titles(path: Place, titles: Mapping[str, str], items: pa.Array) -> pa.Array:
    texts = [item_text(items, index) for index in range(len(items))]
    found = [titles[text] if text in titles else None for text in texts]
    if all(title is None for title in found):
        raise UserError(
            f"--titles: {path}: expected titles of the {len(items):,} items of the catalogue (such as "
            f"{texts[0]}), found none of them; the ids have to be as in the log"
        )
    return pa.array(found, pa.string())


def _read_columns(path: Place) -> pa.Table:
    try:
        with file_systems.opened(path) as source:
            table = pyarrow.parquet.read_table(source)
    except (pa.ArrowException, OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"--item_columns: {path} cannot be read ({reason}); give a Parquet file whose first column "
            f"has the ids of items"
        ) from error
    taken = [name for name in table.column_names[1:] if name in (*OWN_COLUMNS, TITLE)]
    if table.num_columns < 2 or taken:
        found = ", ".join(table.column_names) or "no columns"
        raise UserError(
            f"--item_columns: {path}: expected ids of items and other columns, not called "
            f"{', '.join((*OWN_COLUMNS, TITLE))}, found {found}; rename or add columns"
        )
    ids = _as_text(table.column(0).combine_chunks())
    if pc.count_distinct(ids).as_py() < len(ids):
        raise UserError(
            f"--item_columns: {path}: expected each item once in column {table.column_names[0]}, found "
            f"{len(ids) - pc.count_distinct(ids).as_py():,} more rows; remove them"
        )
    for number, name in enumerate(table.column_names[1:], 1):
        try:
            table = table.set_column(number, name, _plain(table.column(number)))
        except _UnfitError as error:
            raise UserError(f"--item_columns: {path}: column {name}: {error}") from error
    return table


def _joined_columns(path: Place, table: pa.Table, items: pa.Array) -> dict[str, pa.Array]:
    ids = _as_text(table.column(0).combine_chunks())
    place = pc.index_in(_as_text(items), value_set=ids)
    if place.null_count == len(items):
        raise UserError(
            f"--item_columns: {path}: expected rows of the {len(items):,} items of the catalogue (such "
            f"as {item_text(items, 0)}), found none; the first column has to have ids as in the log"
        )
    return {name: table[name].take(place).combine_chunks() for name in table.column_names[1:]}


def check_ids(items: pa.Array, column: str) -> None:
    """Refuses ids of items that are times which Python cannot hold, and so no answer either.

    Args:
      items: ids as in the log.
      column: the column of the log, for messages.

    Raises:
      UserError: a time has parts of a microsecond, or is outside of the years 1 to 9999.
    """
    if not _fits(items):
        wrong = next(i for i in range(len(items)) if not _fits(items.slice(i, 1)))
        raise UserError(
            f"{column}: expected ids of items that are times of the years 1 to 9999 in whole "
            f"microseconds, found {item_text(items, wrong)}; write them as numbers or text in the log"
        )


class _UnfitError(Exception):
    """A column that cannot be exported, with what was expected and found."""


def _plain(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """A column with one type for text, lists and times, as `where` compares and JSON shows them."""
    plain = _plain_type(column.type)
    try:
        found = column if plain == column.type else column.cast(plain)
    except (pa.ArrowException, OverflowError) as error:
        reason = " ".join(str(error).split())[:150]
        raise _UnfitError(f"expected values that fit {plain}, found others ({reason})") from error
    if not all(_fits(leaves(chunk)) for chunk in found.chunks):
        raise _UnfitError("expected times of the years 1 to 9999, found others; leave them out")
    return found


def _plain_type(given: pa.DataType) -> pa.DataType:
    kinds = pa.types
    if kinds.is_dictionary(given):
        return _plain_type(given.value_type)
    if (
        is_list(given)
        or kinds.is_fixed_size_list(given)
        or kinds.is_list_view(given)
        or kinds.is_large_list_view(given)
    ):
        return pa.list_(_plain_type(given.value_type))
    if kinds.is_large_string(given) or kinds.is_string_view(given):
        return pa.string()
    if kinds.is_large_binary(given) or kinds.is_binary_view(given):
        return pa.binary()
    if kinds.is_fixed_size_binary(given):
        return pa.binary()
    if kinds.is_nested(given):
        raise _UnfitError(
            f"expected numbers, text, times, or lists of these, found {str(given)[:80]}; make a column "
            f"of each field"
        )
    in_nanoseconds = {
        pa.time64("ns"): pa.time64("us"),
        pa.duration("ns"): pa.duration("us"),
    }
    if kinds.is_timestamp(given) and given.unit == "ns":
        return pa.timestamp("us", given.tz)
    return in_nanoseconds[given] if given in in_nanoseconds else given


def _fits(values: pa.Array) -> bool:
    """Whether Python can hold these values; True for all but times."""
    if not (pa.types.is_timestamp(values.type) or pa.types.is_date(values.type)):
        return True
    try:
        if pa.types.is_timestamp(values.type):
            values = values.cast(pa.timestamp("us"))
        pc.min_max(values).as_py()
    except (pa.ArrowException, OverflowError, ValueError):
        return False
    return True


def _as_text(ids: pa.Array) -> pa.Array:
    if isinstance(ids, pa.ChunkedArray):
        ids = pa.concat_arrays(ids.chunks)
    if pa.types.is_dictionary(ids.type):
        ids = ids.dictionary_decode()
    if pa.types.is_timestamp(ids.type) and _fits(ids):
        # Units of the file and of the log may differ.
        ids = ids.cast(pa.timestamp("us", ids.type.tz))
    return ids.cast(pa.large_string() if not is_text(ids.type) else pa.large_binary()).cast(
        pa.large_binary()
    )
