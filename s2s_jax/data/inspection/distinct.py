"""Counts the distinct values of a column in bounded memory.

Shapes: T values.
"""

import numpy as np
import pyarrow as pa

from s2s_serve.encoding import hashing, ids

# Hashes kept: 8 MiB per column. The standard error of an estimate is 1 / sqrt(_KEPT) = 0.1%.
_KEPT = 2**20


class DistinctCounter:
    """Counts the distinct values of many arrays: exactly up to about a million, then estimated.

    Keeps the k smallest 64-bit hashes of the values (k minimum values). With fewer than k hashes, the
    count is exact: no two integers share a hash, and among a million texts any two do with a probability
    of 3e-8. With more, hashes are evenly distributed, so the k-th smallest of n is near k / n * 2^64,
    and (k - 1) / (k-th smallest / 2^64) is an unbiased estimate of n.

    Bar-Yossef, Jayram, Kumar, Sivakumar, Trevisan, "Counting distinct elements in a data stream", 2002;
    Beyer, Haas, Reinwald, Sismanis, Gemulla, "On synopses for distinct-value estimation under multiset
    operations", 2007.
    """

    def __init__(self, kept: int = _KEPT):
        """Starts without values; `kept` is k."""
        self._kept = kept
        # Sorted, without duplicates.
        self._smallest = np.empty(0, np.uint64)
        self._waiting: list[np.ndarray] = []

    def add(self, values: pa.Array) -> None:
        """Adds values, which must have no nulls and be `countable`."""
        hashes_T = hashes(values)
        if len(self._smallest) == self._kept:
            hashes_T = hashes_T[hashes_T < self._smallest[-1]]
        self._waiting.append(hashes_T)
        # Merged only when as many wait as are kept, so that each hash is sorted only a few times.
        if sum(map(len, self._waiting)) > len(self._smallest):
            self._merge()

    def count(self) -> int:
        """The number of distinct values; an estimate unless `exact`."""
        self._merge()
        if self.exact:
            return len(self._smallest)
        return round((self._kept - 1) * 2**64 / int(self._smallest[-1]))

    @property
    def exact(self) -> bool:
        """Whether `count` is exact."""
        self._merge()
        return len(self._smallest) < self._kept

    def __str__(self) -> str:
        """The number as text; an estimate is rounded to three digits."""
        count = self.count()
        if self.exact:
            return f"{count:,}"
        return f"about {round(count, 3 - len(str(count))):,}"

    def _merge(self) -> None:
        if self._waiting:
            # np.unique is several times slower than a sort.
            hashes = np.concatenate([self._smallest, *self._waiting])
            hashes.sort()
            first = np.ones(len(hashes), bool)
            np.not_equal(hashes[1:], hashes[:-1], out=first[1:])
            self._smallest = hashes[first][: self._kept].copy()
            self._waiting = []


def countable(data_type: pa.DataType) -> bool:
    """Whether distinct values of `data_type` can be counted by their hashes."""
    return (
        ids.is_text(data_type)
        or pa.types.is_integer(data_type)
        or pa.types.is_floating(data_type)
        or pa.types.is_boolean(data_type)
        or pa.types.is_decimal(data_type)
        or pa.types.is_timestamp(data_type)
        or pa.types.is_date32(data_type)
    )


def hashes(values: pa.Array) -> np.ndarray:
    """The 64-bit hashes of values, uint64 `[T]`."""
    data_type = values.type
    if pa.types.is_decimal(data_type):
        values = values.cast(pa.string())
    if ids.is_text(values.type):
        return hashing.hash_strings(values, "murmur")
    if pa.types.is_floating(data_type):
        # Gives 0 and -0 the same bits, and likewise all NaNs.
        numbers_T = values.cast(pa.float64()).to_numpy(zero_copy_only=False) + 0.0
        numbers_T[np.isnan(numbers_T)] = np.nan
        return hashing.hash_integers(numbers_T.view(np.int64), "murmur")
    if pa.types.is_boolean(data_type):
        values = values.cast(pa.int8())
    if pa.types.is_date32(data_type):
        values = values.cast(pa.int32())
    unsigned = pa.types.is_unsigned_integer(data_type)
    values = values.cast(pa.uint64() if unsigned else pa.int64())
    return hashing.hash_integers(values.to_numpy(zero_copy_only=False), "murmur")
