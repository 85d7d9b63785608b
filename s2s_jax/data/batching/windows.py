"""Windows: parts of long rows that are trained on as separate sequences.

Shapes: R rows of the log, W windows, N rows of a block.
"""

from typing import NamedTuple

import numpy as np

from s2s_serve.encoding import blocks
from s2s_serve.encoding.blocks import Block


class Windows(NamedTuple):
    """Parts of rows that are encoded as separate sequences; those of the same row, newest first.

    Attributes:
      row_W: int64, the row of each window.
      begins_W: int64, the window's first position in the row.
      lengths_W: int64, number of positions.
    """

    row_W: np.ndarray
    begins_W: np.ndarray
    lengths_W: np.ndarray


def cut_windows(lengths_R: np.ndarray, seq_len: int, keep_newest: bool) -> Windows:
    """Cuts rows into windows of at most `seq_len` positions.

    Consecutive windows share one position: the last of the older and the first of the newer window. So
    every event except the first of a row is predicted exactly once, from earlier events of its window.

    Args:
      lengths_R: int64, positions of each row.
      seq_len: L, at least 2.
      keep_newest: whether full windows are at the end of a row and the rest at its beginning, or the
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


def random_run(block: Block, most: int, newest: bool, draws_N: np.ndarray) -> Block:
    """Keeps a run of at most `most` consecutive positions of each row, without copying.

    Half of the runs are at a fixed end of their row. So the newest events, which recommendations are
    based on, are trained on in every other epoch, however long the row is. The other runs begin
    anywhere.

    Args:
      block: the rows.
      most: maximum number of positions.
      newest: whether the fixed end is the end of the row, or its beginning.
      draws_N: uint64 random numbers.
    """
    kept_N = np.minimum(block.lengths_N, most)
    spare_N = block.lengths_N - kept_N
    at_end = draws_N >> np.uint64(63) == 0
    drawn_N = ((draws_N & np.uint64(2**63 - 1)) % (spare_N + 1).astype(np.uint64)).astype(np.int64)
    dropped_N = np.where(at_end, spare_N if newest else 0, drawn_N)
    return Block(block.values_PC, block.begins_N + dropped_N, kept_N)
