"""Entries of a column → buckets or 64-bit ids, according to the feature's `op`.

Shapes: N rows, P positions, S positions with a time at or before them, T entries.
"""

import numpy as np
import pyarrow as pa

from s2s_serve.encoding import hashing
from s2s_serve.encoding.blocks import NO_ID
from s2s_serve.encoding.feature import EventTime as EventTime
from s2s_serve.encoding.feature import FeatureConfig

_PER_SECOND = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}
_DAY = 86_400
_MOST_SECONDS = 2**31 - 1
# The only 64-bit id whose two words equal `NO_ID`, and a random id that replaces it.
_RESERVED = np.uint64(2**64 - 1)
_REPLACEMENT = np.uint64(0xD6E8FEB86659FD93)
# 1 January 1970 was a Thursday; weeks begin on Monday.
_WEEKDAY_OF_DAY_0 = 3


class NotANumberError(ValueError):
    """A text is not a whole number.

    Attributes:
      index: index of the first such entry.
      text: the entry.
    """

    def __init__(self, index: int, text: str):
        """Takes the index and the text of the first such entry."""
        super().__init__(text)
        self.index = index
        self.text = text


class StepsBackError(ValueError):
    """Times of a row are not in order.

    Attributes:
      position: the first position whose time is before that of an earlier event of its row.
    """

    def __init__(self, position: int):
        """Takes the position."""
        super().__init__(f"the time of position {position} steps back")
        self.position = position


def is_text(data_type: pa.DataType) -> bool:
    """Whether the type is strings or bytes, or a dictionary of these."""
    if pa.types.is_dictionary(data_type):
        return is_text(data_type.value_type)
    return (
        pa.types.is_string(data_type)
        or pa.types.is_large_string(data_type)
        or pa.types.is_binary(data_type)
        or pa.types.is_large_binary(data_type)
    )


def accepted(data_type: pa.DataType, op: str) -> bool:
    """Whether `op` can be applied to entries of `data_type`."""
    if op == "bucketize":
        return pa.types.is_integer(data_type) or pa.types.is_floating(data_type)
    time = pa.types.is_timestamp(data_type) or pa.types.is_date(data_type)
    return pa.types.is_integer(data_type) or is_text(data_type) or time


