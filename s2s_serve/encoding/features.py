"""Arrow columns → ids: select, unpack bags, hash or bucketize, truncate.

Shapes: N rows of a record batch, P positions, T entries, C columns of ids.
"""

# pyarrow.compute creates its functions at import, so type checkers do not see them.
# pyright: reportAttributeAccessIssue=false

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from s2s_serve.encoding import blocks, ids
from s2s_serve.encoding.arrow import Source, is_list
from s2s_serve.encoding.blocks import NO_ID, Block
from s2s_serve.encoding.feature import EventTime, FeatureConfig
from s2s_serve.errors import UserError


def id_columns(features: Sequence[FeatureConfig]) -> dict[str, slice]:
    """The columns of `Block.values_PC` with the ids of each feature, `bag_size * id_words` columns."""
    columns, start = {}, 0
    for feature in features:
        width = feature.bag_size * feature.id_words
        columns[feature.name] = slice(start, start + width)
        start += width
    return columns


def id_width(features: Sequence[FeatureConfig]) -> int:
    """The number of columns of `Block.values_PC`."""
    return sum(feature.bag_size * feature.id_words for feature in features)


def column_names(features: Sequence[FeatureConfig]) -> list[str]:
    """The columns of the files that `features` read, without duplicates."""
    return list(dict.fromkeys(f.column_name for f in features))


def check_schema(file: Source, features: Sequence[FeatureConfig]) -> None:
    """Refuses a file that lacks a column of `features`, or has one that cannot be read.

    Raises:
      UserError: the file is refused; the message names the file and the column.
    """
    names = file.schema.names
    for i, feature in enumerate(features):
        name = feature.column_name
        key = f"features.{i}.{'name' if feature.column is None else 'column'}"
        if isinstance(feature, EventTime):
            key = "model.time_bias.column"
        if name not in names:
            raise UserError(
                f"{file.path}: no column {name} ({key}); it has {_columns_text(file, name)}"
            )
        if names.count(name) > 1:
            raise UserError(
                f"{file.path}: {names.count(name)} columns are called {name} ({key}), expected one; "
                f"rewrite the file with other names"
            )
        if name in file.encrypted:
            raise UserError(
                f"{file.path}: column {name} ({key}) is encrypted and can only be read as its mask; "
                f"rewrite the file without encryption"
            )
        column_type = file.schema.field(name).type
        refused = check_column(column_type, feature, f"features.{i}")
        if refused is not None:
            raise UserError(f"{file.path}: column {name}{refused}")


def entry_kinds(file: Source, features: Sequence[FeatureConfig]) -> dict[str, str]:
    """The kind of the entries from which the ids of each feature are made.

    The same id is encoded differently if its entry is of another kind.

    Args:
      file: a file with the columns of all features.
      features: the features; only those with op id depend on the kind.
    """
    kinds = {}
    for feature in features:
        if feature.op == "id":
            element = _element_type(file.schema.field(feature.column_name).type)
            assert element is not None, "checked with the schema"
            kind = "whole numbers" if pa.types.is_integer(element) else str(element)
            kinds[feature.name] = "text" if ids.is_text(element) else kind
    return kinds


def check_column(column_type: pa.DataType, feature: FeatureConfig, place: str) -> str | None:
    """The problem with a feature's column, worded to follow the column's name; None if it can be read.

    Args:
      column_type: type of the column.
      feature: the feature that reads it.
      place: path of the feature in the configuration, for messages.
    """
    element = _element_type(column_type)
    if element is None or not ids.accepted(element, feature.op):
        expected = {
            "id": "integers, strings or times",
            "bucketize": "numbers",
        }
        what = expected[feature.op] if feature.op in expected else "times"
        why = f"{place}.op is {feature.op}"
        if isinstance(feature, EventTime):
            why = _why_times(feature)
        return f": expected list<T> or list<list<T>> of {what} ({why}), found {column_type}"
    if feature.op == "id" and ids.is_text(element) and feature.hash_type is None:
        return (
            f" holds strings ({column_type}), so {place}.hash_type cannot be None; set it to murmur "
            f"or farm"
        )
    return None


