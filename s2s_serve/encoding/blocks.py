"""Decoded rows: packed, reordered, and padded to fixed shapes.

The ids of a position are stored together, so that moving a position moves all of its features at once.

Shapes: N rows, P positions, C columns of ids; B rows of a batch, L positions of a sequence, G groups of
rows (the rows of a group are on one device).
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from s2s_serve.encoding.feature import NO_ID as NO_ID

# The length of a row that could not be read.
SKIPPED = -1


class Block(NamedTuple):
    """Rows that were decoded together.

    Attributes:
      values_PC: int32 ids of all features at all positions, `NO_ID` for missing ids.
      begins_N: int64; the positions of row n begin at `begins_N[n]` and are consecutive.
      lengths_N: int64, positions of each row, `SKIPPED` for a row that could not be read.
    """

    values_PC: np.ndarray
    begins_N: np.ndarray
    lengths_N: np.ndarray


def starts(lengths: np.ndarray) -> np.ndarray:
    """Cumulative sums that start with 0: `[0, l0, l0 + l1, …]`, int64.

    Examples:
      >>> starts(np.array([3, 0, 2])).tolist()
      [0, 3, 3, 5]
    """
    ends = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=ends[1:])
    return ends


def packed_block(values_PC: np.ndarray, lengths_N: np.ndarray) -> Block:
    """A block of rows whose positions follow each other."""
    return Block(values_PC, starts(np.maximum(lengths_N, 0))[:-1], lengths_N)


def skipped_block(rows: int, columns: int) -> Block:
    """A block that stands for `rows` rows that could not be read."""
    return packed_block(np.empty((0, columns), np.int32), np.full(rows, SKIPPED, np.int64))


def concatenate(blocks: Sequence[Block]) -> Block:
    """The rows of `blocks`, one after the other."""
    if len(blocks) == 1:
        return blocks[0]
    offsets = starts(np.array([len(block.values_PC) for block in blocks]))
    return Block(
        np.concatenate([block.values_PC for block in blocks]),
        np.concatenate([b.begins_N + o for b, o in zip(blocks, offsets, strict=False)]),
        np.concatenate([block.lengths_N for block in blocks]),
    )


def truncate(block: Block, seq_len: int, keep_newest: bool) -> Block:
    """Keeps the last (or first) `seq_len` positions of each row, without copying."""
    kept_N = np.minimum(block.lengths_N, seq_len)
    dropped_N = block.lengths_N - kept_N if keep_newest else 0
    return Block(block.values_PC, block.begins_N + dropped_N, kept_N)


def take_first(block: Block, kept_N: np.ndarray) -> Block:
    """Keeps the first `kept_N` positions of each row (rows must have as many), without copying."""
    return Block(block.values_PC, block.begins_N, kept_N)


def choose(block: Block, rows: np.ndarray | slice) -> Block:
    """The given rows, in the given order, without copying."""
    return Block(block.values_PC, block.begins_N[rows], block.lengths_N[rows])


def pack(block: Block) -> Block:
    """Copies rows, no two of which share positions, into new memory where they follow each other."""
    values_PC = np.ascontiguousarray(block.values_PC)
    lengths_N = np.maximum(block.lengths_N, 0)
    if not lengths_N.any():
        return packed_block(values_PC[:0], block.lengths_N)
    width = values_PC.shape[1] * values_PC.itemsize
    # Arrow copies a run of positions as one byte string, several times faster than NumPy copies
    # positions. Arrow's strings must be adjacent, so unused positions between rows become strings too.
    bounds = np.unique(np.concatenate([block.begins_N, block.begins_N + lengths_N]))
    strings = pa.Array.from_buffers(
        pa.large_binary(),
        len(bounds) - 1,
        [None, pa.py_buffer(bounds * width), pa.py_buffer(values_PC)],
    )
    some = lengths_N > 0
    data = strings.take(pa.array(np.searchsorted(bounds, block.begins_N[some]))).buffers()[2]
    moved = np.frombuffer(data, np.int32) if data else np.empty(0, np.int32)
    size = int(lengths_N.sum()) * values_PC.shape[1]
    return packed_block(moved[:size].reshape(-1, values_PC.shape[1]), block.lengths_N)


def to_dense(blocks: Sequence[Block], rows: int, seq_len: int) -> dict[str, np.ndarray]:
    """Pads some rows to fixed shapes.

    Args:
      blocks: parts of packed blocks, with at most B rows in total, of at most `seq_len` positions each.
      rows: B; rows beyond those of the blocks are padding of length 0.
      seq_len: L.

    Returns:
      New arrays: `length`, int32 `[B]`, real positions of each row (`SKIPPED` as in blocks), and `ids`,
      int32 `[B, L, C]`, `NO_ID` for missing ids. The real positions of a row come first.
    """
    values_PC, length_B = gather(blocks, rows)
    return {"length": length_B, "ids": padded(values_PC, length_B, seq_len)}


def positions_of(block: Block) -> np.ndarray:
    """int32 `[P, C]`: the positions of all rows, one row after the other; rows may share positions."""
    lengths_N = np.maximum(block.lengths_N, 0)
    before_N = starts(lengths_N)[:-1]
    place_P = np.repeat(block.begins_N - before_N, lengths_N) + np.arange(lengths_N.sum())
    values_PC = np.ascontiguousarray(block.values_PC)
    item = _item(values_PC)
    return values_PC.view(item)[:, 0].take(place_P).view(np.int32).reshape(-1, values_PC.shape[1])


def padded(values_PC: np.ndarray, length_B: np.ndarray, seq_len: int) -> np.ndarray:
    """int32 `[B, L, C]`: pads rows, whose positions follow each other, with `NO_ID`.

    Args:
      values_PC: int32, positions of all rows.
      length_B: positions of each row, at most `seq_len`; negative counts as 0.
      seq_len: L.

    Examples:
      >>> padded(np.array([[7], [8], [9]], np.int32), np.array([2, 1]), 2)[..., 0].tolist()
      [[7, 8], [9, -1]]
    """
    ids_BLC = np.full((len(length_B), seq_len, values_PC.shape[1]), NO_ID, np.int32)
    real_BL = np.arange(seq_len) < length_B[:, None]
    item = _item(values_PC)
    ids_BLC.view(item)[..., 0][real_BL] = values_PC.view(item)[:, 0]
    return ids_BLC


def to_flat(
    blocks: Sequence[Block], rows: int, seq_len: int, group_rows: int
) -> dict[str, np.ndarray]:
    """Packs some rows into fixed shapes, for padding on the device.

    Args:
      blocks: parts of packed blocks, with at most B rows in total, of at most `seq_len` positions each.
      rows: B; rows beyond those of the blocks are padding of length 0.
      seq_len: L.
      group_rows: number of rows on one device; divides B into G groups.

    Returns:
      New arrays: `length`, int32 `[B]`, real positions of each row (`SKIPPED` as in blocks), and
      `values`, int32 `[G, B // G * L, C]`: the positions of a group's rows, one after the other, then
      `NO_ID`s.
    """
    values_PC, length_B = gather(blocks, rows)
    groups = rows // group_rows
    flat_GMC = np.empty((groups, group_rows * seq_len, values_PC.shape[1]), np.int32)
    ends_G = starts(np.maximum(length_B, 0))[::group_rows]
    for group in range(groups):
        used = ends_G[group + 1] - ends_G[group]
        flat_GMC[group, :used] = values_PC[ends_G[group] : ends_G[group + 1]]
        flat_GMC[group, used:] = NO_ID
    return {"length": length_B, "values": flat_GMC}


def gather(blocks: Sequence[Block], rows: int) -> tuple[np.ndarray, np.ndarray]:
    """The positions of all rows, one after the other, and int32 lengths of `rows` rows.

    Args:
      blocks: parts of packed blocks, with at most `rows` rows in total.
      rows: number of lengths; rows beyond those of the blocks have length 0.
    """
    assert blocks, "a batch has at least one block, which may be empty"
    parts = []
    for block in blocks:
        begin = block.begins_N[0] if len(block.begins_N) else 0
        parts.append(block.values_PC[begin : begin + np.maximum(block.lengths_N, 0).sum()])
    length_B = np.zeros(rows, np.int32)
    lengths = np.concatenate([block.lengths_N for block in blocks])
    length_B[: len(lengths)] = lengths
    return np.concatenate(parts), length_B


def _item(values_PC: np.ndarray) -> np.dtype:
    """A dtype with a whole position as one item, because NumPy is slow at indexing short rows."""
    return np.dtype((np.void, values_PC.shape[1] * values_PC.itemsize))
