"""Counts items over whole logs, stripe by stripe, with their ids in the log and their other features.

Two tallies sum the counts of stripes: one by encoded item and id in the log, the other by encoded item
and the ids of the event's other features. Memory grows with the number of distinct ids of items, not
with the number of events. Arrow groups rows in C++, several times faster than sorting in NumPy.

Shapes: N rows of the log, P positions, E events that have an item, T rows of a tally, I items.
"""

import sys
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from s2s_jax.config import FeatureConfig
from s2s_jax.config.settings import Decoding, Items, Logs
from s2s_jax.data.encoding.held_out import Cut
from s2s_jax.data.encoding.row_decoding import decode_rows
from s2s_jax.data.items.each_stripe import each_stripe
from s2s_jax.data.logs import orc
from s2s_jax.data.logs.index import FileIndex
from s2s_jax.errors import UserError
from s2s_serve.encoding import blocks, features, ids
from s2s_serve.encoding.arrow import is_list
from s2s_serve.encoding.blocks import NO_ID
from s2s_serve.encoding.item_numbers import codes_of as codes_of

# If there are too many combinations of other features, this many are kept per item. Otherwise features
# that differ in each event, such as times, would give as many combinations as events.
_KEPT_COMBINATIONS = 8
_SPARE_COMBINATIONS = 2**20
# Columns of the tally of ids in the log.
_ORIGINAL = ("code", "item")
# Positions in a stripe are below 2^32, so a stripe and a position fit into one number.
_STRIPE_BITS = 32


class ItemCounts(NamedTuple):
    """Items, sorted by code: the encoded id, which is a bucket or a signed 64-bit id.

    Attributes:
      code_I: int64.
      count_I: int64, number of events.
      part_I: int64, number of these events before the second cut.
      item: the id in the log; the first one, if several have the same code.
      others_IC: int32 ids of the other features.
      collisions: number of ids in the log that have the same code as an earlier id.
      shared_events: number of events whose id shares its code with another id, earlier or later.
    """

    code_I: np.ndarray
    count_I: np.ndarray
    part_I: np.ndarray
    item: pa.Array
    others_IC: np.ndarray
    collisions: int
    shared_events: int


class _Stripe(NamedTuple):
    """The tallies of one stripe.

    Attributes:
      originals: a table with the columns `code` (int64), `item`, `count`, `part` (the part of the count
        before the second cut) and `first`, which is smaller for earlier places in the log.
      combinations: the same, with columns `other0` … (int32) instead of `item`.
    """

    originals: pa.Table
    combinations: pa.Table


def count_items(
    items: Items, logs: Logs, index: FileIndex, cut: Cut, part: Cut | None = None
) -> ItemCounts:
    """Counts the items of a log.

    Args:
      items: what an item is, and what it shows; an event must have at most one item.
      logs: how the files are read.
      index: the index of the log's files.
      cut: events before this cut are counted.
      part: a second, earlier cut; events before it are also counted separately. None: the same as `cut`.

    Raises:
      UserError: files disagree on the type of items, a stripe cannot be read and may not be skipped,
        or no event has an item.
    """
    item = items.item
    _check_types(index, item)
    others = _other_names(items)
    originals, combinations = _Tally(_ORIGINAL), _Tally(["code", *others])
    stripes = 0
    count = partial(_count_stripe, items, index, cut=cut, part=part or cut)
    for stripe in each_stripe(index, logs, count, skipped=_report_skipped):
        stripes += 1
        originals.add(stripe.originals)
        combinations.add(stripe.combinations)
        most = _KEPT_COMBINATIONS * originals.rows + _SPARE_COMBINATIONS
        if combinations.rows > most:
            combinations.keep_most_frequent(_KEPT_COMBINATIONS)
    if stripes == 0:
        raise UserError(
            f"io.data_paths: no stripe of {logs.paths} can be read (see the messages above); "
            f"rewrite the files or name others"
        )
    if originals.rows == 0:
        raise UserError(
            f"io.data_paths: no event of {logs.paths} has an item (column "
            f"{item.column_name}); name another loss.item_feature or other files"
        )
    return _assemble(originals.table(), combinations.table(), others)


