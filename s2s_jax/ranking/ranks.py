"""Computes the exact rank of one item among all items, for each user.

Shapes: B users, E width, I items, R rows (I and padding), N tiles of T items in a block, L counters of a
user, S pairs of a user and an item, W weights.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from s2s_jax.cluster.mesh import DATA_AXIS, replicated
from s2s_jax.data.items.seen import Seen
from s2s_jax.ranking.ranked_items import Bias, RankedItems, no_bias, padded
from s2s_jax.ranking.scores import (
    Biases,
    Pairs,
    pad_rows,
    places,
    score_block,
    shard_of,
    target_scores,
)

# Number of independent counters of a user. A sum into a single number would not be vectorized.
_LANES = 64


def ranks(
    users_BE: np.ndarray | jax.Array,
    target_B: np.ndarray | jax.Array,
    ranked: RankedItems,
    seen: Seen | None = None,
    bias: Bias | None = None,
) -> jax.Array:
    """Return int32 `[B]`: the number of other items that score at least as high as the user's target.

    Rank 0 is the best.

    Args:
      users_BE: f32, the vectors of the users.
      target_B: int32, the target item of each user; an item outside the catalogue has rank I.
      ranked: the items.
      seen: items that are left out, as in `top_k.top_k`; the target is ranked even if it is one of them.
      bias: what is added to the scores of some pairs, with one weight; None: nothing.

    Raises:
      ValueError: shapes do not fit.
    """
    (rank_B,) = ranks_by_weight(
        users_BE, target_B, ranked, seen, no_bias() if bias is None else bias
    )
    return rank_B


def ranks_by_weight(
    users_BE: np.ndarray | jax.Array,
    target_B: np.ndarray | jax.Array,
    ranked: RankedItems,
    seen: Seen | None,
    bias: Bias,
) -> jax.Array:
    """Return int32 `[W, B]`: the result of `ranks` for each weight of a bias.

    The dot products are computed once for all weights.

    Raises:
      ValueError: shapes do not fit.
    """
    if target_B.shape != (len(users_BE),):
        raise ValueError(f"expected {len(users_BE)} targets, found shape {target_B.shape}")
    users, pairs, biases = padded(users_BE, seen, bias, ranked)
    target_B = np.asarray(target_B, np.int32)
    own_WB = np.pad(bias.of(target_B), ((0, 0), (0, len(users) - len(target_B))))
    target, own = jax.device_put(
        (pad_rows(target_B, len(users), -1), own_WB), replicated(ranked.mesh)
    )
    rank_WB = _ranks(
        users,
        target,
        ranked.vectors_RE,
        ranked.items,
        pairs,
        biases,
        own,
        ranked.blocks,
        ranked.mesh,
    )
    return rank_WB[:, : len(users_BE)]


@functools.partial(jax.jit, static_argnames=("blocks", "mesh"))
def _ranks(
    users_BE: jax.Array,
    target_B: jax.Array,
    vectors_RE: jax.Array,
    items: int,
    seen: Pairs,
    biases: Biases,
    own_bias_WB: jax.Array,
    blocks: int,
    mesh: Mesh,
) -> jax.Array:
    def on_device(users_BE, target_B, vectors_XE, items, seen, biases, own_bias_WB):
        shard = shard_of(vectors_XE, blocks)
        score_WB = target_scores(users_BE, shard, target_B, own_bias_WB)
        # The target is excluded by its index, not by its score.
        user_B = jnp.arange(users_BE.shape[0], dtype=jnp.int32)
        left_out = Pairs(
            jnp.concatenate([seen.user_S, user_B]), jnp.concatenate([seen.item_S, target_B])
        )

        def visit(block: jax.Array, counts: tuple[jax.Array, jax.Array]) -> tuple:
            count_WBL, more_WB = counts
            scores_NBT, begin = score_block(users_BE, shard, block, items, left_out)
            lanes = [_lanes(scores_NBT, score_B) for score_B in score_WB]
            more_WB += _of_biases(scores_NBT, score_WB, biases, begin)
            return count_WBL + jnp.stack(lanes), more_WB

        shape = score_WB.shape
        start = (jnp.zeros((*shape, _LANES), jnp.int32), jnp.zeros(shape, jnp.int32))
        start = jax.lax.pcast(start, DATA_AXIS, to="varying")
        count_WBL, more_WB = jax.lax.fori_loop(0, blocks, visit, start)
        return jax.lax.psum(count_WBL.sum(axis=2) + more_WB, DATA_AXIS)

    everywhere = PartitionSpec()
    mapped = jax.shard_map(
        on_device,
        mesh=mesh,
        in_specs=(everywhere, everywhere, PartitionSpec(DATA_AXIS), *(everywhere,) * 4),
        out_specs=everywhere,
    )
    rank_WB = mapped(users_BE, target_B, vectors_RE, items, seen, biases, own_bias_WB)
    return jnp.where((target_B >= 0) & (target_B < items), rank_WB, items)


def _lanes(scores_NBT: jax.Array, score_B: jax.Array) -> jax.Array:
    """Return int32 `[B, L]`, whose sum over L is how many scores are at least as large as the user's."""
    at_least_NBT = _at_least(scores_NBT, score_B[None, :, None])
    lanes_NBXL = at_least_NBT.reshape(*at_least_NBT.shape[:2], -1, _LANES)
    return jnp.where(lanes_NBXL, 1, 0).sum(axis=(0, 2))


def _of_biases(
    scores_NBT: jax.Array, score_WB: jax.Array, biases: Biases, begin: jax.Array
) -> jax.Array:
    """Return int32 `[W, B]`: how many more scores of a block are at least as large with the biases."""
    pairs = biases.pairs
    at_S = places(pairs, begin, scores_NBT.shape[0])
    # With -inf, pairs of other blocks count neither with nor without a bias.
    score_1S = scores_NBT.at[at_S].get(mode="fill", fill_value=-jnp.inf)[None]
    own_WS = score_WB[:, pairs.user_S]
    with_WS = _at_least(score_1S + biases.bias_WS, own_WS)
    more_WS = with_WS.astype(jnp.int32) - _at_least(score_1S, own_WS).astype(jnp.int32)
    return jnp.zeros(score_WB.shape, jnp.int32).at[:, pairs.user_S].add(more_WS)


def _at_least(scores: jax.Array, own: jax.Array) -> jax.Array:
    # Written in this way so that a NaN score counts as at least as large.
    return ~(scores < own)
