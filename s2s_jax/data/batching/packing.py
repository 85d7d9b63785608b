"""Packing: puts several sequences, short rows or windows of long rows, into one row of a batch.

Each device gets a fixed number of rows of the log in each batch, so that batches only depend on their
place. Unfilled positions are padding; if rows do not fit, the longest ones are cut.

Shapes: R rows of the log, W windows, P positions, C columns of ids, B rows of a batch, L positions of
one of these.
"""

import bisect
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from s2s_jax.data.batching.windows import Windows, cut_windows
from s2s_serve.encoding import blocks
from s2s_serve.encoding.blocks import Block

# The sequence number of padding.
NO_SEQUENCE = -1


def lay_out(lengths: Sequence[int], bins: int, room: int) -> list[list[int]] | None:
    """Assigns sequences to rows of a batch: best fit, longest first.

    Args:
      lengths: lengths of the sequences, none longer than `room`.
      bins: number of rows.
      room: positions of a row.

    Returns:
      The numbers of the sequences in each row; None if they do not fit this way.

    Examples:
      >>> lay_out([3, 2, 4], bins=2, room=5)
      [[2], [0, 1]]
      >>> lay_out([3, 3, 3], bins=2, room=5) is None
      True
    """
    contents: list[list[int]] = [[] for _ in range(bins)]
    # Rows sorted by free positions, the fullest first, then by number.
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
    """The layout of the batch rows of one device.

    Attributes:
      begins_W: int64, first position of each sequence; sequences are sorted by row of the batch.
      lengths_W: int64, positions of each sequence.
      bin_W: int64, row of the batch of each sequence.
      cut: number of positions that did not fit.
    """

    begins_W: np.ndarray
    lengths_W: np.ndarray
    bin_W: np.ndarray
    cut: int


def lay_rows(log: Block, bins: int, seq_len: int, keep_newest: bool) -> DeviceRows:
    """Packs rows of the log into `bins` rows of a batch.

    If they do not fit, the longest rows are cut, all to the same length, which is as large as possible.

    Args:
      log: rows of the log; at most `bins * seq_len` of them may have positions.
      bins: number of rows of the batch.
      seq_len: L.
      keep_newest: whether the newest or the oldest events of a row are kept; see also `cut_windows`.
    """
    lengths_R = np.maximum(log.lengths_N, 0)
    longest = int(lengths_R.max(initial=0))
    found = _laid_out(lengths_R, longest, bins, seq_len, keep_newest)
    if found is None:
        # Bisection: a length of one position fits; finds the largest length that does.
        low, high = 0, longest
        while high - low > 1:
            middle = (low + high) // 2
            fitting = _laid_out(lengths_R, middle, bins, seq_len, keep_newest)
            if fitting is None:
                high = middle
            else:
                low, found = middle, fitting
        longest = low
    assert found is not None, "more rows than positions"
    windows, contents = found
    order = np.array([w for row in contents for w in row], np.int64)
    bin_W = np.repeat(np.arange(bins), [len(row) for row in contents])
    kept = blocks.truncate(log, longest, keep_newest)
    begins_W = kept.begins_N[windows.row_W] + windows.begins_W
    cut = int((lengths_R - np.minimum(lengths_R, longest)).sum())
    return DeviceRows(begins_W[order], windows.lengths_W[order], bin_W, cut)


def _laid_out(
    lengths_R: np.ndarray, longest: int, bins: int, seq_len: int, keep_newest: bool
) -> tuple[Windows, list[list[int]]] | None:
    """Return the windows of rows cut to `longest` positions and their layout, or None without room."""
    windows = cut_windows(np.minimum(lengths_R, longest), seq_len, keep_newest)
    if windows.lengths_W.sum() > bins * seq_len:
        return None
    contents = lay_out(windows.lengths_W.tolist(), bins, seq_len)
    return None if contents is None else (windows, contents)


def to_packed(
    parts: Sequence[Block], groups: int, group_rows: int, bins: int, seq_len: int, keep_newest: bool
) -> dict[str, np.ndarray]:
    """Packs rows of the log into rows of fixed length, separately for each device.

    Args:
      parts: parts of packed blocks, at most `groups * group_rows` rows in total.
      groups: number of groups; the rows of a group are on the same device.
      group_rows: R, rows of the log per group.
      bins: B, rows of the batch per group.
      seq_len: L.
      keep_newest: see `lay_rows`.

    Returns:
      New int32 arrays: `length` `[groups * B]`, real positions of each row, which come first; `ids`
      `[groups * B, L, C]`, `NO_ID` for missing ids; `sequence` `[groups * B, L]`, which sequence of its
      row a position belongs to, `NO_SEQUENCE` for padding. Three more arrays have counts in the first
      row of each group: `examples`, rows of the log that have positions; `skipped`, rows that could not
      be read; and `cut`, positions that did not fit.
    """
    values_PC, length_R = blocks.gather(parts, groups * group_rows)
    log = blocks.packed_block(values_PC, length_R.astype(np.int64))
    of_groups = [slice(g * group_rows, (g + 1) * group_rows) for g in range(groups)]
    layouts = [lay_rows(blocks.choose(log, rows), bins, seq_len, keep_newest) for rows in of_groups]
    lengths_W = np.concatenate([one.lengths_W for one in layouts])
    bin_W = np.concatenate([one.bin_W + g * bins for g, one in enumerate(layouts)])
    begins_W = np.concatenate([one.begins_W for one in layouts])
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
        "cut": [one.cut for one in layouts],
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
