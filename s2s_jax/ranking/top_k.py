"""Finds the exact K best items of each user.

Shapes: B users, E width, R rows (items and padding), N tiles of T items in a block, C items of a chunk,
M chunks that are searched, K best items, S pairs of a user and an item, W weights.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from s2s_jax.cluster.mesh import DATA_AXIS, replicated
from s2s_jax.data.items.seen import Seen
from s2s_jax.ranking.ranked_items import Bias, RankedItems, no_bias, padded
from s2s_jax.ranking.scores import Biases, Pairs, places, score_block, shard_of

# Number of items in a chunk. Only the largest score of each chunk is sorted, so smaller chunks mean more
# sorting, and larger ones more searching.
_CHUNK = 32
# Numbers of chunks to search if few of them can improve a list, as is usual after the first blocks.
_FEW_CHUNKS = (8, 32)


class Best(NamedTuple):
    """The best items of each user: highest score first, for equal scores the lower index first.

    Attributes:
      index_BK: int32; -1 if fewer than K items are left.
      score_BK: f32; -inf where `index_BK` is -1.
    """

    index_BK: jax.Array
    score_BK: jax.Array


def top_k(
    users_BE: np.ndarray | jax.Array,
    ranked: RankedItems,
    k: int,
    seen: Seen | None = None,
    bias: Bias | None = None,
) -> Best:
    """Return the K best items of each user.

    Args:
      users_BE: f32, the vectors of the users; all numbers must be finite.
      ranked: the items.
      k: K, at least 1; it may exceed the number of items.
      seen: items that are left out; its users are indices into `users_BE`. None: no items are left out.
      bias: what is added to the scores of some pairs, with one weight; None: nothing.

    Raises:
      ValueError: shapes do not fit, or k is less than 1.

    Examples:
      >>> from s2s_jax.cluster.mesh import make_mesh
      >>> from s2s_jax.ranking.ranked_items import put_items
      >>> ranked = put_items(np.array([[1.0, 0], [0, 1], [0.5, 0]]), make_mesh(jax.devices()[:1]))
      >>> top_k(np.array([[2.0, 1]]), ranked, k=2).score_BK.tolist()
      [[2.0, 1.0]]
      >>> top_k(np.array([[2.0, 1]]), ranked, k=2).index_BK.tolist()  # of equals the first
      [[0, 1]]
    """
    (best,) = top_k_by_weight(users_BE, ranked, k, seen, no_bias() if bias is None else bias)
    return best


def top_k_by_weight(
    users_BE: np.ndarray | jax.Array, ranked: RankedItems, k: int, seen: Seen | None, bias: Bias
) -> list[Best]:
    """Return the result of `top_k` for each weight of a bias.

    The dot products are computed once for all weights.

    Raises:
      ValueError: shapes do not fit, or k is less than 1.
    """
    if k < 1:
        raise ValueError(f"expected k of at least 1, found {k}")
    users, pairs, biases = padded(users_BE, seen, bias, ranked)
    found = _top_k(
        users, ranked.vectors_RE, ranked.items, pairs, biases, k, ranked.blocks, ranked.mesh
    )
    count = len(users_BE)
    return [Best(*best) for best in zip(*(x_WBK[:, :count] for x_WBK in found), strict=True)]


@functools.partial(jax.jit, static_argnames=("k", "blocks", "mesh"))
def _top_k(
    users_BE: jax.Array,
    vectors_RE: jax.Array,
    items: int,
    seen: Pairs,
    biases: Biases,
    k: int,
    blocks: int,
    mesh: Mesh,
) -> Best:
    """Return the best items for each weight: `[W, B, K]`."""

    def on_device(users_BE, vectors_XE, items, seen, biases):
        shard = shard_of(vectors_XE, blocks)

        def visit(block: jax.Array, best: Best) -> Best:
            scores_NBT, begin = score_block(users_BE, shard, block, items, seen)
            at_S = places(biases.pairs, begin, shard.tiles)

            def improved(of_weight: tuple[Best, jax.Array]) -> Best:
                best, bias_S = of_weight
                return _improve(best, scores_NBT.at[at_S].add(bias_S, mode="drop"), begin)

            return jax.lax.map(improved, (best, biases.bias_WS))

        shape = (len(biases.bias_WS), users_BE.shape[0], k)
        start = Best(jnp.full(shape, -1, jnp.int32), jnp.full(shape, -jnp.inf))
        start = jax.lax.pcast(start, DATA_AXIS, to="varying")
        return jax.lax.fori_loop(0, blocks, visit, start)

    mapped = jax.shard_map(
        on_device,
        mesh=mesh,
        in_specs=(PartitionSpec(), PartitionSpec(DATA_AXIS), *(PartitionSpec(),) * 3),
        out_specs=PartitionSpec(None, None, DATA_AXIS),
    )
    # Items are numbered in the order of the devices, so the lower index still comes first among equal
    # scores.
    all_best = mapped(users_BE, vectors_RE, items, seen, biases)
    all_best = jax.lax.with_sharding_constraint(all_best, replicated(mesh))
    score_WBK, place_WBK = jax.lax.top_k(all_best.score_BK, k)
    index_WBK = jnp.take_along_axis(all_best.index_BK, place_WBK, axis=2)
    return Best(jnp.where(score_WBK == -jnp.inf, -1, index_WBK), score_WBK)


def _improve(best: Best, scores_NBT: jax.Array, begin: jax.Array) -> Best:
    """Merges the scores of one more block, whose items are numbered from `begin`, into the best items.

    Only chunks whose largest score beats a user's K-th best so far can improve that user's list, and of
    these only the K chunks with the largest such scores (for equal scores the earlier chunk): for every
    item elsewhere there are K better ones. The number of chunks needed is known before the search.
    """
    tiles, users, _ = scores_NBT.shape
    k = best.score_BK.shape[1]
    chunks_NBXC = scores_NBT.reshape(tiles, users, -1, _CHUNK)
    per_tile = chunks_NBXC.shape[2]
    greatest_BX = chunks_NBXC.max(axis=3).transpose(1, 0, 2).reshape(users, tiles * per_tile)
    needed = (greatest_BX > best.score_BK[:, -1:]).sum(axis=1).max()

    def look_into(count: int) -> Best:
        # In ascending order, so that the lower index comes first among equal scores.
        chunk_BM = jnp.sort(jax.lax.top_k(greatest_BX, count)[1], axis=1)
        user_B1 = jnp.arange(users)[:, None]
        found_BMC = chunks_NBXC[chunk_BM // per_tile, user_B1, chunk_BM % per_tile]
        within_C = jnp.arange(_CHUNK, dtype=jnp.int32)
        index_BMC = begin + chunk_BM[..., None] * _CHUNK + within_C[None, None]
        score = jnp.concatenate([best.score_BK, found_BMC.reshape(users, -1)], axis=1)
        index = jnp.concatenate([best.index_BK, index_BMC.reshape(users, -1)], axis=1)
        score_BK, place_BK = jax.lax.top_k(score, k)
        return Best(jnp.take_along_axis(index, place_BK, axis=1), score_BK)

    most = min(k, tiles * per_tile)
    counts = [*(count for count in _FEW_CHUNKS if count < most), most]
    branches = [lambda: best, *(functools.partial(look_into, count) for count in counts)]
    return jax.lax.switch(jnp.searchsorted(jnp.asarray([0, *counts[:-1]]), needed), branches)
