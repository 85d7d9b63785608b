"""The few shapes in which histories are encoded: at about their own lengths, in full batches.

A history is padded to the next of a few lengths, and encoded together with histories of the same length.
To fill these batches, the users of a *stretch* of the log are encoded at once. What is encoded together
never changes a shape, so a history has the same vector whichever others are in its batch.

Shapes: N histories, B histories of a batch, L positions of a sequence, C columns of ids, n devices, P
positions of a device, M = n P.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from s2s_jax.data.batching.histories import Histories
from s2s_serve.encoding import blocks
from s2s_serve.encoding.blocks import NO_ID, Block

# The smallest length. Lengths double, so that few programs are compiled.
_SHORTEST = 8
# The last length before the longest one is at most this share of it.
_LAST_SHARE = 0.75
# A stretch has so many batches of positions, so that the last batch of each length, which is not full,
# is a small part of it.
_BATCHES = 64
# Maximum number of users of a stretch, and of events of their whole histories (but one history may be
# longer).
_MOST_USERS, _MOST_EVENTS = 2**14, 2**22


class Shapes(NamedTuple):
    """The shapes of the batches that are encoded.

    Attributes:
      lengths: the values of L, ascending.
      positions: P, the same for all lengths, at least the largest length. A device may encode fewer, so
        that they are whole histories.
      devices: number of devices.
    """

    lengths: tuple[int, ...]
    positions: int
    devices: int

    def rows(self, length: int) -> int:
        """B: the number of histories that all devices together encode at a time.

        Args:
          length: L, one of `lengths`.
        """
        return self.positions // length * self.devices

    @property
    def stretch_positions(self) -> int:
        """Number of positions of a stretch."""
        return _BATCHES * self.positions * self.devices


def lengths(seq_len: int) -> tuple[int, ...]:
    """Lengths to which histories of at most `seq_len` events are padded.

    Examples:
      >>> lengths(200), lengths(50), lengths(6)
      ((8, 16, 32, 64, 128, 200), (8, 16, 32, 50), (6,))
    """
    shorter = []
    length = _SHORTEST
    while length <= _LAST_SHARE * seq_len:
        shorter.append(length)
        length *= 2
    return (*shorter, seq_len)


def stretches(batches: Iterable[Histories], shapes: Shapes) -> Iterator[list[Histories]]:
    """Yields consecutive batches whose histories are encoded together.

    Args:
      batches: batches of users, in the order of the log.
      shapes: the shapes in which histories are encoded.
    """
    stretch: list[Histories] = []
    users = positions = events = 0
    for batch in batches:
        stretch.append(batch)
        users += len(batch.events_U)
        positions += len(batch.newest.values_PC)
        events += len(batch.item_P)
        full = users >= _MOST_USERS or events >= _MOST_EVENTS
        if full or positions >= shapes.stretch_positions:
            yield stretch
            stretch, users, positions, events = [], 0, 0, 0
    if stretch:
        yield stretch


class SameLength(NamedTuple):
    """Histories that are encoded together.

    Attributes:
      chosen: int64, their numbers; there may be fewer than rows of the arrays.
      ids_MC: int32, their ids. A device has the positions of B / n padded histories, then unused ones.
      length_B: int32, number of events of each history, 0 for padding.
      seq_len: L.
    """

    chosen: np.ndarray
    ids_MC: np.ndarray
    length_B: np.ndarray
    seq_len: int


def by_length(histories: Block, wanted_N: np.ndarray, shapes: Shapes) -> Iterator[SameLength]:
    """Yields histories of about the same length, in batches of fixed shapes.

    Args:
      histories: N packed histories of at most `shapes.lengths[-1]` events.
      wanted_N: bool, which ones; only those with events.
      shapes: the shapes of the batches.
    """
    number_N = np.searchsorted(shapes.lengths, histories.lengths_N)
    for number, length in enumerate(shapes.lengths):
        of_length = np.flatnonzero((number_N == number) & wanted_N)
        rows = shapes.rows(length)
        for begin in range(0, len(of_length), rows):
            chosen = of_length[begin : begin + rows]
            packed = blocks.pack(blocks.choose(histories, chosen))
            values_PC, length_B = blocks.gather([packed], rows)
            ids_BLC = blocks.padded(values_PC, length_B, length)
            yield SameLength(chosen, _by_device(ids_BLC, shapes), length_B, length)


def _by_device(ids_BLC: np.ndarray, shapes: Shapes) -> np.ndarray:
    """int32 `[M, C]`: the positions of each device, and `NO_ID` for unused ones."""
    of_device = ids_BLC.reshape(shapes.devices, -1, ids_BLC.shape[2])
    unused = shapes.positions - of_device.shape[1]
    padded = np.pad(of_device, ((0, 0), (0, unused), (0, 0)), constant_values=NO_ID)
    return padded.reshape(-1, ids_BLC.shape[2])
