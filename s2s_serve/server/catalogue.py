"""The items of a version for the page: found by text, and described with their columns."""

# pyarrow.compute makes its functions at run time.
# pyright: reportAttributeAccessIssue=false

import json
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from s2s_serve.json_values import from_json, to_json
from s2s_serve.server.protocol import Id
from s2s_serve.server.schema import Id as JsonId

# Items that are looked at in one go, so that frequent texts are found in the first ones.
_BLOCK = 100_000
# Names of columns that hold what people call an item, in lower case.
_TITLES = ("title", "name")
# Longest text of a column that is sent.
_LONGEST = 300


class Catalogue:
    """The table of items, the most frequent first."""

    def __init__(self, items: pa.Table) -> None:
        """Keeps the columns that can be shown.

        Args:
          items: the items with their columns.
        """
        self._items = items
        self.columns = tuple(name for name in items.column_names if name != "item")
        self.title = _title_of(items)

    @property
    def item_type(self) -> pa.DataType:
        """The type of ids."""
        return self._items.schema.field("item").type

    def search(self, text: str, limit: int) -> list[dict[str, object]]:
        """The most frequent items whose id begins with a text or whose title contains it.

        Args:
          text: what to look for; upper and lower case are the same. Empty: all items.
          limit: most items.
        """
        found: list[dict[str, object]] = []
        for start in range(0, len(self._items), _BLOCK):
            block = self._items.slice(start, _BLOCK)
            if text:
                block = block.filter(self._matches(block, text))
            found += _shown(block.slice(0, limit - len(found)))
            if len(found) >= limit:
                break
        return found

    def describe(self, items: Sequence[JsonId]) -> list[dict[str, object]]:
        """The columns of some items, in the order of the items; unknown ones are left out."""
        known = [each for item in items if (each := self._id_of(item)) is not None]
        wanted = pa.array(known, self.item_type)
        rows = self._items.filter(pc.is_in(self._items["item"], value_set=wanted))
        described = {row["item"]: row for row in _shown(rows)}
        return [described[item] for item in map(to_json, known) if item in described]

    def _id_of(self, item: JsonId) -> Id | None:
        """An id as in the log; None: the type of ids has no such id."""
        kind = self.item_type
        if isinstance(item, int) != pa.types.is_integer(kind):
            return None
        try:
            found = from_json(item, kind)
            pa.scalar(found, kind)
        except (pa.ArrowException, OverflowError, TypeError, ValueError):
            return None
        return found

    def _matches(self, block: pa.Table, text: str) -> pa.ChunkedArray:
        begin = text
        if pa.types.is_temporal(self.item_type):
            # Times begin as in ISO 8601, and may have their offset, which is UTC.
            begin = text.replace(" ", "T").removesuffix("Z").removesuffix("+00:00")
        found = pc.starts_with(_texts(block["item"]), pattern=begin, ignore_case=True)
        if self.title is not None:
            titles = pc.match_substring(block[self.title], pattern=text, ignore_case=True)
            found = pc.or_(found, pc.fill_null(titles, False))
        return found


def _texts(ids: pa.ChunkedArray) -> pa.ChunkedArray:
    """Ids as text, as in JSON; times with all digits that their type has."""
    kind = ids.type
    if pa.types.is_timestamp(kind):
        return pc.replace_substring(ids.cast(pa.timestamp(kind.unit)).cast(pa.string()), " ", "T")
    try:
        return ids.cast(pa.string())
    except pa.ArrowInvalid:
        # Bytes that are not UTF-8.
        return pa.chunked_array([[to_json(each) for each in ids.to_pylist()]], pa.string())


def _title_of(items: pa.Table) -> str | None:
    """The column that holds titles: by its name, otherwise the first of text; None: there is none."""
    texts = [
        field.name
        for field in items.schema
        if field.name != "item"
        and (pa.types.is_string(field.type) or pa.types.is_large_string(field.type))
    ]
    named = [name for name in texts if name.lower() in _TITLES]
    return next(iter([*named, *texts]), None)


def _shown(rows: pa.Table) -> list[dict[str, object]]:
    # Ids are never cut off, since callers send them back.
    return [
        {name: to_json(value) if name == "item" else _plain(value) for name, value in row.items()}
        for row in rows.to_pylist()
    ]


def _plain(value: object) -> object:
    """A value of a column as JSON can hold it."""
    value = to_json(value)
    if isinstance(value, str):
        return value[:_LONGEST]
    if isinstance(value, list):
        return [_plain(each) for each in value]
    if isinstance(value, float) and not np.isfinite(value):
        return None
    if value is None or isinstance(value, bool | int | float):
        return value
    return json.dumps(value, default=str)[:_LONGEST] if isinstance(value, dict) else str(value)
