"""Softmax cross-entropy over many candidates, without the matrix of all logits in memory.

Queries are processed in blocks. If a device has all candidates, each block computes its gradients
together with its logits. This is possible because the loss is a sum. It takes three matrix products per
block, and nothing is computed twice. If every device has a part of the candidates, they are sent round a
ring of devices: see `softmax_ring`.

Shapes: N queries, C candidates, A candidates of all devices, E width, K words of an item, G blocks of B
queries each.
"""

import functools

import jax
import jax.numpy as jnp

from s2s_jax.model.softmax_blocks import (
    NO_GRADIENT,
    Candidates,
    Queries,
    cut_queries,
    join_blocks,
    negative_gradients,
    query_gradients,
    score,
    sum_type,
    sums_of,
)
from s2s_jax.model.softmax_ring import ring_sums


def softmax_sums(
    queries: Queries,
    candidates: Candidates,
    temperature: float | jax.Array,
    axis: str | None = None,
    local: Candidates | None = None,
    smoothing: float = 0.0,
) -> tuple[jax.Array, jax.Array]:
    """Computes the cross-entropy of each query's positive among itself and the query's negatives.

    Logits are dot products divided by temperature, plus biases. Products are summed in float32, or in
    float64 if the vectors are float64. All vectors and the temperature get gradients. If a positive is
    among the candidates, `positives_NE` gets its gradient as a positive, and `vectors_CE` its gradient
    as a negative of other queries.

    Args:
      queries: the queries of this device.
      candidates: the candidates of this device.
      temperature: number or scalar array.
      axis: inside `jax.shard_map`, the mesh axis round which candidates are sent; None: they are not
        sent.
      local: more candidates of this device, which are never sent; none of them is a positive.
      smoothing: the probability that the targets of the cross-entropy spread evenly over the positive
        and the query's negatives (label smoothing); the positive has the rest.

    Returns:
      Sums over the queries that count: the loss, and the number of positives above all negatives.
    """
    vectors_NE = queries.vectors_NE
    temperature = jnp.asarray(temperature, sum_type(vectors_NE))
    # shard_map must see all of these as varying over devices if the queries do.
    one = jnp.ones_like(vectors_NE, shape=(), dtype=jnp.int32)
    candidates, local, temperature = jax.tree.map(
        lambda x: x * one.astype(x.dtype), (candidates, local, temperature)
    )
    if axis is not None and jax.lax.axis_size(axis) > 1:
        return ring_sums(axis, smoothing, queries, candidates, local, temperature)
    if local is not None:
        candidates = jax.tree.map(lambda *x: jnp.concatenate(x), candidates, local)
    return _row_sums(smoothing, queries, candidates, temperature)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _row_sums(
    smoothing: float, queries: Queries, candidates: Candidates, temperature: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Computes the sums block by block, where a device has all candidates."""

    def one_block(_: None, block: Queries) -> tuple[None, tuple]:
        outcome, _shares_BC = score(block, candidates, smoothing)
        return None, (outcome.loss, outcome.hit)

    blocks = cut_queries(queries, candidates.vectors_CE.shape[0], temperature)
    _, (loss_GB, hit_GB) = jax.lax.scan(one_block, None, blocks)
    return sums_of(loss_GB, hit_GB)


def _row_forward(
    smoothing: float, queries: Queries, candidates: Candidates, temperature: jax.Array
) -> tuple:
    """Computes the sums together with their gradients."""

    def one_block(d_EC: jax.Array, block: Queries) -> tuple[jax.Array, tuple]:
        outcome, shares_BC = score(block, candidates, smoothing)
        d_BE, d_block_EC = negative_gradients(shares_BC, block, candidates, outcome)
        d_BE -= outcome.lack[:, None] * block.positives_NE
        return d_EC + d_block_EC, (outcome.loss, outcome.hit, outcome.lack, d_BE)

    blocks = cut_queries(queries, candidates.vectors_CE.shape[0], temperature)
    none_EC = jnp.zeros_like(candidates.vectors_CE.T, dtype=temperature.dtype)
    d_EC, (loss_GB, hit_GB, *of_queries) = jax.lax.scan(one_block, none_EC, blocks)
    lack_N, d_NE = (join_blocks(x, queries) for x in of_queries)
    residuals = (queries.vectors_NE, temperature, lack_N, d_NE, d_EC)
    return sums_of(loss_GB, hit_GB), residuals


def _row_backward(smoothing: float, residuals: tuple, cotangents: tuple) -> tuple:
    del smoothing  # The residuals are gradients.
    vectors_NE, temperature, lack_N, d_NE, d_EC = residuals
    d_loss = cotangents[0]
    d_queries, d_temperature = query_gradients(vectors_NE, temperature, lack_N, d_NE, d_loss)
    d_candidates = Candidates((d_loss * d_EC.T).astype(vectors_NE.dtype), NO_GRADIENT, NO_GRADIENT)
    return d_queries, d_candidates, d_temperature


_row_sums.defvjp(_row_forward, _row_backward)
