"""Converts histories in plain Python to Arrow rows, which are then decoded like rows of a log.

A history is `{feature: entries}`, oldest event first; an entry is an id, a list of ids (a bag) or None.
"""

import bisect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from s2s_serve.encoding import arrow
from s2s_serve.encoding.feature import EventTime, FeatureConfig
from s2s_serve.encoding.features import check_schema, column_names, entry_kinds
from s2s_serve.errors import UserError

History = Mapping[str, Any]
Histories = Sequence[History] | pa.Table

# The Arrow types of the kinds of ids in `features.entry_kinds`; kinds of times are names of types.
_OF_KIND: dict[str, pa.DataType] = {
    "text": pa.string(),
    "whole numbers": pa.int64(),
    **{
        str(kind): kind
        for kind in (
            pa.date32(),
            pa.date64(),
            *(
                pa.timestamp(unit, zone)
                for unit in ("s", "ms", "us", "ns")
                for zone in (None, "UTC")
            ),
        )
    },
}
_BAGS = (list, tuple, np.ndarray, set, frozenset)
_ARROW_ERRORS = (pa.ArrowException, OverflowError, TypeError, ValueError)


class HistorySource(NamedTuple):
    """Histories as a source of rows, see `arrow.Source`.

    Attributes:
      schema: the names and types of the columns.
      path: the name of the source in messages.
      encrypted: always empty.
    """

    schema: pa.Schema
    path: str = "histories"
    encrypted: frozenset[str] = frozenset()


def to_rows(
    histories: Histories,
    features: Sequence[FeatureConfig],
    kinds: Mapping[str, str],
    called: str = "histories",
) -> pa.RecordBatch:
    """One row for each history, with the columns that `features` read.

    Args:
      histories: a list of histories, or a table such as the result of `Log.head`.
      features: the features of the model. A history has their entries by the name of the column or,
        unless a column has that name, of the feature.
      kinds: kinds of the ids in training, see `features.entry_kinds`.
      called: what the histories are called in messages.

    Raises:
      UserError: a feature is missing, or is not a list of ids of the same kind as in the log.
    """
    names = column_names(features)
    if isinstance(histories, pa.Table):
        rows = _rows_of_table(histories, names, features, kinds)
    elif isinstance(histories, Mapping | str) or not isinstance(histories, Iterable):
        raise UserError(
            f"histories: expected a list of histories, found {_kind(histories)}; give [history]"
        )
    else:
        listed = list(histories)
        columns = []
        for name in names:
            readers = [feature for feature in features if feature.column_name == name]
            # A feature's name does not count if it is also the name of a column.
            named = [f.name for f in readers if not isinstance(f, EventTime)]
            keys = [name, *(each for each in named if each not in names)]
            lists = [_entries(history, row, keys) for row, history in enumerate(listed)]
            columns.append(_array(lists, name, _leaf_of(readers, kinds), called))
        rows = pa.record_batch(columns, names)
    _check(HistorySource(rows.schema, called), features, kinds)
    return rows


def _leaf_of(readers: Sequence[FeatureConfig], kinds: Mapping[str, str]) -> pa.DataType | None:
    """The type of the ids of a column that some features read; None: it is not known."""
    wanted = next((kinds[f.name] for f in readers if f.name in kinds), None)
    return _OF_KIND[wanted] if wanted in _OF_KIND else None


def _rows_of_table(
    table: pa.Table,
    names: Sequence[str],
    features: Sequence[FeatureConfig],
    kinds: Mapping[str, str],
) -> pa.RecordBatch:
    for name in names:
        if table.schema.names.count(name) != 1:
            listed = ", ".join(table.schema.names) or "no columns"
            raise UserError(f"histories: expected one column {name}, found {listed}")
    columns = []
    for name in names:
        column = _one_array(table.column(name))
        leaf = _leaf_of([f for f in features if f.column_name == name], kinds)
        wanted = _plain_lists(column.type, pa.int64() if leaf is None else leaf)
        columns.append(column if wanted == column.type else column.cast(wanted))
    return pa.record_batch(columns, names)


def _plain_lists(given: pa.DataType, leaf: pa.DataType) -> pa.DataType:
    """The type of a column whose lists have any length, and whose ids have a type.

    Lists without a single id have no type of ids, as other libraries write them.

    Args:
      given: the type of the column.
      leaf: the type of ids where there are none.
    """
    if pa.types.is_null(given):
        return pa.list_(leaf)
    fixed = pa.types.is_fixed_size_list(given)
    if not fixed and not arrow.is_list(given):
        return given
    inner = given.value_type
    wanted = leaf if pa.types.is_null(inner) else _plain_lists(inner, leaf)
    if not fixed and wanted == inner:
        return given
    return pa.large_list(wanted) if pa.types.is_large_list(given) else pa.list_(wanted)


