"""Softmax cross-entropy where each device has a part of the candidates and sends it round a ring.

The maximum and the sum are updated as candidates pass (Milakov and Gimelshein, "Online normalizer
calculation for softmax", 2018). The backward pass sends the candidates round again, together with their
gradients, as ring attention does (Liu et al., "Ring attention with blockwise transformers for
near-infinite context", 2023).

Shapes: N queries, C candidates, A candidates of all devices, E width, K words of an item, G blocks of B
queries each.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from s2s_jax.model.softmax_blocks import (
    NO_GRADIENT,
    NO_LOGIT,
    Candidates,
    Outcome,
    Queries,
    Spread,
    add_to_spread,
    cut_queries,
    join_blocks,
    logits_of,
    negative_gradients,
    outcome_of,
    pick,
    query_gradients,
    shares_of,
    sums_of,
)


class _Online(NamedTuple):
    """Running sums of queries that have been scored against some of the candidates.

    Attributes:
      own: the positive's logit.
      top: the largest of the negatives' logits.
      rest: the sum of exp(logit - top) over the negatives.
      spread: what label smoothing needs; None without smoothing.
    """

    own: jax.Array
    top: jax.Array
    rest: jax.Array
    spread: Spread | None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def ring_sums(
    axis: str,
    smoothing: float,
    queries: Queries,
    candidates: Candidates,
    local: Candidates | None,
    temperature: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Computes the sums of `softmax_sums` where every device has a part of the candidates."""
    return _ring_forward(axis, smoothing, queries, candidates, local, temperature)[0]


def _ring_forward(
    axis: str,
    smoothing: float,
    queries: Queries,
    candidates: Candidates,
    local: Candidates | None,
    temperature: jax.Array,
) -> tuple:
    size = jax.lax.axis_size(axis)
    blocks = cut_queries(queries, _max_candidates(candidates, local), temperature)

    def one_step(carry: tuple, step: jax.Array) -> tuple[tuple, None]:
        vectors_CE, online = carry
        # Sent before use, so that sending overlaps with the products.
        coming_CE = _send_on(vectors_CE, axis)
        return (
            coming_CE,
            _update(online, blocks, *_at_step(candidates, vectors_CE, step, axis)),
        ), None

    own_GB = jnp.zeros_like(blocks.bias_N)
    spread = Spread(own_GB, own_GB) if smoothing > 0 else None
    online = _Online(own_GB, jnp.full_like(own_GB, NO_LOGIT), own_GB, spread)
    steps = jnp.arange(size - 1)
    (last_CE, online), _ = jax.lax.scan(one_step, (candidates.vectors_CE, online), steps)
    online = _update(online, blocks, *_at_step(candidates, last_CE, size - 1, axis))
    if local is not None:
        online = _update(online, blocks, local, None)
    shift_GB = jnp.maximum(online.top, online.own)
    rest_GB = online.rest * jnp.exp(online.top - shift_GB)
    outcome = outcome_of(
        online.own, online.top, shift_GB, rest_GB, blocks.valid_N, smoothing, online.spread
    )
    residuals = (queries, candidates, local, temperature, outcome)
    return sums_of(outcome.loss, outcome.hit), residuals


def _ring_backward(axis: str, smoothing: float, residuals: tuple, cotangents: tuple) -> tuple:
    del smoothing  # It is in the outcome.
    queries, candidates, local, temperature, outcome = residuals
    size, d_loss = jax.lax.axis_size(axis), cotangents[0]
    blocks = cut_queries(queries, _max_candidates(candidates, local), temperature)

    def one_step(carry: tuple, step: jax.Array) -> tuple[tuple, None]:
        vectors_CE, d_EC, d_GBE = carry
        coming_CE, d_EC = _send_on(vectors_CE, axis), _send_on(d_EC, axis)
        d_GBE, d_step_EC = _add_gradients(
            d_GBE, blocks, outcome, *_at_step(candidates, vectors_CE, step, axis)
        )
        return (coming_CE, d_EC + d_step_EC, d_GBE), None

    d_GBE = -outcome.lack[..., None] * blocks.positives_NE.astype(temperature.dtype)
    none_EC = jnp.zeros_like(candidates.vectors_CE.T, dtype=temperature.dtype)
    carry, _ = jax.lax.scan(one_step, (candidates.vectors_CE, none_EC, d_GBE), jnp.arange(size - 1))
    last_CE, d_EC, d_GBE = carry
    d_GBE, d_step_EC = _add_gradients(
        d_GBE, blocks, outcome, *_at_step(candidates, last_CE, size - 1, axis)
    )
    # After one more step, gradients are back on the device of their candidates.
    d_EC = _send_on(_send_on(d_EC, axis) + d_step_EC, axis)
    dtype, d_local = queries.vectors_NE.dtype, None
    if local is not None:
        d_GBE, d_local_EC = _add_gradients(d_GBE, blocks, outcome, local, None)
        d_local = Candidates((d_loss * d_local_EC.T).astype(dtype), NO_GRADIENT, NO_GRADIENT)
    lack_N, d_NE = join_blocks(outcome.lack, queries), join_blocks(d_GBE, queries)
    d_queries, d_temperature = query_gradients(
        queries.vectors_NE, temperature, lack_N, d_NE, d_loss
    )
    d_candidates = Candidates((d_loss * d_EC.T).astype(dtype), NO_GRADIENT, NO_GRADIENT)
    return d_queries, d_candidates, d_local, d_temperature