def decode(
    batch: pa.RecordBatch,
    file: Source,
    first_row: int,
    features: Sequence[FeatureConfig],
    keep: Callable[[Block], Block],
) -> Block:
    """Decodes all features of a record batch.

    If an inner list is null or empty, or an id is null, the feature is missing at one position. If an
    outer list is null or empty, it is missing at all positions of the row, which other features count.

    Args:
      batch: rows with the columns of the features.
      file: source of the rows, for messages.
      first_row: number of the first row in the file, for messages.
      features: the features, which say how entries are hashed and bagged.
      keep: chooses the positions to keep, given a block of whole rows whose ids are not decoded yet.

    Returns:
      The kept positions of each row.

    Raises:
      UserError: features of a row disagree in length, a bag has more ids than its `bag_size`, or a text
        is not a time.
    """
    names = column_names(features)
    found = {name: _list_lengths(batch.column(name)) for name in names}
    lengths_N = _common_lengths(found, file, first_row)
    starts_N = blocks.starts(lengths_N)
    columns = id_columns(features)
    values_PC = np.empty((starts_N[-1], id_width(features)), np.int32)
    kept = keep(Block(values_PC, starts_N[:-1], lengths_N))
    where = _Where(file, first_row, starts_N, kept)
    entries = {name: _entries_of(batch.column(name).flatten()) for name in names}
    for feature in features:
        name = feature.column_name
        mine_PK = values_PC[:, columns[feature.name]]
        present_P = None
        if not np.array_equal(found[name], lengths_N):
            # In rows without the column, the feature is missing at all positions.
            present_P = np.repeat(found[name] == lengths_N, lengths_N)
        _fill(mine_PK, entries[name], present_P, feature, where)
        if feature.of_next:
            mine_PK[:-1] = mine_PK[1:]
            mine_PK[starts_N[1:][lengths_N > 0] - 1] = NO_ID
    return kept


class _Where(NamedTuple):
    """The rows of the positions in a record batch, for messages."""

    file: Source
    first_row: int
    starts_N: np.ndarray
    kept: Block

    def row(self, position: int) -> int:
        """The row of a position, as its number in the file."""
        return self.first_row + int(np.searchsorted(self.starts_N, position, side="right")) - 1

    def is_kept(self, positions: np.ndarray) -> np.ndarray:
        """Whether truncation keeps positions."""
        row = np.searchsorted(self.starts_N, positions, side="right") - 1
        after = positions - self.kept.begins_N[row]
        return (after >= 0) & (after < self.kept.lengths_N[row])


class _Entries(NamedTuple):
    """The entries of a column, position after position, without missing ones.

    Attributes:
      values: the entries.
      counts_P: int64, number of entries at each position; None if each position has one.
    """

    values: pa.Array
    counts_P: np.ndarray | None


def _fill(
    ids_PK: np.ndarray,
    entries: _Entries,
    present_P: np.ndarray | None,
    feature: FeatureConfig,
    where: _Where,
) -> None:
    """Writes the ids of a feature.

    Args:
      ids_PK: array to write to.
      entries: entries of the feature's column, for the positions where `present_P`.
      present_P: bool, whether a position's row has the column; None: all rows do.
      feature: the feature, which says how entries become ids.
      where: rows of the positions.
    """
    values, counts_P = entries.values, _all_counts(entries.counts_P, present_P)
    if counts_P is not None:
        _refuse_large_bags(counts_P, feature, where)
        if feature.op == "time_gap":
            values, counts_P = _first_entries(values, counts_P)
    try:
        if feature.op == "time_gap":
            there_P = np.ones(len(ids_PK), bool) if counts_P is None else counts_P > 0
            first_P = np.zeros(len(ids_PK) + 1, bool)
            first_P[where.starts_N[:-1]] = True
            if isinstance(feature, EventTime):
                ids_PK[:, 0] = ids.event_times(values, there_P, where.starts_N, feature)
            else:
                ids_PK[:, 0] = ids.time_gaps(values, there_P, first_P[:-1], feature)
            return
        if feature.grows:
            ids_TW = ids.to_words(values, feature)
        else:
            ids_TW = ids.to_buckets(values, feature)[:, None]
    except ids.StepsBackError as error:
        raise UserError(
            f"{where.file.path}: row {where.row(error.position)}, column {feature.column_name}: "
            f"expected times that never step back (for model.time_bias), found one before an earlier "
            f"one; sort the events of each row by time, oldest first (s2s convert does it)"
        ) from error
    except ids.NotANumberError as error:
        position = error.index
        if counts_P is not None:
            position = int(np.searchsorted(np.cumsum(counts_P), error.index, side="right"))
        raise UserError(
            f"{where.file.path}: row {where.row(position)}, column {feature.column_name}: expected a "
            f"time as a whole number ({_why_times(feature)}), found {error.text}; write times as "
            f"seconds since 1970"
        ) from error
    _write(ids_PK, ids_TW, counts_P, feature)


def _why_times(feature: FeatureConfig) -> str:
    """Why the entries of a column have to be times."""
    timed = isinstance(feature, EventTime)
    return "for model.time_bias" if timed else f"features of op {feature.op}"


def _all_counts(counts_P: np.ndarray | None, present_P: np.ndarray | None) -> np.ndarray | None:
    """int64 `[P]`: the number of entries at each position, present or not; None if each has one.

    Args:
      counts_P: number of entries at each position where `present_P`; None: one.
      present_P: bool, whether a position has the column; None: all have.
    """
    if present_P is None:
        return counts_P
    all_P = np.zeros(len(present_P), np.int64)
    all_P[present_P] = np.ones(present_P.sum(), np.int64) if counts_P is None else counts_P
    return all_P


