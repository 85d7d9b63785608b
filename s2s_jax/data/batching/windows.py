"""Windows of a row: the parts of a long one that are trained on as sequences of their own.

Shapes: R rows of the log, W windows, N rows of a block.
"""

from typing import NamedTuple

import numpy as np

from s2s_jax.data.encoding import blocks
from s2s_jax.data.encoding.blocks import Block


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


def random_run(block: Block, most: int, newest: bool, draws_N: np.ndarray) -> Block:
    """Keeps a run of at most `most` positions of each row, without copying.

    Half of the runs are at the end of their row, so that what is recommended from, the newest events,
    is trained on in every other epoch however long the row is; the others begin anywhere.

    Args:
      block: the rows.
      most: positions.
      newest: runs that are not drawn are at the end, otherwise at the beginning.
      draws_N: uint64 random numbers.
    """
    kept_N = np.minimum(block.lengths_N, most)
    spare_N = block.lengths_N - kept_N
    at_end = draws_N >> np.uint64(63) == 0
    drawn_N = ((draws_N & np.uint64(2**63 - 1)) % (spare_N + 1).astype(np.uint64)).astype(np.int64)
    dropped_N = np.where(at_end, spare_N if newest else 0, drawn_N)
    return Block(block.values_PC, block.begins_N + dropped_N, kept_N)
