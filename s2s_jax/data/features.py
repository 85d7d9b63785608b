"""Arrow columns → ragged ids → fixed `[B, L, K]` arrays: select, truncate, hash, bag, pad.

Shapes: N rows of a record batch, P positions, T ids; B rows of a batch, L positions, K ids of a bag.
"""

# pyarrow.compute makes its functions when it is imported, unseen by type checkers.
# pyright: reportAttributeAccessIssue=false

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from s2s_jax.config import Config, FeatureConfig
from s2s_jax.data import hashing
from s2s_jax.data.orc import OrcFile
from s2s_jax.errors import UserError

# Marks a place of a padded array that holds no id.
NO_ID = -1


class Bags(NamedTuple):
    """One feature of some rows, ragged: rows of positions, positions of ids.

    Attributes:
      ids_T: int32 buckets of all ids.
      starts_P: int64; the ids of position p are `ids_T[starts_P[p] : starts_P[p + 1]]`. Has one
        element more than there are positions.
    """

    ids_T: np.ndarray
    starts_P: np.ndarray


@dataclasses.dataclass(frozen=True)
class Rows:
    """Decoded rows: truncated, hashed, ragged.

    Attributes:
      features: the bags of each feature; all features have the same positions.
      starts_N: int64; the positions of row n are `starts_N[n] … starts_N[n + 1]`. Has one element
        more than there are rows.
    """

    features: Mapping[str, Bags]
    starts_N: np.ndarray


def check_schema(file: OrcFile, features: Sequence[FeatureConfig]) -> None:
    """Refuses a file that lacks a column of `features` or has it in a type that cannot be read.

    Raises:
      UserError: naming file and column.
    """
    for i, feature in enumerate(features):
        if feature.name not in file.schema.names:
            raise UserError(
                f"{file.path}: no column {feature.name} (features.{i}.name); it has "
                f"{', '.join(file.schema.names) or 'no columns'}"
            )
        column_type = file.schema.field(feature.name).type
        element = _element_type(column_type)
        is_text = element is not None and _is_text(element)
        if element is None or not (is_text or pa.types.is_integer(element)):
            raise UserError(
                f"{file.path}: column {feature.name}: expected list<T> or list<list<T>> of integers "
                f"or strings, found {column_type}"
            )
        if is_text and feature.hash_type is None:
            raise UserError(
                f"{file.path}: column {feature.name} holds strings ({column_type}), so "
                f"features.{i}.hash_type cannot be None; set it to murmur or farm"
            )


def decode(batch: pa.RecordBatch, file: OrcFile, first_row: int, config: Config) -> Rows:
    """Decodes all features of a record batch.

    A null or empty list means that a feature is missing: at one position if it is an inner list or
    a null id, or at all positions of the row if it is the whole list while other features have some.

    Args:
      batch: rows with the columns of `config.features`.
      file: where they come from, for messages.
      first_row: number of their first row in the file, for messages.
      config: says how features are truncated, hashed and bagged.

    Raises:
      UserError: features of a row disagree in length, a row is longer than seq_len although
        `io.check_length` forbids it, or a bag is fuller than its `bag_size`.
    """
    columns = {f.name: batch.column(f.name) for f in config.features}
    lengths = {name: _list_lengths(column) for name, column in columns.items()}
    lengths_N = _common_lengths(lengths, file, first_row)
    seq_len = config.model.seq_len
    if config.io.check_length and lengths_N.max(initial=0) > seq_len:
        row = int(np.argmax(lengths_N > seq_len))
        raise UserError(
            f"{file.path}: row {first_row + row} has {lengths_N[row]} positions, expected at most "
            f"{seq_len} (model.seq_len); unset io.check_length to truncate"
        )
    kept_N = np.minimum(lengths_N, seq_len)
    features = {}
    for feature in config.features:
        positions = _positions(
            columns[feature.name], lengths[feature.name], lengths_N, kept_N, config
        )
        bags, too_full = _bags(positions, feature)
        if too_full is not None:
            position, found = too_full
            row = int(np.searchsorted(_starts(kept_N), position, side="right")) - 1
            raise UserError(
                f"{file.path}: row {first_row + row}, column {feature.name}: a position holds {found} "
                f"ids, expected at most {feature.bag_size}; raise the feature's bag_size"
            )
        features[feature.name] = bags
    return Rows(features, _starts(kept_N))


def concatenate(parts: Sequence[Rows]) -> Rows:
    """The rows of `parts`, one after the other."""
    features = {}
    for name in parts[0].features:
        bags = [part.features[name] for part in parts]
        features[name] = Bags(
            np.concatenate([b.ids_T for b in bags]), _join_starts([b.starts_P for b in bags])
        )
    return Rows(features, _join_starts([part.starts_N for part in parts]))


def densify(
    rows: Rows, chosen_B: np.ndarray, batch_rows: int, config: Config
) -> dict[str, np.ndarray]:
    """Pads some rows to fixed shapes.

    Args:
      rows: decoded rows.
      chosen_B: int indices of the rows to take, in order; at most `batch_rows`.
      batch_rows: B; rows beyond those chosen are padding of length 0.
      config: gives `model.seq_len` (L) and each feature's `bag_size` (K).

    Returns:
      `length`: int32 `[B]`, real positions of each row; and for each feature `ids/<name>`: int32
      `[B, L, K]` buckets, `NO_ID` where there is none. Ids of a position come first, positions of
      a row come first.
    """
    length_B = np.zeros(batch_rows, np.int32)
    length_B[: len(chosen_B)] = rows.starts_N[chosen_B + 1] - rows.starts_N[chosen_B]
    real = length_B[: len(chosen_B)].astype(np.int64)
    row = np.repeat(np.arange(len(chosen_B)), real)
    column = _ragged_arange(np.zeros_like(real), real)
    position = column + np.repeat(rows.starts_N[chosen_B], real)
    batch: dict[str, np.ndarray] = {"length": length_B}
    for feature in config.features:
        bags = rows.features[feature.name]
        ids_BLK = np.full((batch_rows, config.model.seq_len, feature.bag_size), NO_ID, np.int32)
        start, stop = bags.starts_P[position], bags.starts_P[position + 1]
        for k in range(feature.bag_size):
            there = stop - start > k
            ids_BLK[row[there], column[there], k] = bags.ids_T[start[there] + k]
        batch[f"ids/{feature.name}"] = ids_BLK
    return batch