def _assemble(originals: pa.Table, combinations: pa.Table, others: Sequence[str]) -> ItemCounts:
    code_T, count_T, part_T, first_T = (
        _numpy(originals, name) for name in ("code", "count", "part", "first")
    )
    order_T = np.lexsort((first_T, code_T))
    begins_I = np.flatnonzero(_begins(code_T[order_T]))
    chosen_I = order_T[begins_I]
    combinations = _most_frequent(combinations, 1)
    others_IC = np.empty((len(combinations), len(others)), np.int32)
    for column, name in enumerate(others):
        others_IC[:, column] = _numpy(combinations, name)
    count_I = np.add.reduceat(count_T[order_T], begins_I)
    shared_I = np.diff(np.append(begins_I, len(code_T))) > 1
    return ItemCounts(
        code_T[chosen_I],
        count_I,
        np.add.reduceat(part_T[order_T], begins_I),
        _one_array(originals["item"].take(pa.array(chosen_I))),
        others_IC,
        len(code_T) - len(chosen_I),
        int(count_I[shared_I].sum()),
    )


# ----------------------------------------------------------------------------------- tallies


class _Tally:
    """Sums of counts, and first places, of rows with the same values in some columns."""

    def __init__(self, by: Sequence[str]):
        """Starts with nothing.

        Args:
          by: the columns to group by.
        """
        self._by = list(by)
        self._parts: list[pa.Table] = []

    @property
    def rows(self) -> int:
        """Number of rows held; before `table` is called, equal rows may be held more than once."""
        return sum(len(part) for part in self._parts)

    def add(self, counts: pa.Table) -> None:
        """Adds rows with distinct values of the tally's columns, and `count`, `part` and `first`."""
        self._parts.append(counts)
        # Merges only when at least as many rows are new as are merged already, so that a row is merged
        # only a few times.
        if self.rows > 2 * len(self._parts[0]):
            self.table()

    def table(self) -> pa.Table:
        """Return all rows, with each combination once."""
        if len(self._parts) > 1:
            self._parts = [_group(pa.concat_tables(self._parts), self._by)]
        return self._parts[0]

    def keep_most_frequent(self, kept: int) -> None:
        """Keeps only the `kept` most frequent rows of each code."""
        self._parts = [_most_frequent(self.table(), kept)]


def _group(table: pa.Table, by: Sequence[str]) -> pa.Table:
    # The sums would be the same with threads, but several stripes are already counted at once.
    grouped = table.group_by(list(by), use_threads=False)
    sums = grouped.aggregate([("count", "sum"), ("part", "sum"), ("first", "min")])
    sums = sums.select([*by, "count_sum", "part_sum", "first_min"])
    return sums.rename_columns([*by, "count", "part", "first"])


def _most_frequent(table: pa.Table, kept: int) -> pa.Table:
    """Return the `kept` most frequent rows of each code, sorted by code.

    Among equally frequent rows, those that come first in the log are kept.
    """
    code_T, count_T, first_T = (_numpy(table, name) for name in ("code", "count", "first"))
    order_T = np.lexsort((first_T, -count_T, code_T))
    begins_T = _begins(code_T[order_T])
    rank_T = np.arange(len(order_T))
    rank_T -= np.maximum.accumulate(np.where(begins_T, rank_T, 0))
    return table.take(pa.array(order_T[rank_T < kept]))


def _begins(sorted_T: np.ndarray) -> np.ndarray:
    """Return bool: whether a sorted value differs from the one before it."""
    begins_T = np.ones(len(sorted_T), bool)
    np.not_equal(sorted_T[1:], sorted_T[:-1], out=begins_T[1:])
    return begins_T


def _numpy(table: pa.Table, name: str) -> np.ndarray:
    return table[name].to_numpy()


def _one_array(column: pa.ChunkedArray) -> pa.Array:
    return pa.concat_arrays(column.chunks)


# ----------------------------------------------------------------------------------- reading


