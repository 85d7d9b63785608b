"""Several sequences in one row of a batch: long ones are cut into windows, short ones lie side by side.

A device's share of a batch is a fixed number of rows of the log, so that batches stay a function of
their place; what their positions do not fill is padding, and what does not fit is cut from the longest.

Shapes: R rows of the log, W windows, P positions, C columns of ids, B rows of a batch, L positions of
one of these.
"""

import bisect
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from s2s_jax.data.encoding import blocks
from s2s_jax.data.encoding.blocks import Block

# Number of the segment that padding belongs to.
NO_SEGMENT = -1


class Windows(NamedTuple):
    """Parts of rows that are encoded as sequences of their own, those of a row from new to old.

    Attributes:
      row_W: int64, the row that each is of.
      begins_W: int64, its first position in the row.
      lengths_W: int64 positions.
    """

    row_W: np.ndarray
    begins_W: np.ndarray
    lengths_W: np.ndarray


def cut_windows(lengths_R: np.ndarray, seq_len: int, keep_newest: bool) -> Windows:
    """Cuts rows into windows of at most `seq_len` positions.

    Windows that follow each other share one position, the last of the older and the first of the newer
    one. So each event but the first of a row is predicted exactly once, from those of its window.

    Args:
      lengths_R: int64 positions of rows.
      seq_len: L, at least 2.
      keep_newest: whole windows stand at the end of a row and the rest at its beginning; otherwise the
        other way round.
    """
    count_R = np.maximum(-(-(lengths_R - 1) // (seq_len - 1)), lengths_R > 0).astype(np.int64)
    row_W = np.repeat(np.arange(len(lengths_R)), count_R)
    number_W = np.arange(len(row_W)) - np.repeat(blocks.starts(count_R)[:-1], count_R)
    length_W = lengths_R[row_W]
    if keep_newest:
        ends_W = length_W - number_W * (seq_len - 1)
        begins_W = np.maximum(ends_W - seq_len, 0)
    else:
        begins_W = (count_R[row_W] - 1 - number_W) * (seq_len - 1)
        ends_W = np.minimum(begins_W + seq_len, length_W)
    return Windows(row_W, begins_W, ends_W - begins_W)


def lay_out(lengths: Sequence[int], bins: int, room: int) -> list[list[int]] | None:
    """Which sequences lie in which row of a batch: best fit, the longest first.

    Args:
      lengths: of the sequences, none longer than `room`.
      bins: rows.
      room: positions of a row.

    Returns:
      Numbers of the sequences of each row, None if they do not fit this way.
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


class Share(NamedTuple):
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


def share(log: Block, bins: int, seq_len: int, keep_newest: bool) -> Share:
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
    return Share(begins_W[order], windows.lengths_W[order], bin_W, cut)


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
      groups: shares of single devices.
      group_rows: R, rows of the log of a share.
      bins: B, rows of the batch of a share.
      seq_len: L.
      keep_newest: see `share`.

    Returns:
      int32 arrays of the caller's own: `length` `[groups * B]`, real positions of each row, which come
      first; `ids` `[groups * B, L, C]`, `NO_ID` where there is none; `segment` `[groups * B, L]`, which
      sequence of its row a position belongs to, `NO_SEGMENT` for padding; and three that count in the
      first row of each share: `examples` its rows of the log that have positions, `skipped` those that
      could not be read, and `cut` its positions that did not fit.
    """
    values_PC, length_R = blocks.gather(parts, groups * group_rows)
    log = blocks.packed_block(values_PC, length_R.astype(np.int64))
    of_groups = [slice(g * group_rows, (g + 1) * group_rows) for g in range(groups)]
    shares = [share(blocks.choose(log, rows), bins, seq_len, keep_newest) for rows in of_groups]
    lengths_W = np.concatenate([s.lengths_W for s in shares])
    bin_W = np.concatenate([s.bin_W + g * bins for g, s in enumerate(shares)])
    begins_W = np.concatenate([s.begins_W for s in shares])
    sequences_PC = blocks.positions_of(Block(values_PC, begins_W, lengths_W))
    length_B = np.zeros(groups * bins, np.int32)
    np.add.at(length_B, bin_W, lengths_W.astype(np.int32))
    segment_W = np.arange(len(bin_W)) - np.searchsorted(bin_W, bin_W)
    segment_BL = np.full((groups * bins, seq_len), NO_SEGMENT, np.int32)
    segment_BL[np.arange(seq_len) < length_B[:, None]] = np.repeat(segment_W, lengths_W)
    row_lengths = [length_R[rows] for rows in of_groups]
    counts = {
        "examples": [int((lengths > 0).sum()) for lengths in row_lengths],
        "skipped": [int((lengths == blocks.SKIPPED).sum()) for lengths in row_lengths],
        "cut": [s.cut for s in shares],
    }
    arrays = {
        "length": length_B,
        "ids": blocks.padded(sequences_PC, length_B, seq_len),
        "segment": segment_BL,
    }
    for name, count in counts.items():
        arrays[name] = np.zeros(groups * bins, np.int32)
        arrays[name][::bins] = count
    return arrays
