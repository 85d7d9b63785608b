"""The order of an epoch: which row stands where, as a pure function of (stripes, seed, epoch).

Stripes are permuted and laid on a line of N rows; the line is cut into windows of W rows; rows are
permuted inside each window. A window is what is decoded together.
"""

import dataclasses
import functools
from typing import NamedTuple

import numpy as np


class Piece(NamedTuple):
    """Rows `start … stop - 1` of stripe number `stripe` (an index into all stripes)."""

    stripe: int
    start: int
    stop: int


class Window(NamedTuple):
    """Rows decoded together.

    Attributes:
      pieces: where they are, in the order in which they are laid on the line.
      order: int64; `order[i]` says which of the pieces' rows, counted through, comes i-th.
    """

    pieces: tuple[Piece, ...]
    order: np.ndarray


@dataclasses.dataclass(frozen=True)
class Order:
    """The order of rows in every epoch.

    Attributes:
      stripe_rows: rows of each stripe.
      window_rows: W.
      shuffle: permute, or keep the order of the files.
      seed: of the permutations.
    """

    stripe_rows: tuple[int, ...]
    window_rows: int
    shuffle: bool
    seed: int

    @functools.cached_property
    def rows(self) -> int:
        """Rows of an epoch, N."""
        return sum(self.stripe_rows)

    def window(self, epoch: int, number: int) -> Window:
        """The rows `number * W … (number + 1) * W - 1` of an epoch's line."""
        begin = number * self.window_rows
        end = min(begin + self.window_rows, self.rows)
        assert 0 <= begin < end, "no such window"
        stripes = np.arange(len(self.stripe_rows))
        if self.shuffle:
            stripes = permutation(len(stripes), self.seed, epoch, 0)
        ends = np.cumsum(np.asarray(self.stripe_rows, np.int64)[stripes])
        pieces = []
        for at in range(int(np.searchsorted(ends, begin, side="right")), len(stripes)):
            stripe = int(stripes[at])
            stripe_begin = int(ends[at]) - self.stripe_rows[stripe]
            if stripe_begin >= end:
                break
            start, stop = max(begin - stripe_begin, 0), min(end, int(ends[at])) - stripe_begin
            if stop > start:
                pieces.append(Piece(stripe, start, stop))
        order = np.arange(end - begin)
        if self.shuffle:
            order = permutation(end - begin, self.seed, epoch, number + 1)
        return Window(tuple(pieces), order)


def permutation(size: int, seed: int, epoch: int, stream: int) -> np.ndarray:
    """A permutation of `0 … size - 1` that no NumPy version changes, unlike those of its generators.

    Sorts splitmix64 outputs (Steele, Lea, Flood, "Fast splittable pseudorandom number generators",
    2014), ties in order.
    """
    state = np.uint64(0)
    for part in (seed, epoch, stream):
        state = _mix(np.asarray([state ^ np.uint64(part % 2**64)]))[0]
    with np.errstate(over="ignore"):
        keys = _mix(state + np.arange(1, size + 1, dtype=np.uint64) * _GOLDEN)
    return np.argsort(keys, kind="stable")


_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(value: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        value = value + _GOLDEN
        value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return value ^ (value >> np.uint64(31))