def to_buckets(values: pa.Array, feature: FeatureConfig) -> np.ndarray:
    """The bucket of each entry, for every op except time_gap.

    Args:
      values: entries of an `accepted` type, without nulls and, for bucketize, without NaN.
      feature: the feature, with its op and settings.

    Returns:
      int32 `[T]` in `[0, hash_bucket_size)`.

    Raises:
      NotANumberError: the op needs times, and a text is not a time.

    Examples:
      >>> hours = FeatureConfig(name="hour", op="hour_of_day", utc_offset_hours=2, hash_bucket_size=24)
      >>> to_buckets(pa.array([0, 82_800]), hours).tolist()
      [2, 1]
    """
    if feature.op == "bucketize":
        numbers_T = values.to_numpy(zero_copy_only=False)
        limits = np.asarray(feature.boundaries, np.float64)
        return np.searchsorted(limits, numbers_T.astype(np.float64), side="right").astype(np.int32)
    if feature.op in ("hour_of_day", "day_of_week"):
        times_T, per_second = times(values, feature)
        local_T = times_T // per_second + round(3600 * feature.utc_offset_hours)
        if feature.op == "hour_of_day":
            return (local_T % _DAY // 3600).astype(np.int32)
        return ((local_T // _DAY + _WEEKDAY_OF_DAY_0) % 7).astype(np.int32)
    assert feature.op == "id", "a time gap needs the entry before"
    return hashing.to_buckets(_hashed(values, feature), feature.hash_bucket_size)


def to_words(values: pa.Array, feature: FeatureConfig) -> np.ndarray:
    """64-bit ids for growing tables: the entries themselves, or 63 bits of their hashes.

    Args:
      values: entries of an `accepted` type, without nulls.
      feature: the feature, with its hash function.

    Returns:
      int32 `[T, 2]`, the low and the high word of each id; never both `NO_ID`.
    """
    ids_T = _hashed(values, feature)
    if feature.hash_type is not None:
        ids_T = hashing.to_positive_ids(ids_T)
    ids_T = without_reserved(ids_T.view(np.uint64))
    return np.ascontiguousarray(ids_T).astype("<u8", copy=False).view("<i4").reshape(-1, 2)


def without_reserved(ids_T: np.ndarray) -> np.ndarray:
    """uint64 `[T]` ids, with another one instead of the one that means no id (-1)."""
    reserved_T = ids_T == _RESERVED
    return np.where(reserved_T, _REPLACEMENT, ids_T) if reserved_T.any() else ids_T


def _hashed(values: pa.Array, feature: FeatureConfig) -> np.ndarray:
    """Entries, or hashes of entries, as int64 or uint64."""
    if is_text(values.type) and feature.hash_type is not None:
        ids_T = hashing.hash_strings(values, feature.hash_type)
    else:
        # Text of ids is always hashed (see `features.check_column`); text of times is parsed.
        values = _parse(values) if is_text(values.type) else values
        ids_T = integers(values)
        if feature.hash_type is not None:
            ids_T = hashing.hash_integers(ids_T, feature.hash_type)
    return ids_T


def time_gaps(
    values: pa.Array, there_P: np.ndarray, first_P: np.ndarray, feature: FeatureConfig
) -> np.ndarray:
    """The bucket of the time between each position and the one before it.

    Args:
      values: times of the positions where `there_P`, without nulls.
      there_P: bool, whether a position has a time.
      first_P: bool, whether a position is the first of its row.
      feature: the feature, with its unit and number of buckets.

    Returns:
      int32 `[P]`: `NO_ID` without a time, 0 without a previous time, 1 for less than a second (or a step
      back), else 2 + floor(log2(whole seconds)), at most `hash_bucket_size - 1`.

    Raises:
      NotANumberError: a text is not a time.

    Examples:
      >>> gap = FeatureConfig(name="gap", op="time_gap", hash_bucket_size=32)
      >>> there, first = np.array([True] * 4), np.array([True, False, False, True])
      >>> time_gaps(pa.array([100, 101, 109, 50]), there, first, gap).tolist()
      [0, 2, 5, 0]
    """
    times_T, per_second = times(values, feature)
    times_P = np.zeros(len(there_P), np.int64)
    times_P[there_P] = times_T
    gaps_P = np.zeros(len(there_P), np.int64)
    gaps_P[1:] = (times_P[1:] - times_P[:-1]) // per_second
    # Keeps only the highest bit, which a float represents exactly.
    for shift in (1, 2, 4, 8, 16, 32):
        gaps_P |= gaps_P >> shift
    buckets_P = np.frexp((gaps_P ^ (gaps_P >> 1)).astype(np.float64))[1] + 1
    buckets_P[gaps_P < 1] = 1
    before_P = np.zeros(len(there_P), bool)
    before_P[1:] = there_P[:-1]
    buckets_P[first_P | ~before_P] = 0
    buckets_P = np.minimum(buckets_P, feature.hash_bucket_size - 1).astype(np.int32)
    buckets_P[~there_P] = NO_ID
    return buckets_P


def event_times(
    values: pa.Array, there_P: np.ndarray, starts_N: np.ndarray, feature: FeatureConfig
) -> np.ndarray:
    """The time of each event, in seconds since the first known time of its row.

    Differences do not depend on where a row begins, so a part of a history has the same gaps. In a row
    of more than 2^31 - 1 seconds, seconds count back from the last known time instead, so that a first
    event in 1900 does not change the gaps of later ones.

    Args:
      values: times of the positions where `there_P`, without nulls.
      there_P: bool, whether a position has a time.
      starts_N: int64 `[N + 1]`, where rows begin, and the end of the last one.
      feature: the feature, with its unit.

    Returns:
      int32 `[P]`, from 0 to 2^31 - 1. An event without a time has that of the event before it, or 0.

    Raises:
      NotANumberError: a text is not a time.
      StepsBackError: a time is before an earlier one of its row.

    Examples:
      >>> there, starts = np.array([True, False, True, False, True]), np.array([0, 3, 5])
      >>> event_times(pa.array([100, 160, 50]), there, starts, EventTime(column="t")).tolist()
      [0, 0, 60, 0, 0]
    """
    times_T, per_second = times(values, feature)
    row_P = np.repeat(np.arange(len(starts_N) - 1), np.diff(starts_N))
    row_T = row_P[there_P]
    (back,) = np.nonzero((times_T[1:] < times_T[:-1]) & (row_T[1:] == row_T[:-1]))
    if len(back):
        raise StepsBackError(int(np.flatnonzero(there_P)[back[0] + 1]))
    known_P = np.cumsum(there_P)
    bounds_N = np.append(0, known_P)[starts_N]
    first_P = bounds_N[:-1][row_P]
    some_P = known_P > first_P
    first_S, last_S = first_P[some_P], bounds_N[1:][row_P[some_P]] - 1
    # Differences of int64 fit uint64.
    seconds_T = (times_T // per_second).view(np.uint64)
    since_S = seconds_T[known_P[some_P] - 1] - seconds_T[first_S]
    whole_S = seconds_T[last_S] - seconds_T[first_S]
    too_long_S = whole_S - np.minimum(whole_S, _MOST_SECONDS)
    seconds_P = np.zeros(len(there_P), np.int32)
    seconds_P[some_P] = since_S - np.minimum(since_S, too_long_S)
    return seconds_P


def integers(values: pa.Array) -> np.ndarray:
    """Integers, or times in the unit of their type, as int64 or uint64 arrays."""
    if not pa.types.is_integer(values.type):
        values = values.cast(pa.int32()) if pa.types.is_date32(values.type) else values
        values = values.cast(pa.int64())
    numbers_T = values.to_numpy(zero_copy_only=False)
    unsigned = pa.types.is_unsigned_integer(values.type)
    return numbers_T.astype(np.uint64 if unsigned else np.int64, copy=False)


def times(values: pa.Array, feature: FeatureConfig) -> tuple[np.ndarray, int]:
    """Times since 1970 as int64, and the number of their units per second.

    Args:
      values: entries of a type that `accepted` allows for times, without nulls.
      feature: the feature, with the unit of numbers and texts.

    Raises:
      NotANumberError: a text is not a time.
    """
    if pa.types.is_date(values.type):
        values = values.cast(pa.date32()).cast(pa.int32()).cast(pa.int64())
        return values.to_numpy(zero_copy_only=False) * _DAY, 1
    if pa.types.is_timestamp(values.type):
        return integers(values), _PER_SECOND[values.type.unit]
    if is_text(values.type):
        values = _parse(values)
    return integers(values).view(np.int64), _PER_SECOND[feature.time_unit]


def _parse(values: pa.Array) -> pa.Array:
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    try:
        return values.cast(pa.string()).cast(pa.int64())
    except pa.ArrowInvalid:
        for index in range(len(values)):
            try:
                values[index : index + 1].cast(pa.string()).cast(pa.int64())
            except pa.ArrowInvalid as error:
                raise NotANumberError(index, repr(values[index].as_py())) from error
        raise