def _one_array(column: pa.ChunkedArray) -> pa.Array:
    return pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)


def _check(
    given: HistorySource, features: Sequence[FeatureConfig], kinds: Mapping[str, str]
) -> None:
    """Refuses ids that would be encoded differently from those of the log."""
    lists = [f for f in features if arrow.is_list(given.schema.field(f.column_name).type)]
    found = entry_kinds(given, lists)
    for feature in lists:
        name = feature.name
        if name in kinds and found[name] != kinds[name]:
            raise UserError(
                f"{given.path}: {feature.column_name} holds {found[name]}, expected {kinds[name]} as in "
                f"the training log; give the ids as they are stored there"
            )
    check_schema(given, features)


def _entries(history: Any, row: int, keys: Sequence[str]) -> list | None:
    """The entries of a history under one of some names; None: the user has none for this feature.

    Raises:
      UserError: no name is there, the value is not a list, or several names have different values.
    """
    if not isinstance(history, Mapping):
        raise UserError(
            f"histories: row {row} is {_kind(history)}, expected a history such as "
            f"{{'{keys[0]}': [1, 2]}}"
        )
    there = [key for key in keys if key in history]
    if not there:
        listed = ", ".join(map(str, history)) or "nothing"
        raise UserError(
            f"histories: row {row} has no {' or '.join(keys)}, only {listed}; give a list with an entry "
            f"for each event, or [] for a user who lacks this feature"
        )
    if there[0] == keys[0]:
        return _as_list(history[there[0]], row, there[0])
    found = [_as_list(history[key], row, key) for key in there]
    if any(each != found[0] for each in found):
        raise UserError(
            f"histories: row {row}: {' and '.join(there)} differ, though both are made from column "
            f"{keys[0]} of the log; give {keys[0]} instead"
        )
    return found[0]


def _as_list(value: Any, row: int, name: str) -> list | None:
    if value is None:
        return None
    if isinstance(value, np.ndarray):
        # NumPy would convert times in nanoseconds to plain numbers.
        value = value.astype("datetime64[us]") if value.dtype.kind == "M" else value
        return value.tolist()
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable):
        raise UserError(
            f"histories: row {row}: {name} is {_kind(value)}, expected a list with an entry for each "
            f"event, oldest first"
        )
    return list(value)


def _array(lists: list[list | None], name: str, leaf: pa.DataType | None, called: str) -> pa.Array:
    """An array of list<T>, or list<list<T>> if an entry is a list.

    Args:
      lists: the entries of all histories.
      name: name of the column, for messages.
      leaf: the type T, if it cannot be inferred: there are no ids, or they are times of any unit.
      called: what the histories are called in messages.
    """
    # There are few types, and many entries.
    types = {each for entries in lists for each in set(map(type, entries or ()))}
    bags = any(issubclass(each, _BAGS) for each in types)
    if bags:
        lists = [None if e is None else [_as_bag(entry) for entry in e] for e in lists]

    def of(leaf: pa.DataType) -> pa.DataType:
        return pa.list_(pa.list_(leaf)) if bags else pa.list_(leaf)

    def read(rows: int) -> pa.Array:
        try:
            array = pa.array(lists[:rows])
        except OverflowError:
            # For integers of at least 2^63.
            array = pa.array(lists[:rows], of(pa.uint64()))
        found = arrow.leaf_type(array.type)
        if pa.types.is_null(found):
            return pa.array(lists[:rows], of(pa.int64() if leaf is None else leaf))
        if leaf is not None and pa.types.is_temporal(leaf) and pa.types.is_temporal(found):
            return array.cast(of(leaf))
        return array

    try:
        return read(len(lists))
    except _ARROW_ERRORS as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{called}: row {_first_wrong(len(lists), read)}: {name} cannot be read ({reason}); give "
            f"ids of one kind, as stored in the log"
        ) from error


def _first_wrong(rows: int, read: Callable[[int], pa.Array]) -> int:
    """The first row that cannot be read together with those before it."""

    def fails(row: int) -> bool:
        try:
            read(row + 1)
        except _ARROW_ERRORS:
            return True
        return False

    return bisect.bisect_left(range(rows), True, key=fails)


def _is_bag(entry: Any) -> bool:
    return isinstance(entry, _BAGS)


def _as_bag(entry: Any) -> list | None:
    if entry is None:
        return None
    return list(entry) if _is_bag(entry) else [entry]


def _kind(value: Any) -> str:
    return f"{type(value).__name__} {value!r}"[:60]
