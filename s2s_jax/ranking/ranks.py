"""Computes the exact rank of one item among all items, for each user.

Shapes: B users, E width, I items, R rows (I and padding), N tiles of T items in a block, L counters of a
user.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from s2s_jax.cluster.mesh import DATA_AXIS, replicated
from s2s_jax.data.items.seen import Seen
from s2s_jax.ranking.ranked_items import Bias, RankedItems, padded
from s2s_jax.ranking.scores import Biases, Pairs, pad_rows, score_block, shard_of, target_scores

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
      bias: what is added to the scores of some pairs; None: nothing.

    Raises:
      ValueError: shapes do not fit.
    """
    if target_B.shape != (len(users_BE),):
        raise ValueError(f"expected {len(users_BE)} targets, found shape {target_B.shape}")
    users, pairs, biases = padded(users_BE, seen, bias, ranked)
    target_B = np.asarray(target_B, np.int32)
    own_B = np.zeros(len(target_B), np.float32) if bias is None else bias.of(target_B)
    target, own = jax.device_put(
        (pad_rows(target_B, len(users), -1), pad_rows(own_B, len(users), 0)),
        replicated(ranked.mesh),
    )
    rank_B = _ranks(
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
    return rank_B[: len(users_BE)]


@functools.partial(jax.jit, static_argnames=("blocks", "mesh"))
def _ranks(
    users_BE: jax.Array,
    target_B: jax.Array,
    vectors_RE: jax.Array,
    items: int,
    seen: Pairs,
    biases: Biases,
    own_bias_B: jax.Array,
    blocks: int,
    mesh: Mesh,
) -> jax.Array:
    def on_device(users_BE, target_B, vectors_XE, items, seen, biases, own_bias_B):
        shard = shard_of(vectors_XE, blocks)
        score_B = target_scores(users_BE, shard, target_B, own_bias_B)
        # The target is excluded by its index, not by its score.
        user_B = jnp.arange(users_BE.shape[0], dtype=jnp.int32)
        left_out = Pairs(
            jnp.concatenate([seen.user_S, user_B]), jnp.concatenate([seen.item_S, target_B])
        )

        def visit(block: jax.Array, count_BL: jax.Array) -> jax.Array:
            scores_NBT, _ = score_block(users_BE, shard, block, items, left_out, biases)
            # Written in this way so that a NaN score counts as at least as large.
            at_least_NBT = ~(scores_NBT < score_B[None, :, None])
            lanes_NBXL = at_least_NBT.reshape(*at_least_NBT.shape[:2], -1, _LANES)
            return count_BL + jnp.where(lanes_NBXL, 1, 0).sum(axis=(0, 2))

        start = jnp.zeros((users_BE.shape[0], _LANES), jnp.int32)
        start = jax.lax.pcast(start, DATA_AXIS, to="varying")
        count_BL = jax.lax.fori_loop(0, blocks, visit, start)
        return jax.lax.psum(count_BL.sum(axis=1), DATA_AXIS)

    everywhere = PartitionSpec()
    mapped = jax.shard_map(
        on_device,
        mesh=mesh,
        in_specs=(everywhere, everywhere, PartitionSpec(DATA_AXIS), *(everywhere,) * 4),
        out_specs=everywhere,
    )
    rank_B = mapped(users_BE, target_B, vectors_RE, items, seen, biases, own_bias_B)
    return jnp.where((target_B >= 0) & (target_B < items), rank_B, items)
