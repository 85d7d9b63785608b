"""The order of rows in an epoch, as a pure function of (stripes, settings, epoch).

Stripes are permuted and put on a line of N rows. Shard v of V owns N/V consecutive rows of the line.
Each shard is cut into shuffle blocks: pieces of stripes that are decoded together, with their rows
permuted. The epoch takes rows of the shards in turn: row g of the epoch is row g // V of shard g mod V.
So a batch of any size, at any place, draws from all shards equally, and a host that owns some rows of a
batch only reads the shards of these rows.
"""

import bisect
import itertools
import threading
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

# A stripe shared by two shards is read twice, so there are far fewer shards than stripes.
STRIPES_PER_SHARD = 32


class Piece(NamedTuple):
    """Rows `start … stop - 1` of stripe `stripe` (an index into all stripes)."""

    stripe: int
    start: int
    stop: int


class BlockKey(NamedTuple):
    """Identifies a shuffle block: number `number` of a shard in an epoch."""

    epoch: int
    shard: int
    number: int


class ShuffleBlock(NamedTuple):
    """Rows that are decoded and permuted together.

    Attributes:
      pieces: pieces of stripes with these rows, in the order of the line.
      order: int64; the i-th row of the block is row `order[i]` of the concatenated pieces.
    """

    pieces: tuple[Piece, ...]
    order: np.ndarray


class Part(NamedTuple):
    """Rows `start … stop - 1` of a shuffle block, in its order."""

    key: BlockKey
    start: int
    stop: int


