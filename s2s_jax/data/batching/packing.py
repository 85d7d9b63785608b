"""Several sequences in one row of a batch: windows of long rows and whole short rows lie side by side.

A device gets a fixed number of rows of the log in each batch, so that batches stay a function of their
place; what their positions do not fill is padding, and what does not fit is cut from the longest.

Shapes: R rows of the log, W windows, P positions, C columns of ids, B rows of a batch, L positions of
one of these.
"""

import bisect
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from s2s_jax.data.batching.windows import Windows, cut_windows
from s2s_jax.data.encoding import blocks
from s2s_jax.data.encoding.blocks import Block

# Number of the sequence that padding belongs to.
NO_SEQUENCE = -1


def lay_out(lengths: Sequence[int], bins: int, room: int) -> list[list[int]] | None:
    """Which sequences lie in which row of a batch: best fit, the longest first.

    Args:
      lengths: of the sequences, none longer than `room`.
      bins: rows.
      room: positions of a row.

    Returns:
      Numbers of the sequences of each row, None if they do not fit this way.

    Examples:
      >>> lay_out([3, 2, 4], bins=2, room=5)
      [[2], [0, 1]]
      >>> lay_out([3, 3, 3], bins=2, room=5) is None
      True
    """
    contents: list[list[int]] = [[] for _ in range(bins)]
    # Rows by the room they have left, the fullest first; equal ones by number.
    left = [(room, number) for number in range(bins)]
    for sequence in sorted(range(len(lengths)), key=lambda s: (-lengths[s], s)):
        at = bisect.bisect_left(left, (lengths[sequence], -1))
        if at == len(left):
            return None
        free, number = left.pop(at)
        contents[number].append(sequence)
        bisect.insort(left, (free - lengths[sequence], number))
    return contents


class DeviceRows(NamedTuple):
    """What lies in the rows of a batch that one device gets.

    Attributes:
      begins_W: int64 first position of each sequence, row of the batch after row.
      lengths_W: int64 positions of each.
      bin_W: int64 row of the batch that each lies in.
      cut: positions that did not fit.
    """

    begins_W: np.ndarray
    lengths_W: np.ndarray
    bin_W: np.ndarray
    cut: int


def lay_rows(log: Block, bins: int, seq_len: int, keep_newest: bool) -> DeviceRows:
    """Lays rows of the log into `bins` rows of a batch.

    Where they do not fit, the longest rows are cut, all to the same length: the greatest that fits.

    Args:
      log: rows of the log, no more than `bins * seq_len` that have positions.
      bins: rows of the batch.
      seq_len: L.
      keep_newest: which end of a row is kept, and see `cut_windows`.
    """
    lengths_R = np.maximum(log.lengths_N, 0)
    longest = int(lengths_R.max(initial=0))
    found = _try(lengths_R, longest, bins, seq_len, keep_newest)
    if found is None:
        # Single positions fit; the greatest length that does is somewhere above.
        low, high = 0, longest
        while high - low > 1:
            middle = (low + high) // 2
            tried = _try(lengths_R, middle, bins, seq_len, keep_newest)
            if tried is None:
                high = middle
            else:
                low, found = middle, tried
        longest = low
    assert found is not None, "more rows than positions"
    windows, contents = found
    order = np.array([w for row in contents for w in row], np.int64)
    bin_W = np.repeat(np.arange(bins), [len(row) for row in contents])
    kept = blocks.truncate(log, longest, keep_newest)
    begins_W = kept.begins_N[windows.row_W] + windows.begins_W
    cut = int((lengths_R - np.minimum(lengths_R, longest)).sum())
    return DeviceRows(begins_W[order], windows.lengths_W[order], bin_W, cut)


def _try(
    lengths_R: np.ndarray, longest: int, bins: int, seq_len: int, keep_newest: bool
) -> tuple[Windows, list[list[int]]] | None:
    """Windows of rows cut to `longest` positions, and where they lie, None if they do not fit."""
    windows = cut_windows(np.minimum(lengths_R, longest), seq_len, keep_newest)
    if windows.lengths_W.sum() > bins * seq_len:
        return None
    contents = lay_out(windows.lengths_W.tolist(), bins, seq_len)
    return None if contents is None else (windows, contents)


def to_packed(
    parts: Sequence[Block], groups: int, group_rows: int, bins: int, seq_len: int, keep_newest: bool
) -> dict[str, np.ndarray]:
    """Packs rows of the log into rows of fixed length, device by device.

    Args:
      parts: parts of packed blocks, at most `groups * group_rows` rows in all.
      groups: of rows that lie on one device.
      group_rows: R, rows of the log of a group.
      bins: B, rows of the batch of a group.
      seq_len: L.
      keep_newest: see `lay_rows`.

    Returns:
      int32 arrays of the caller's own: `length` `[groups * B]`, real positions of each row, which come
      first; `ids` `[groups * B, L, C]`, `NO_ID` where there is none; `sequence` `[groups * B, L]`, which
      sequence of its row a position belongs to, `NO_SEQUENCE` for padding; and three that count in the
      first row of each group: `examples` its rows of the log that have positions, `skipped` those that
      could not be read, and `cut` its positions that did not fit.
    """
    values_PC, length_R = blocks.gather(parts, groups * group_rows)
    log = blocks.packed_block(values_PC, length_R.astype(np.int64))
    of_groups = [slice(g * group_rows, (g + 1) * group_rows) for g in range(groups)]
    laid = [lay_rows(blocks.choose(log, rows), bins, seq_len, keep_newest) for rows in of_groups]
    lengths_W = np.concatenate([one.lengths_W for one in laid])
    bin_W = np.concatenate([one.bin_W + g * bins for g, one in enumerate(laid)])
    begins_W = np.concatenate([one.begins_W for one in laid])
    sequences_PC = blocks.positions_of(Block(values_PC, begins_W, lengths_W))
    length_B = np.zeros(groups * bins, np.int32)
    np.add.at(length_B, bin_W, lengths_W.astype(np.int32))
    sequence_W = np.arange(len(bin_W)) - np.searchsorted(bin_W, bin_W)
    sequence_BL = np.full((groups * bins, seq_len), NO_SEQUENCE, np.int32)
    sequence_BL[np.arange(seq_len) < length_B[:, None]] = np.repeat(sequence_W, lengths_W)
    row_lengths = [length_R[rows] for rows in of_groups]
    counts = {
        "examples": [int((lengths > 0).sum()) for lengths in row_lengths],
        "skipped": [int((lengths == blocks.SKIPPED).sum()) for lengths in row_lengths],
        "cut": [one.cut for one in laid],
    }
    arrays = {
        "length": length_B,
        "ids": blocks.padded(sequences_PC, length_B, seq_len),
        "sequence": sequence_BL,
    }
    for name, count in counts.items():
        arrays[name] = np.zeros(groups * bins, np.int32)
        arrays[name][::bins] = count
    return arrays