def _count_stripe(items: Items, index: FileIndex, stripe: int, cut: Cut, part: Cut) -> _Stripe:
    file, number, first_row = index.stripes[stripe]
    names = [*features.column_names(items.item_side), *cut.column_names, *part.column_names]
    batch = orc.read_stripe(file, number, list(dict.fromkeys(names)))
    block = decode_rows(batch, file, first_row, Decoding.of_whole_rows(items.item_side))
    item = items.item
    code_P = codes_of(block.values_PC[:, features.id_columns(items.item_side)[item.name]])
    counted_P = _counted(block, cut.kept(batch, block.lengths_N, file, first_row))
    part_P = _counted(block, part.kept(batch, block.lengths_N, file, first_row))
    there_P = code_P != NO_ID
    values = _values(batch.column(item.column_name)).filter(pa.array(counted_P[there_P]))
    (events_E,) = np.nonzero(there_P & counted_P)
    columns: dict[str, pa.Array] = {"code": pa.array(code_P[events_E]), "item": values}
    others = _other_names(items)
    others_EC = block.values_PC[events_E][:, _other_columns(items)]
    for i, name in enumerate(others):
        columns[name] = pa.array(np.ascontiguousarray(others_EC[:, i]))
    columns["count"] = pa.array(np.ones(len(events_E), np.int64))
    columns["part"] = pa.array(part_P[events_E].astype(np.int64))
    columns["first"] = pa.array((stripe << _STRIPE_BITS) + events_E)
    events = pa.table(columns)
    return _Stripe(_group(events, _ORIGINAL), _group(events, ["code", *others]))


def _counted(block: blocks.Block, kept_N: np.ndarray) -> np.ndarray:
    """Return bool `[P]`: whether a position is one of the first `kept_N` of its row.

    The block must hold complete rows.
    """
    ends_N = block.begins_N + kept_N
    return np.arange(len(block.values_PC)) < np.repeat(ends_N, block.lengths_N)


def code_words(code_I: np.ndarray, feature: FeatureConfig) -> np.ndarray:
    """Return int32 `[I, id_words]`: the words of `ItemCounts.code_I`."""
    if not feature.grows:
        return code_I.astype(np.int32)[:, None]
    return code_I.astype("<i8").view("<i4").astype(np.int32).reshape(-1, 2)


def _other_columns(items: Items) -> np.ndarray:
    """Return bool: whether a column of a block belongs to another feature than the item."""
    columns = features.id_columns(items.item_side)
    others = np.ones(max(one.stop for one in columns.values()), bool)
    others[columns[items.item.name]] = False
    return others


def _other_names(items: Items) -> list[str]:
    """Return the names of a tally's columns for the ids of other features."""
    return [f"other{i}" for i in range(_other_columns(items).sum())]


def _values(column: pa.Array) -> pa.Array:
    """Return the ids of a column of lists, or of lists of lists, as stored in the log."""
    values = column.flatten()
    if is_list(values.type):
        values = values.flatten()
    return values.drop_null().cast(_stored_type(values.type))


def _stored_type(column_type: pa.DataType) -> pa.DataType:
    """Return the type in which the ids of a column are kept."""
    while is_list(column_type):
        column_type = column_type.value_type
    if pa.types.is_integer(column_type):
        return pa.int64()
    if ids.is_text(column_type):
        binary = pa.types.is_binary(column_type) or pa.types.is_large_binary(column_type)
        return pa.large_binary() if binary else pa.large_string()
    return column_type


def _check_types(index: FileIndex, item: FeatureConfig) -> None:
    first = index.files[0]
    name = item.column_name
    expected = _stored_type(first.schema.field(name).type)
    for file in index.files:
        found = _stored_type(file.schema.field(name).type)
        if found != expected:
            raise UserError(
                f"{file.path}: column {name} holds {found}, expected {expected} as in {first.path}; "
                f"items must have one type in all files, so rewrite one of them"
            )


def _report_skipped(reason: str) -> None:
    print(f"skipped: {reason}", file=sys.stderr, flush=True)
