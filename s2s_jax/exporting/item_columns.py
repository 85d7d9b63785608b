"""Columns with more about the items of an export, such as titles and genres, from files of the user."""

# pyarrow.compute makes its functions at run time.
# pyright: reportAttributeAccessIssue=false

from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet

from s2s_jax.data.items.catalogue import item_text
from s2s_jax.data.items.titles import read_titles
from s2s_jax.errors import UserError
from s2s_serve.encoding.ids import is_text
from s2s_serve.items import OWN_COLUMNS

TITLE = "title"


def titles_of(path: Path, items: pa.Array) -> pa.Array:
    """Return the title of each item, null for items without one.

    Args:
      path: see `read_titles`.
      items: ids as in the log.

    Raises:
      UserError: the file cannot be read, or has none of the items.
    """
    titles = read_titles(path)
    texts = [item_text(items, index) for index in range(len(items))]
    found = [titles[text] if text in titles else None for text in texts]
    if all(title is None for title in found):
        raise UserError(
            f"--titles: {path}: expected titles of the {len(items):,} items of the catalogue (such as "
            f"{texts[0]}), found none of them; the ids have to be as in the log"
        )
    return pa.array(found, pa.string())


def columns_of(path: Path, items: pa.Array) -> dict[str, pa.Array]:
    """Return the columns of a Parquet file for each item, null for items that it does not have.

    Args:
      path: a Parquet file whose first column has the ids of items, as in the log.
      items: ids as in the log.

    Raises:
      UserError: the file cannot be read, has an item twice, or has none of the items.
    """
    try:
        with pa.OSFile(str(path)) as source:
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
    place = pc.index_in(_as_text(items), value_set=ids)
    if place.null_count == len(items):
        raise UserError(
            f"--item_columns: {path}: expected rows of the {len(items):,} items of the catalogue (such "
            f"as {item_text(items, 0)}), found none; the first column has to have ids as in the log"
        )
    return {name: table[name].combine_chunks().take(place) for name in table.column_names[1:]}


def _as_text(ids: pa.Array) -> pa.Array:
    if isinstance(ids, pa.ChunkedArray):
        ids = pa.concat_arrays(ids.chunks)
    if pa.types.is_dictionary(ids.type):
        ids = ids.dictionary_decode()
    return ids.cast(pa.large_string() if not is_text(ids.type) else pa.large_binary()).cast(
        pa.large_binary()
    )