# ------------------------------------------------------------------------------------ columns


def _element_type(column_type: pa.DataType) -> pa.DataType | None:
    """T of list<T> or list<list<T>>, None for other types."""
    if not _is_list(column_type):
        return None
    inner = column_type.value_type
    return inner.value_type if _is_list(inner) else inner


def _is_list(data_type: pa.DataType) -> bool:
    return pa.types.is_list(data_type) or pa.types.is_large_list(data_type)


def _is_text(data_type: pa.DataType) -> bool:
    return (
        pa.types.is_string(data_type)
        or pa.types.is_large_string(data_type)
        or pa.types.is_binary(data_type)
        or pa.types.is_large_binary(data_type)
    )


def _list_lengths(lists: pa.Array) -> np.ndarray:
    """int64 length of each list, 0 for null."""
    lengths = pc.fill_null(pc.list_value_length(lists), 0)
    return lengths.to_numpy(zero_copy_only=False).astype(np.int64)


def _common_lengths(lengths: Mapping[str, np.ndarray], file: OrcFile, first_row: int) -> np.ndarray:
    """Positions of each row: what all its features that are not missing agree on."""
    longest_N = np.maximum.reduce(list(lengths.values()))
    for name, lengths_N in lengths.items():
        wrong_N = (lengths_N != longest_N) & (lengths_N != 0)
        if wrong_N.any():
            row = int(np.argmax(wrong_N))
            other = next(n for n, found in lengths.items() if found[row] == longest_N[row])
            raise UserError(
                f"{file.path}: row {first_row + row}: features disagree in length: {other} has "
                f"{longest_N[row]} positions, {name} has {lengths_N[row]}; every feature of a row "
                f"needs one entry (it may be empty) a position"
            )
    return longest_N


def _positions(
    column: pa.Array,
    found_N: np.ndarray,
    lengths_N: np.ndarray,
    kept_N: np.ndarray,
    config: Config,
) -> pa.Array:
    """The kept positions of all rows, flat: an array of ids or of lists of ids."""
    flat = column.flatten()
    if np.array_equal(found_N, kept_N):
        return flat
    dropped_N = lengths_N - kept_N if config.io.truncate_side == "left" else np.zeros_like(kept_N)
    begin_N = _starts(found_N)[:-1] + dropped_N
    index = _ragged_arange(begin_N, kept_N)
    missing = np.repeat((found_N == 0) & (kept_N > 0), kept_N)
    return flat.take(pa.array(index, mask=missing if missing.any() else None))


def _bags(positions: pa.Array, feature: FeatureConfig) -> tuple[Bags, tuple[int, int] | None]:
    """Ids of each position, and (position, ids) of the first bag that is too full."""
    if _is_list(positions.type):
        bag_P = _list_lengths(positions)
        values = positions.flatten()
        if values.null_count:
            owner = np.repeat(np.arange(len(bag_P)), bag_P)
            valid = values.is_valid().to_numpy(zero_copy_only=False)
            bag_P = np.bincount(owner[valid], minlength=len(bag_P)).astype(np.int64)
            values = values.drop_null()
    else:
        bag_P = positions.is_valid().to_numpy(zero_copy_only=False).astype(np.int64)
        values = positions.drop_null()
    too_full = None
    if bag_P.max(initial=0) > feature.bag_size:
        position = int(np.argmax(bag_P > feature.bag_size))
        too_full = position, int(bag_P[position])
    return Bags(_bucketize(values, feature), _starts(bag_P)), too_full


def _bucketize(values: pa.Array, feature: FeatureConfig) -> np.ndarray:
    if _is_text(values.type):
        assert feature.hash_type is not None, "checked with the schema"
        ids_T = hashing.hash_strings(values, feature.hash_type)
    else:
        if pa.types.is_unsigned_integer(values.type):
            ids_T = values.to_numpy(zero_copy_only=False).astype(np.uint64)
        else:
            ids_T = values.to_numpy(zero_copy_only=False).astype(np.int64)
        if feature.hash_type is not None:
            ids_T = hashing.hash_integers(ids_T, feature.hash_type)
    return hashing.to_buckets(ids_T, feature.hash_bucket_size)


# ------------------------------------------------------------------------------------- ragged


def _starts(lengths: np.ndarray) -> np.ndarray:
    """`[0, l0, l0 + l1, …]`, int64."""
    starts = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=starts[1:])
    return starts


def _join_starts(parts: Sequence[np.ndarray]) -> np.ndarray:
    return _starts(np.concatenate([np.diff(part) for part in parts]))


def _ragged_arange(begins: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """`begins[0] … begins[0] + lengths[0] - 1, begins[1] …`, int64."""
    starts = _starts(lengths)
    return np.arange(starts[-1]) + np.repeat(begins - starts[:-1], lengths)
