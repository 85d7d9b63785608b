"""Chooses the hardest of the sampled negatives: those that the model itself ranks highest.

Shapes: N pairs of a device, C sampled candidates, H chosen ones, E model width, K words of an item, R
queries of a block.
"""

import jax
import jax.numpy as jnp

from s2s_jax.config import LossConfig
from s2s_jax.model.loss import Pairs, Sampled, comparable

# Queries that are compared with all candidates at a time, so that memory stays small.
_BLOCK = 256


def hardest(config: LossConfig, pairs: Pairs, sampled: Sampled, axis: str | None) -> Sampled:
    """Return the `config.hard_negatives` candidates that are most similar to any query.

    A query is not compared with candidates of its own item. No gradient flows through the choice, as in
    the selection of semi-hard negatives (Schroff et al., "FaceNet: A unified embedding for face
    recognition and clustering", 2015) or of the top candidates of a model (Xiong et al., "Approximate
    nearest neighbor negative contrastive learning for dense text retrieval", 2021).

    Args:
      config: the similarity and the number to keep.
      pairs: the pairs of this device.
      sampled: the candidates.
      axis: inside `jax.shard_map`, the mesh axis whose devices all have these candidates and should
        choose the same; None: the choice is this device's own.

    Returns:
      The chosen candidates, the hardest first; all if there are no more than that.
    """
    assert config.hard_negatives is not None
    top_C = _highest(config, pairs, sampled)
    if axis is not None:
        top_C = jax.lax.pmax(top_C, axis)
    _, chosen_H = jax.lax.top_k(top_C, min(config.hard_negatives, len(top_C)))
    return jax.tree.map(lambda x: x[chosen_H], sampled)


def _highest(config: LossConfig, pairs: Pairs, sampled: Sampled) -> jax.Array:
    """Return `[C]`: the highest similarity of each candidate to a query of another item."""
    vectors_CE = jax.lax.stop_gradient(comparable(config, sampled.vectors_CE))
    queries_NE = jax.lax.stop_gradient(comparable(config, pairs.queries_NE))
    size = pairs.valid_N.size
    padded = size + -size % _BLOCK

    def blocks(x: jax.Array) -> jax.Array:
        filled = jnp.pad(x, [(0, padded - size)] + [(0, 0)] * (x.ndim - 1))
        return filled.reshape(-1, _BLOCK, *x.shape[1:])

    def compare(top_C: jax.Array, block: tuple) -> tuple[jax.Array, None]:
        queries_RE, valid_R, item_RK = block
        similar_RC = queries_RE @ vectors_CE.T
        counts_RC = valid_R[:, None]
        if item_RK is not None:
            assert sampled.item_CK is not None, (
                "sampled candidates have items where pairs have them"
            )
            same_RC = (item_RK[:, None] == sampled.item_CK[None]).all(axis=-1)
            counts_RC &= ~same_RC
        similar_RC = jnp.where(counts_RC, similar_RC, -jnp.inf)
        return jnp.maximum(top_C, similar_RC.max(axis=0)), None

    lowest_C = jnp.full_like(vectors_CE[:, 0], -jnp.inf)
    parts = jax.tree.map(blocks, (queries_NE, pairs.valid_N, pairs.item_NK))
    top_C, _ = jax.lax.scan(compare, lowest_C, parts)
    return top_C
