"""Binary cross-entropy over many candidates, block by block, calibrated for sampled negatives (gBCE).

Petrov and Macdonald, "gSASRec: reducing overconfidence in sequential recommendation trained with
negative sampling", 2023.

Shapes: N queries, C candidates, E width, B queries of a block.
"""

import functools

import jax
import jax.numpy as jnp

from s2s_jax.model.softmax_blocks import (
    NO_LOGIT,
    Candidates,
    Queries,
    cut_queries,
    logits_of,
    sum_type,
)


def positive_weight(calibration: float, drawn: int, uniform_share: jax.Array) -> jax.Array:
    """Return f32 scalar: the power beta of the positive's probability in gBCE.

    With sampling rate a (the share of the negatives that are drawn) and calibration t, this is
    `a (t (1 - 1/a) + 1/a)`. For t = 1, predicted probabilities are those of a model that was trained
    with all negatives; for t = 0, this is plain binary cross-entropy.

    Args:
      calibration: t, from 0 to 1.
      drawn: the number of items drawn for each query.
      uniform_share: f32 scalar, 1 / number of items.

    Examples:
      >>> float(positive_weight(0.75, 10, jnp.array(1 / 101)))
      0.325...
    """
    # Drawing with replacement, and drawing each item once, may also draw the positive.
    rate = jnp.minimum(drawn * uniform_share / jnp.maximum(1 - uniform_share, uniform_share), 1)
    return 1 - calibration * (1 - rate)


def binary_sums(
    queries: Queries, candidates: Candidates, temperature: float, weight: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Computes the binary cross-entropy of queries, and the number of hits.

    The loss of a query with positive s, weight w and n negatives s_i is
    `(w softplus(-s) + sum softplus(s_i)) / (n + 1)`, where s are products divided by the temperature.
    All vectors get gradients. The backward pass computes the logits of each block again.

    Args:
      queries: the queries of this device; their positives are not among the candidates.
      candidates: the candidates of this device.
      temperature: number by which products are divided.
      weight: f32 scalar, see `positive_weight`.

    Returns:
      Sums over the queries that count: the loss, and the number of positives above all negatives.
    """
    narrow, wide = queries.vectors_NE.dtype, sum_type(queries.vectors_NE)
    blocks = cut_queries(queries, len(candidates.vectors_CE), jnp.asarray(temperature, wide))
    # The gradients of all blocks are added up in this type.
    candidates = candidates._replace(vectors_CE=candidates.vectors_CE.astype(wide))

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def of_block(
        block: Queries, candidates: Candidates, weight: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        vectors_CE = candidates.vectors_CE.astype(narrow)
        _, logits_BC = logits_of(block, candidates._replace(vectors_CE=vectors_CE), None)
        own_B = (block.vectors_NE.astype(wide) * block.positives_NE.astype(wide)).sum(axis=-1)
        # A masked logit is so small that it adds nothing.
        negative_B = jax.nn.softplus(logits_BC).sum(axis=-1)
        count_B = (logits_BC > NO_LOGIT).sum(axis=-1, dtype=wide)
        loss_B = (weight * jax.nn.softplus(-own_B) + negative_B) / (count_B + 1)
        hit_B = (own_B > logits_BC.max(axis=-1)) & block.valid_N
        return jnp.where(block.valid_N, loss_B, 0).sum(), hit_B.sum(dtype=jnp.float32)

    def one_block(_: None, block: Queries) -> tuple[None, tuple[jax.Array, jax.Array]]:
        return None, of_block(block, candidates, weight)

    _, (loss_G, hits_G) = jax.lax.scan(one_block, None, blocks)
    return loss_G.sum(), hits_G.sum()
