"""How many distinct values a column has, in bounded memory.

Shapes: T values.
"""

import numpy as np
import pyarrow as pa

from s2s_jax.data.encoding import hashing, ids

# Hashes kept: 8 MiB a column. The standard error of an estimate is 1 / sqrt(_KEPT), 0.1%.
_KEPT = 2**20


class DistinctCounter:
    """The distinct values of many arrays, exact below about a million and estimated from there on.

    Keeps the k smallest of the values' 64-bit hashes (k minimum values). Where there are fewer than k,
    their number is exact: no two integers share a hash, and of a million texts two do with a
    probability of 3e-8. Otherwise the hashes lie evenly, so the k-th smallest of n is near
    k / n * 2^64, and (k - 1) / (k-th smallest / 2^64) estimates n without bias.

    Bar-Yossef, Jayram, Kumar, Sivakumar, Trevisan, "Counting distinct elements in a data stream", 2002;
    Beyer, Haas, Reinwald, Sismanis, Gemulla, "On synopses for distinct-value estimation under multiset
    operations", 2007.
    """

    def __init__(self, kept: int = _KEPT):
        """Args: kept is k."""
        self._kept = kept
        # Sorted, each once.
        self._smallest = np.empty(0, np.uint64)
        self._waiting: list[np.ndarray] = []

    def add(self, values: pa.Array) -> None:
        """Counts `values` too, which have no nulls and are `countable`."""
        hashes_T = hashes(values)
        if len(self._smallest) == self._kept:
            hashes_T = hashes_T[hashes_T < self._smallest[-1]]
        self._waiting.append(hashes_T)
        # Merged only when as many wait as are kept, so that a hash is sorted few times.
        if sum(map(len, self._waiting)) > len(self._smallest):
            self._merge()

    def count(self) -> int:
        """The number, an estimate unless `exact`."""
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
        """The number for a reader; three digits of an estimate."""
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
    """Whether values of `data_type` can be told apart by a hash."""
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
    """uint64 `[T]`."""
    data_type = values.type
    if pa.types.is_decimal(data_type):
        values = values.cast(pa.string())
    if ids.is_text(values.type):
        return hashing.hash_strings(values, "murmur")
    if pa.types.is_floating(data_type):
        # One zero and one NaN, each with a single pattern of bits.
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