ring_sums.defvjp(_ring_forward, _ring_backward)


def _update(
    online: _Online, blocks: Queries, candidates: Candidates, first: jax.Array | None
) -> _Online:
    """Updates the running sums of all queries with some candidates; `[G, B]` arrays in and out."""

    def one_block(_: None, each: tuple[_Online, Queries]) -> tuple[None, _Online]:
        before, block = each
        raw_BC, logits_BC = logits_of(block, candidates, first)
        own_B = before.own
        if first is not None and block.own_N is not None:
            place_B = block.own_N - first
            here_B = (place_B >= 0) & (place_B < raw_BC.shape[1])
            own_B = jnp.where(here_B, pick(raw_BC, place_B) + block.bias_N, own_B)
        top_B = jnp.maximum(before.top, logits_BC.max(axis=-1))
        rest_B = jnp.exp(logits_BC - top_B[:, None]).sum(axis=-1)
        rest_B += before.rest * jnp.exp(before.top - top_B)
        return None, _Online(own_B, top_B, rest_B, add_to_spread(before.spread, logits_BC))

    return jax.lax.scan(one_block, None, (online, blocks))[1]


def _add_gradients(
    d_GBE: jax.Array,
    blocks: Queries,
    outcome: Outcome,
    candidates: Candidates,
    first: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """Adds the part of some candidates to the queries' gradients.

    Returns:
      The gradients of the queries, and those of the candidates.
    """

    def one_block(d_EC: jax.Array, each: tuple) -> tuple[jax.Array, jax.Array]:
        d_BE, block, outcome = each
        _, logits_BC = logits_of(block, candidates, first)
        shares_BC = shares_of(logits_BC, outcome)
        d_more_BE, d_more_EC = negative_gradients(shares_BC, block, candidates, outcome)
        return d_EC + d_more_EC, d_BE + d_more_BE

    none_EC = jnp.zeros_like(candidates.vectors_CE.T, dtype=d_GBE.dtype)
    d_EC, d_GBE = jax.lax.scan(one_block, none_EC, (d_GBE, blocks, outcome))
    return d_GBE, d_EC


def _at_step(
    candidates: Candidates, vectors_CE: jax.Array, step: jax.Array | int, axis: str
) -> tuple[Candidates, jax.Array]:
    """Return the candidates that a device holds after `step` steps, and the number of the first one."""
    rows = vectors_CE.shape[0]
    size = jax.lax.axis_size(axis)
    first = (jax.lax.axis_index(axis) + size - step) % size * rows
    _, bias_C, item_CK = jax.tree.map(
        lambda x: jax.lax.dynamic_slice_in_dim(x, first, rows), candidates._replace(vectors_CE=None)
    )
    return Candidates(vectors_CE, bias_C, item_CK), first


def _send_on(x: jax.Array, axis: str) -> jax.Array:
    size = jax.lax.axis_size(axis)
    return jax.lax.ppermute(x, axis, [(i, (i + 1) % size) for i in range(size)])


def _max_candidates(candidates: Candidates, local: Candidates | None) -> int:
    """Return the largest number of candidates that a device scores at a time."""
    return max(x.vectors_CE.shape[0] for x in (candidates, local) if x is not None)