class Order:
    """The order of rows in every epoch.

    Attributes:
      rows: N, the number of rows of an epoch.
      shards: V, the number of shards.

    Examples:
      >>> order = Order([3, 2], shards=1, block_rows=4, shuffle=True, seed=42)
      >>> rows = order.block(BlockKey(epoch=0, shard=0, number=0)).order
      >>> sorted(rows.tolist())
      [0, 1, 2, 3, 4]
    """

    def __init__(
        self, stripe_rows: Sequence[int], shards: int, block_rows: int, shuffle: bool, seed: int
    ):
        """Makes an order.

        Args:
          stripe_rows: rows of each stripe, each at least one.
          shards: the maximum of V; there is at most one shard per 32 stripes, and one without `shuffle`.
          block_rows: minimum number of rows of the shuffle blocks of all shards, one block each.
          shuffle: whether rows are permuted, or keep the order of the files.
          seed: seed of the permutations.
        """
        self.rows = sum(stripe_rows)
        self.shards = max(1, min(shards, len(stripe_rows) // STRIPES_PER_SHARD)) if shuffle else 1
        self._stripe_rows = tuple(stripe_rows)
        self._block_rows = block_rows
        self._shuffle = shuffle
        self._seed = seed
        self._plans: dict[int, _Plan] = {}
        self._lock = threading.Lock()

    def parts(self, epoch: int, begin: int, end: int, first: int, last: int) -> list[Part]:
        """Finds some rows of a batch.

        The batch has rows `begin … end - 1` of the epoch, sorted by shard, then by place in the shard.
        Returns the parts with rows `first … last - 1` of the sorted batch.
        """
        assert 0 <= begin <= end <= self.rows
        plan, found, at = self._plan(epoch), [], 0
        for shard in range(self.shards):
            start, stop = (-(-(bound - shard) // self.shards) for bound in (begin, end))
            size = stop - start
            # Clips to first and last.
            low, high = start + max(first - at, 0), start + min(last - at, size)
            at += size
            while low < high:
                number = bisect.bisect_right(plan.ends[shard], low)
                base = plan.ends[shard][number - 1] if number else 0
                until = min(high, plan.ends[shard][number])
                found.append(Part(BlockKey(epoch, shard, number), low - base, until - base))
                low = until
        return found

    def block(self, key: BlockKey) -> ShuffleBlock:
        """Return the shuffle block with the given key."""
        pieces = self._plan(key.epoch).pieces[key.shard][key.number]
        rows = sum(piece.stop - piece.start for piece in pieces)
        order = np.arange(rows)
        if self._shuffle:
            order = permutation(rows, self._seed, key.epoch, 1 + key.shard, key.number)
        return ShuffleBlock(pieces, order)

    def draws(self, key: BlockKey) -> np.ndarray:
        """uint64: a random number for each row of a shuffle block, in the block's order."""
        rows = self._plan(key.epoch).rows(key)
        # Negative, so that the key differs from those of the permutations of shards.
        return draws(rows, self._seed, key.epoch, -1 - key.shard, key.number)

    def after(self, key: BlockKey) -> BlockKey:
        """Return the key of the block that the shard needs after this one."""
        if key.number + 1 < len(self._plan(key.epoch).pieces[key.shard]):
            return key._replace(number=key.number + 1)
        return BlockKey(key.epoch + 1, key.shard, 0)

    def _plan(self, epoch: int) -> "_Plan":
        with self._lock:
            if epoch not in self._plans:
                # An epoch and the next one may be in use at the same time, by several threads.
                while len(self._plans) >= 4:
                    del self._plans[min(self._plans)]
                self._plans[epoch] = self._make_plan(epoch)
            return self._plans[epoch]

    def _make_plan(self, epoch: int) -> "_Plan":
        stripes = np.arange(len(self._stripe_rows))
        if self._shuffle:
            stripes = permutation(len(stripes), self._seed, epoch, 0)
        shards, rows = self.shards, self.rows
        least = -(-self._block_rows // shards)
        # The first N mod V shards have one row more, so that taking turns ends evenly.
        borders = [v * (rows // shards) + min(v, rows % shards) for v in range(1, shards + 1)]
        pieces: list[list[tuple[Piece, ...]]] = [[] for _ in range(shards)]
        shard, line, held = 0, 0, 0
        block: list[Piece] = []
        for stripe in stripes.tolist():
            start, size = 0, self._stripe_rows[stripe]
            while start < size:
                stop = min(size, start + borders[shard] - line)
                block.append(Piece(stripe, start, stop))
                held, line, start = held + stop - start, line + stop - start, stop
                ended = line == borders[shard]
                if held >= least or ended:
                    pieces[shard].append(tuple(block))
                    block, held = [], 0
                shard += ended
        ends = tuple(
            tuple(itertools.accumulate(sum(p.stop - p.start for p in b) for b in blocks))
            for blocks in pieces
        )
        return _Plan(tuple(map(tuple, pieces)), ends)


class _Plan(NamedTuple):
    """The shuffle blocks of an epoch.

    Attributes:
      pieces: pieces of each block, for each shard.
      ends: for each shard, the number of its rows up to the end of each block.
    """

    pieces: tuple[tuple[tuple[Piece, ...], ...], ...]
    ends: tuple[tuple[int, ...], ...]

    def rows(self, key: BlockKey) -> int:
        """Number of rows of a shuffle block."""
        ends = self.ends[key.shard]
        return ends[key.number] - (ends[key.number - 1] if key.number else 0)


def permutation(size: int, *key: int) -> np.ndarray:
    """A permutation of `0 … size - 1` determined by `key`: a stable sort of `draws`."""
    return np.argsort(draws(size, *key), kind="stable")


def draws(size: int, *key: int) -> np.ndarray:
    """uint64 `[size]`: random numbers determined by `key`, the same with all versions of NumPy.

    NumPy's own generators do not guarantee this. The numbers are outputs of splitmix64 (Steele, Lea,
    Flood, "Fast splittable pseudorandom number generators", 2014).

    Examples:
      >>> [hex(x) for x in draws(2)]  # the second and the third of splitmix64 for the seed 0
      ['0x6e789e6aa1b965f4', '0x6c45d188009454f']
    """
    state = np.uint64(0)
    for part in key:
        state = _mix(np.asarray([state ^ np.uint64(part % 2**64)]))[0]
    with np.errstate(over="ignore"):
        return _mix(state + np.arange(1, size + 1, dtype=np.uint64) * _GOLDEN)


def integers(below: int, size: int, *key: int) -> np.ndarray:
    """int64 `[size]`: numbers from 0 to `below - 1`, drawn with replacement from `draws`.

    Taking the remainder of 64 bits favours some numbers, but by at most `below / 2^64`.
    """
    return (draws(size, *key) % np.uint64(below)).astype(np.int64)


_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(value: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        value = value + _GOLDEN
        value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return value ^ (value >> np.uint64(31))
