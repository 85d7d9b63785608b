"""Scores of items: dot products that are the same, bit for bit, wherever they are computed.

The score of an item is the dot product of its vector with the user's; for cosines, normalize both first.
Some pairs of a user and an item may have a bias, which is added.

The items are sharded over the devices, and each device scores its items in blocks. Besides the vectors,
this takes 4 bytes × users × items of a block (about twice that at the peak), for any number of items.

Every product has the same shape, P users by T items. For different shapes, kernels sum in different
orders, which changes the last bits of a score; with a single shape, a score depends only on the two
vectors. So results are the same, bit for bit, for any batch, block and number of devices of the same
kind, and items with equal vectors tie exactly. This requires that a kernel sums in the same way at all
places of a shape, which is tested on CPUs.

Shapes: B users, G groups of P users, E width, X items of a device (with padding), N tiles of T items in
a block, S pairs of a user and an item, W weights.
"""

from typing import NamedTuple, overload

import jax
import jax.numpy as jnp
import numpy as np

from s2s_jax.cluster.mesh import DATA_AXIS

# P and T: the one shape of all products.
USERS = 64
TILE = 2048


class Pairs(NamedTuple):
    """`Seen` on the devices: int32 `[S]` each; item -1 is padding."""

    user_S: jax.Array
    item_S: jax.Array


class Biases(NamedTuple):
    """What is added to the scores of some pairs, on the devices.

    Attributes:
      pairs: distinct pairs.
      bias_WS: f32; each weight gives a ranking of its own.
    """

    pairs: Pairs
    bias_WS: jax.Array


class Shard(NamedTuple):
    """The items of one device.

    Attributes:
      vectors_XE: f32, the vectors of the items.
      first: int32 scalar, the number of the first item among the items of all devices.
      tiles: N, the number of tiles in a block.
    """

    vectors_XE: jax.Array
    first: jax.Array
    tiles: int


