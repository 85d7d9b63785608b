"""Statistics of the columns of ORC files, as shown by `s2s inspect`.

Shapes: N rows of a stripe, P positions, T ids.
"""

# pyarrow.compute makes its functions at run time.
# pyright: reportAttributeAccessIssue=false

from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from s2s_jax.data.inspection.distinct import DistinctCounter, countable
from s2s_serve.encoding import ids
from s2s_serve.encoding.arrow import is_list, leaf_type, list_lengths


class ColumnCounts:
    """Counts over one column; `-` where a count makes no sense for the type of the column.

    A row of a list column is missing if it is null or empty. A position is missing if it is null, NaN or
    a bag of only nulls and NaNs, as in training. Lengths are those of rows that are not missing.
    """

    HEADERS = (
        "rows",
        "missing rows",
        "positions a row\n(min/median/mean/max)",
        "missing\npositions",
        "largest\nbag",
        "distinct",
        "smallest",
        "largest",
    )

    def __init__(self, data_type: pa.DataType):
        """Starts without rows, for a column of type `data_type`."""
        self._is_list = is_list(data_type)
        self._rows = self._missing_rows = 0
        self._positions = self._missing_positions = self._largest_bag = 0
        self._lengths: Counter[int] = Counter()
        leaf = leaf_type(data_type)
        self._is_integer = pa.types.is_integer(leaf)
        self._distinct = DistinctCounter() if countable(leaf) else None
        self._smallest: int | None = None
        self._largest: int | None = None

    def add(self, array: pa.Array) -> None:
        """Adds the rows of `array` to the counts."""
        self._rows += len(array)
        values = array
        if self._is_list:
            lengths_N = list_lengths(array)
            self._missing_rows += int((lengths_N == 0).sum())
            found, counts = np.unique(lengths_N[lengths_N > 0], return_counts=True)
            self._lengths.update(dict(zip(found.tolist(), counts.tolist(), strict=True)))
            positions = array.flatten()
            values, bags_P = _open_bags(positions)
            self._positions += len(positions)
            self._missing_positions += int((bags_P == 0).sum())
            self._largest_bag = max(self._largest_bag, int(bags_P.max(initial=0)))
        else:
            self._missing_rows += array.null_count
        values = values.drop_null() if values.null_count else values
        if self._distinct is not None:
            self._distinct.add(values)
        if self._is_integer and len(values):
            ends = pc.min_max(values).as_py()
            known = [n for n in (self._smallest, self._largest) if n is not None]
            self._smallest = min([ends["min"], *known])
            self._largest = max([ends["max"], *known])

    def cells(self) -> list[str]:
        """The counts in the order of `HEADERS`."""
        lengths = missing_positions = largest_bag = "-"
        if self._is_list:
            missing_positions = share(self._missing_positions, self._positions)
            largest_bag = f"{self._largest_bag:,}"
        if self._lengths:
            rows = self._lengths.total()
            mean = sum(length * count for length, count in self._lengths.items()) / rows
            low, high = min(self._lengths), max(self._lengths)
            lengths = f"{low:,} / {halves(median(self._lengths))} / {mean:,.1f} / {high:,}"
        return [
            f"{self._rows:,}",
            share(self._missing_rows, self._rows),
            lengths,
            missing_positions,
            largest_bag,
            "-" if self._distinct is None else str(self._distinct),
            "-" if self._smallest is None else str(self._smallest),
            "-" if self._largest is None else str(self._largest),
        ]


def can_be_feature(data_type: pa.DataType) -> bool:
    """Whether training can read a column of `data_type` with any op."""
    leaf = leaf_type(data_type)
    return is_list(data_type) and (ids.accepted(leaf, "id") or ids.accepted(leaf, "bucketize"))


def share(part: int, whole: int) -> str:
    """The number `part` and, unless it is 0, its share of `whole`."""
    if not part:
        return "0"
    percent = f"{part / whole:.1%}" if part / whole >= 0.001 else "<0.1%"
    return f"{part:,} ({percent})"


def halves(number: float) -> str:
    """A median as text: a whole number or a half."""
    return f"{number:,.1f}".removesuffix(".0")


def median(counts: Counter[int]) -> float:
    """The median of numbers, given how often each occurs."""
    total = counts.total()
    return (_of_rank(counts, (total - 1) // 2) + _of_rank(counts, total // 2)) / 2


def percentile(counts: Counter[int], percent: int) -> int:
    """The smallest number that at least `percent` percent of the numbers do not exceed; percent ≥ 1."""
    return _of_rank(counts, -(-percent * counts.total() // 100) - 1)


def _of_rank(counts: Counter[int], rank: int) -> int:
    """The number at index `rank` of the sorted numbers."""
    numbers = sorted(counts)
    until = np.cumsum([counts[number] for number in numbers])
    return numbers[int(np.searchsorted(until, rank, side="right"))]


def _open_bags(positions: pa.Array) -> tuple[pa.Array, np.ndarray]:
    """All ids, including missing ones, and the number of ids that are not missing at each position."""
    if not is_list(positions.type):
        return positions, _known(positions).astype(np.int64)
    bags_P = list_lengths(positions)
    values = positions.flatten()
    owner_T = np.repeat(np.arange(len(bags_P)), bags_P)
    return values, np.bincount(owner_T[_known(values)], minlength=len(bags_P))


def _known(values: pa.Array) -> np.ndarray:
    """bool `[T]`: neither null nor NaN."""
    if pa.types.is_floating(values.type):
        return ~np.isnan(values.to_numpy(zero_copy_only=False))
    return values.is_valid().to_numpy(zero_copy_only=False)