def _refuse_large_bags(counts_P: np.ndarray, feature: FeatureConfig, where: _Where) -> None:
    """Refuses bags with more ids than `bag_size`, except at positions that truncation drops."""
    (too_full,) = np.nonzero(counts_P > feature.bag_size)
    too_full = too_full[where.is_kept(too_full)]
    if len(too_full):
        position = int(too_full[0])
        if isinstance(feature, EventTime):
            raise UserError(
                f"{where.file.path}: row {where.row(position)}, column {feature.column_name}: expected "
                f"one time for each event (for model.time_bias), found {counts_P[position]}"
            )
        raise UserError(
            f"{where.file.path}: row {where.row(position)}, column {feature.column_name}: a "
            f"position holds {counts_P[position]} ids, expected at most {feature.bag_size}; raise "
            f"the bag_size of feature {feature.name}"
        )


def _first_entries(values: pa.Array, counts_P: np.ndarray) -> tuple[pa.Array, np.ndarray]:
    """The first entry of each position, and the number of these entries at each position, 0 or 1.

    For times, of which only positions that truncation drops may have several.
    """
    there_P = counts_P > 0
    if counts_P.max(initial=0) > 1:
        values = values.take(pa.array(blocks.starts(counts_P)[:-1][there_P]))
    return values, there_P.astype(np.int64)


def _write(
    ids_PK: np.ndarray, ids_TW: np.ndarray, counts_P: np.ndarray | None, feature: FeatureConfig
) -> None:
    """Writes the words of ids to their positions, and `NO_ID` to all other places."""
    words = feature.id_words
    if counts_P is None:
        ids_PK[:, :words] = ids_TW
        ids_PK[:, words:] = NO_ID
        return
    begins_P = blocks.starts(counts_P)[:-1]
    for k in range(feature.bag_size):
        there_P = counts_P > k
        for word in range(words):
            ids_PK[:, k * words + word] = NO_ID
            ids_PK[there_P, k * words + word] = ids_TW[begins_P[there_P] + k, word]


# ------------------------------------------------------------------------------------ columns


def _columns_text(file: Source, name: str) -> str:
    """The names of the columns of a file, and a hint if `name` is inside one of them."""
    names = " ".join(", ".join(file.schema.names).split()) or "no columns"
    for field in file.schema:
        if pa.types.is_struct(field.type) and field.type.get_field_index(name) >= 0:
            # As in Hive's transactional tables.
            return (
                f"{names}, and {name} inside struct {field.name}, where it cannot be read; write it as "
                f"a column of its own"
            )
    return names


def _element_type(column_type: pa.DataType) -> pa.DataType | None:
    """The type T of list<T> or list<list<T>>; None for other types."""
    if not is_list(column_type):
        return None
    inner = column_type.value_type
    return inner.value_type if is_list(inner) else inner


def _list_lengths(lists: pa.Array) -> np.ndarray:
    """The length of each list, int64; 0 for null."""
    lengths = pc.list_value_length(lists)
    if lengths.null_count:
        lengths = pc.fill_null(lengths, 0)
    return lengths.to_numpy(zero_copy_only=False).astype(np.int64, copy=False)


def _common_lengths(lengths: Mapping[str, np.ndarray], file: Source, first_row: int) -> np.ndarray:
    """Positions of each row: the common length of all its columns that are not missing."""
    longest_N = np.maximum.reduce(list(lengths.values()))
    for name, lengths_N in lengths.items():
        wrong_N = (lengths_N != longest_N) & (lengths_N != 0)
        if wrong_N.any():
            row = int(np.argmax(wrong_N))
            other = next(n for n, found in lengths.items() if found[row] == longest_N[row])
            raise UserError(
                f"{file.path}: row {first_row + row}: features disagree in length: {other} has "
                f"{longest_N[row]} positions, {name} has {lengths_N[row]}; every feature of a row "
                f"needs one entry (it may be empty) per position"
            )
    return longest_N


def _entries_of(positions: pa.Array) -> _Entries:
    """The entries of a column, from its flattened bags, without missing ones."""
    counts_P = None
    values = positions
    if is_list(positions.type):
        # Usually there are no nulls and each list has one entry; then counts are not needed.
        lengths = pc.list_value_length(positions)
        ends = pc.min_max(lengths).as_py()
        if lengths.null_count or (ends["min"], ends["max"]) not in ((1, 1), (None, None)):
            counts_P = _list_lengths(positions)
        values = positions.flatten()
    known_T = None
    if pa.types.is_floating(values.type):
        known_T = ~np.isnan(values.to_numpy(zero_copy_only=False))
    elif values.null_count:
        known_T = values.is_valid().to_numpy(zero_copy_only=False)
    if known_T is None or known_T.all():
        return _Entries(values, counts_P)
    if counts_P is None:
        return _Entries(values.filter(pa.array(known_T)), known_T.astype(np.int64))
    owner_T = np.repeat(np.arange(len(counts_P)), counts_P)
    counts_P = np.bincount(owner_T[known_T], minlength=len(counts_P)).astype(np.int64)
    return _Entries(values.filter(pa.array(known_T)), counts_P)