def shard_of(vectors_XE: jax.Array, blocks: int) -> Shard:
    """Return the items of this device, divided into `blocks` blocks; call it inside `jax.shard_map`."""
    first = jax.lax.axis_index(DATA_AXIS) * vectors_XE.shape[0]
    return Shard(vectors_XE, first, vectors_XE.shape[0] // TILE // blocks)


def score_block(
    users_BE: jax.Array,
    shard: Shard,
    block: jax.Array,
    items: jax.Array,
    left_out: Pairs,
) -> tuple[jax.Array, jax.Array]:
    """Scores the items of one block, without biases.

    Args:
      users_BE: f32, the vectors of the users.
      shard: the items of this device.
      block: int32 scalar, the number of the block.
      items: int32 scalar, the number of items of all devices; items from this number on are padding.
      left_out: the pairs whose score is -inf.

    Returns:
      f32 `[N, B, T]` scores, -inf for items that are left out and for padding; and the number of the
      first item of the block.
    """
    tiles = shard.tiles
    begin = shard.first + block * (tiles * TILE)
    scores_NBT = _score(users_BE, shard.vectors_XE, block * tiles, tiles, items - begin)
    return scores_NBT.at[places(left_out, begin, tiles)].set(-jnp.inf, mode="drop"), begin


def places(pairs: Pairs, begin: jax.Array, tiles: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return the indices of pairs in the scores of a block; those of other blocks are out of bounds.

    Args:
      pairs: pairs of a user and an item.
      begin: int32 scalar, the number of the first item of the block.
      tiles: N, the number of tiles in the block.
    """
    item_S = pairs.item_S - begin
    inside_S = (pairs.item_S >= 0) & (item_S >= 0) & (item_S < tiles * TILE)
    place_S = jnp.where(inside_S, item_S, tiles * TILE)
    return place_S // TILE, pairs.user_S, place_S % TILE


def _score(
    users_BE: jax.Array,
    vectors_XE: jax.Array,
    first_tile: jax.Array,
    tiles: int,
    items: jax.Array,
) -> jax.Array:
    """Scores the items of one block, which are numbered from the beginning of the block.

    Args:
      users_BE: f32, the vectors of the users.
      vectors_XE: f32, all vectors of this device.
      first_tile: int32 scalar, the number of the first tile of the block.
      tiles: N, the number of tiles in a block.
      items: int32 scalar; items from this number on are padding.
    """
    users_GPE = users_BE.reshape(-1, USERS, users_BE.shape[1])
    users = users_BE.shape[0]

    def one_tile(_, number: jax.Array) -> tuple[None, jax.Array]:
        row = (first_tile + number) * TILE
        tile_TE = jax.lax.dynamic_slice_in_dim(vectors_XE, row, TILE)
        scores_GPT = jax.lax.map(lambda users_PE: _product(users_PE, tile_TE), users_GPE)
        real_T = number * TILE + jnp.arange(TILE, dtype=jnp.int32) < items
        return None, jnp.where(real_T[None], scores_GPT.reshape(users, TILE), -jnp.inf)

    return jax.lax.scan(one_tile, None, jnp.arange(tiles, dtype=jnp.int32))[1]


def target_scores(
    users_BE: jax.Array, shard: Shard, target_B: jax.Array, bias_WB: jax.Array
) -> jax.Array:
    """Return f32 `[W, B]`: the score of each user's target, bit for bit the same as in its block.

    Args:
      users_BE: f32, the vectors of the users.
      shard: the items of this device.
      target_B: int32, the target of each user.
      bias_WB: f32, the biases of this pair.
    """
    targets_BE = _fetch(shard.vectors_XE, target_B - shard.first)
    width = users_BE.shape[1]

    def one_group(both: tuple[jax.Array, jax.Array]) -> jax.Array:
        users_PE, targets_PE = both
        return jnp.diagonal(_product(users_PE, pad_rows(targets_PE, TILE, 0)))

    shape = (-1, USERS, width)
    score_GP = jax.lax.map(one_group, (users_BE.reshape(shape), targets_BE.reshape(shape)))
    score_WB = score_GP.reshape(1, -1) + bias_WB
    # NaN becomes the lowest score, which is still above that of items that are left out.
    return jnp.where(jnp.isnan(score_WB), jnp.finfo(jnp.float32).min, score_WB)


def _product(users_PE: jax.Array, tile_TE: jax.Array) -> jax.Array:
    """Return f32 `[P, T]` scores; all scores are computed by this product."""
    # If XLA fused the computation of the operands into the product, the order of sums might change.
    users_PE, tile_TE = jax.lax.optimization_barrier((users_PE, tile_TE))
    scores_PT = jax.lax.dot_general(
        users_PE, tile_TE, (((1,), (1,)), ((), ())), precision=jax.lax.Precision.HIGHEST
    )
    # Sorting would distinguish -0 from 0, so -0 becomes 0.
    return jnp.where(scores_PT == 0, 0.0, scores_PT)


def _fetch(vectors_XE: jax.Array, row_B: jax.Array) -> jax.Array:
    """Return f32 `[B, E]` rows of whichever device has them; 0 for rows that no device has.

    Row numbers are relative to the first row of this device.
    """
    mine_B = (row_B >= 0) & (row_B < vectors_XE.shape[0])
    rows_BE = vectors_XE.at[jnp.where(mine_B, row_B, 0)].get(mode="clip")
    return jax.lax.psum(jnp.where(mine_B[:, None], rows_BE, 0), DATA_AXIS)


@overload
def pad_rows(x: jax.Array, rows: int, value: int) -> jax.Array: ...


@overload
def pad_rows(x: np.ndarray, rows: int, value: int) -> np.ndarray: ...


def pad_rows(x: np.ndarray | jax.Array, rows: int, value: int) -> np.ndarray | jax.Array:
    """Appends rows filled with `value`, so that there are `rows` rows."""
    widths = [(0, rows - x.shape[0])] + [(0, 0)] * (x.ndim - 1)
    if isinstance(x, jax.Array):
        return jnp.pad(x, widths, constant_values=value)
    # Unlike jnp.pad, np.pad does not compile a program for each shape.
    return np.pad(x, widths, constant_values=value)
