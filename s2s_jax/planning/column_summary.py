"""Counts the ids of a column, and whether the item of an event determines them.

Shapes: N rows of a stripe, P positions, T ids, U distinct hashes, G distinct items.
"""

import dataclasses
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from s2s_jax.data.inspection.distinct import hashes
from s2s_jax.data.inspection.hash_tally import HashTally
from s2s_serve.encoding import arrow, ids

# Distinct hashes that a tally holds: 12 MiB. With more, it estimates to about 0.2%.
_MOST = 2**19
# An odd number that spreads hashes of items, so that those of items and entries can be added.
_SPREAD = np.uint64(0x9E3779B97F4A7C15)
# An item determines a column if events differ from the most frequent entry of their item so much less
# often than from the most frequent entry of all. By chance, the ratio is at least a half.
_DETERMINED = 0.1


@dataclasses.dataclass(frozen=True, kw_only=True)
class ColumnSummary:
    """What the rules need to know about a column.

    Attributes:
      name: its name.
      text: whether its ids are texts; otherwise integers.
      largest_bag: the most ids of an event.
      distinct: number of distinct ids; an estimate for sampled logs and more than half a million ids.
      once: the share of the distinct ids that occur once in what was read.
      repeats: how often an id occurs in what was read, on average.
      of_item: whether the item of an event determines its ids; False for the items themselves.
    """

    name: str
    text: bool
    largest_bag: int
    distinct: int
    once: float
    repeats: float
    of_item: bool


class Entries(NamedTuple):
    """The entries of a list column in a stripe.

    Attributes:
      lengths_N: int64, positions of each row.
      hash_P: uint64, a hash of each entry, the same for bags with the same ids; 0 without ids.
      hash_T: uint64, the hash of each id.
      bag_P: int64, ids of each entry.
    """

    lengths_N: np.ndarray
    hash_P: np.ndarray
    hash_T: np.ndarray
    bag_P: np.ndarray


def entries_of(lists: pa.Array) -> Entries:
    """The entries of a column of list<T> or list<list<T>>."""
    positions = lists.flatten()
    if arrow.is_list(positions.type):
        values = positions.flatten()
        bag_P = arrow.list_lengths(positions)
    else:
        values = positions
        bag_P = np.ones(len(positions), np.int64)
    known_T = values.is_valid().to_numpy(zero_copy_only=False)
    hash_T = np.zeros(len(values), np.uint64)
    hash_T[known_T] = hashes(values.drop_null())
    ends_P = np.cumsum(bag_P)
    known = np.concatenate([[0], np.cumsum(known_T)])
    # Sums wrap around, so that their differences are right.
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(hash_T, dtype=np.uint64)])
    return Entries(
        arrow.list_lengths(lists),
        sums[ends_P] - sums[ends_P - bag_P],
        hash_T[known_T],
        known[ends_P] - known[ends_P - bag_P],
    )


class ColumnTally:
    """Counts a column, stripe by stripe."""

    def __init__(self, name: str, data_type: pa.DataType):
        """Starts with nothing, for a list column."""
        self._name = name
        self._text = ids.is_text(arrow.leaf_type(data_type))
        self._largest_bag = 0
        self._ids, self._entries, self._pairs = (HashTally(_MOST) for _ in range(3))

    def add(self, entries: Entries, items: Entries) -> None:
        """Counts entries, given the items of the same rows; rows without entries are left out."""
        self._largest_bag = max(self._largest_bag, int(entries.bag_P.max(initial=0)))
        self._ids.add(entries.hash_T, entries.hash_T)
        if entries is items:
            return
        ours_P = np.repeat(items.lengths_N > 0, entries.lengths_N)
        theirs_P = np.repeat(entries.lengths_N > 0, items.lengths_N)
        both_P = (entries.bag_P[ours_P] > 0) & (items.bag_P[theirs_P] > 0)
        hash_P, item_P = entries.hash_P[ours_P][both_P], items.hash_P[theirs_P][both_P]
        self._entries.add(hash_P, hash_P)
        self._pairs.add(hash_P + item_P * _SPREAD, item_P)

    def summary(self, sampled: bool) -> ColumnSummary:
        """The counts; for a sample of a log, with an estimate of the number of distinct ids."""
        _, _, count_U = self._ids.counts()
        distinct = self._ids.of_all(len(count_U))
        once, twice = (self._ids.of_all(int((count_U == n).sum())) for n in (1, 2))
        if sampled:
            # A lower bound: Chao, "Nonparametric estimation of the number of classes", 1984.
            distinct += once * max(once - 1, 0) // (2 * (twice + 1))
        return ColumnSummary(
            name=self._name,
            text=self._text,
            largest_bag=self._largest_bag,
            distinct=distinct,
            once=float((count_U == 1).mean()) if len(count_U) else 0.0,
            repeats=float(count_U.mean()) if len(count_U) else 0.0,
            of_item=self._of_item(),
        )

    def _of_item(self) -> bool:
        _, group_U, count_U = self._pairs.counts()
        _, _, entry_U = self._entries.counts()
        if len(entry_U) < 2:
            return False
        order_U = np.argsort(group_U, kind="stable")
        begin_G = np.flatnonzero(np.diff(group_U[order_U], prepend=~group_U[order_U][:1]))
        total_G = np.add.reduceat(count_U[order_U], begin_G)
        most_G = np.maximum.reduceat(count_U[order_U], begin_G)
        several_G = total_G > 1
        if not several_G.any():
            return False
        differ = 1 - most_G[several_G].sum() / total_G[several_G].sum()
        of_all = 1 - entry_U.max() / entry_U.sum()
        return bool(differ <= _DETERMINED * of_all)
