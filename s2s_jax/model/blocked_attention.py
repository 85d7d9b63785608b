"""Exact causal attention in plain JAX, in blocks of queries; each block sees keys only up to its end.

This skips about half of the scores. The backward pass computes the others again, as flash attention does
(Dao et al., 2022). Otherwise a scan over layers would write all of them to memory and read them back.

Weights are the softmax of scores or, in HSTU, their SiLU.

Shapes: B batch, L positions, N heads, H head width, Q queries of a block, K keys that they may see.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from s2s_jax.model import time_bias
from s2s_jax.model.distance_bias import spread
from s2s_jax.model.time_bias import GapBias

# Queries scored together. At 64, the part of a block above the diagonal is small and matrix products
# are still large; 32 and 128 are 10% to 50% slower on CPUs.
BLOCK = 64
# Finite, so that subtracting masked scores never gives NaN.
_MASKED = -1e30


class _Inputs(NamedTuple):
    """The arguments of attention, see `softmax_blocked`."""

    q_BNLH: jax.Array
    k_BNLH: jax.Array
    v_BNLH: jax.Array
    sequence_BL: jax.Array | None
    bias_NL: jax.Array | None
    gaps: GapBias | None


@jax.custom_vjp
def softmax_blocked(
    q_BNLH: jax.Array,
    k_BNLH: jax.Array,
    v_BNLH: jax.Array,
    sequence_BL: jax.Array | None,
    bias_NL: jax.Array | None,
    gaps: GapBias | None,
) -> jax.Array:
    """Return `[B, N, L, H]`: the values, weighted with the softmax of scores scaled by 1/sqrt(H).

    The backward pass needs the log-sum-exp of the scores of each query.

    Args:
      q_BNLH: queries.
      k_BNLH: keys.
      v_BNLH: values.
      sequence_BL: int32; positions with different numbers do not see each other; None: all do.
      bias_NL: f32, added to the scaled scores by distance; None: nothing is.
      gaps: added to the scaled scores by time gap; None: nothing is.
    """
    return _softmax_forward(q_BNLH, k_BNLH, v_BNLH, sequence_BL, bias_NL, gaps)[0]


def _softmax_forward(
    q_BNLH: jax.Array,
    k_BNLH: jax.Array,
    v_BNLH: jax.Array,
    sequence_BL: jax.Array | None,
    bias_NL: jax.Array | None,
    gaps: GapBias | None,
) -> tuple[jax.Array, tuple]:
    inputs = _Inputs(q_BNLH, k_BNLH, v_BNLH, sequence_BL, bias_NL, gaps)
    outs, log_sums = [], []
    scale = q_BNLH.shape[-1] ** -0.5
    for begin, end in _blocks(inputs, BLOCK):
        scores_BNKQ = _masked_scores(inputs, begin, end, scale)
        top_BN1Q = scores_BNKQ.max(axis=2, keepdims=True)
        weights_BNKQ = jnp.exp(scores_BNKQ - top_BN1Q)
        sum_BN1Q = weights_BNKQ.sum(axis=2, keepdims=True)
        out_BNQH = _product("bnkq,bnkh->bnqh", weights_BNKQ, inputs.v_BNLH[:, :, :end])
        # Dividing by the sums after the product takes H instead of K divisions per query.
        outs.append(out_BNQH / sum_BN1Q.swapaxes(2, 3))
        log_sums.append(top_BN1Q + jnp.log(sum_BN1Q))
    out_BNLH = jnp.concatenate(outs, axis=2).astype(inputs.q_BNLH.dtype)
    log_sum_BN1L = jnp.concatenate(log_sums, axis=3)
    return out_BNLH, (inputs, out_BNLH, log_sum_BN1L)


def _softmax_backward(
    saved: tuple, d_out_BNLH: jax.Array
) -> tuple[jax.Array | GapBias | None, ...]:
    inputs, out_BNLH, log_sum_BN1L = saved
    scale = inputs.q_BNLH.shape[-1] ** -0.5
    # The part of the gradient that is the same for all scores of a query.
    shared_BN1L = (d_out_BNLH.astype(jnp.float32) * out_BNLH).sum(axis=-1)[:, :, None]

    def weigh(begin: int, end: int, d_weights_BNKQ: jax.Array) -> tuple[jax.Array, jax.Array]:
        weights_BNKQ = jnp.exp(
            _masked_scores(inputs, begin, end, scale) - log_sum_BN1L[..., begin:end]
        )
        return weights_BNKQ, weights_BNKQ * (d_weights_BNKQ - shared_BN1L[..., begin:end])

    return _gradients(inputs, d_out_BNLH, weigh, BLOCK, scale)


softmax_blocked.defvjp(_softmax_forward, _softmax_backward)


def _silu_attention(
    q_BNLH: jax.Array,
    k_BNLH: jax.Array,
    v_BNLH: jax.Array,
    sequence_BL: jax.Array | None,
    bias_NL: jax.Array | None,
    gaps: GapBias | None,
    block: int | None,
) -> jax.Array:
    """Return `[B, N, L, H]`: the sums of the values, weighted with the SiLU of scores.

    Scores are the products of queries and keys, without a factor.

    Args:
      q_BNLH: queries.
      k_BNLH: keys.
      v_BNLH: values.
      sequence_BL: see `softmax_blocked`.
      bias_NL: see `softmax_blocked`.
      gaps: see `softmax_blocked`.
      block: the number of queries that are scored together; None: all.
    """
    inputs = _Inputs(q_BNLH, k_BNLH, v_BNLH, sequence_BL, bias_NL, gaps)
    outs = []
    for begin, end in _blocks(inputs, block):
        scores_BNKQ, seen = _scores(inputs, begin, end, 1.0), _seen(inputs, begin, end)
        weights_BNKQ = jnp.where(seen, jax.nn.silu(scores_BNKQ), 0)
        outs.append(_product("bnkq,bnkh->bnqh", weights_BNKQ, v_BNLH[:, :, :end]))
    return jnp.concatenate(outs, axis=2).astype(q_BNLH.dtype)


silu_attention = jax.custom_vjp(_silu_attention, nondiff_argnums=(6,))


def _silu_forward(
    q_BNLH: jax.Array,
    k_BNLH: jax.Array,
    v_BNLH: jax.Array,
    sequence_BL: jax.Array | None,
    bias_NL: jax.Array | None,
    gaps: GapBias | None,
    block: int | None,
) -> tuple[jax.Array, _Inputs]:
    inputs = _Inputs(q_BNLH, k_BNLH, v_BNLH, sequence_BL, bias_NL, gaps)
    return _silu_attention(*inputs, block), inputs


def _silu_backward(
    block: int | None, inputs: _Inputs, d_out_BNLH: jax.Array
) -> tuple[jax.Array | GapBias | None, ...]:
    def weigh(begin: int, end: int, d_weights_BNKQ: jax.Array) -> tuple[jax.Array, jax.Array]:
        scores_BNKQ, seen = _scores(inputs, begin, end, 1.0), _seen(inputs, begin, end)
        # The slope of x sigmoid(x) is sigmoid(x) + x sigmoid(x) (1 - sigmoid(x)).
        sigmoid_BNKQ = jnp.where(seen, jax.nn.sigmoid(scores_BNKQ), 0)
        weights_BNKQ = scores_BNKQ * sigmoid_BNKQ
        slopes_BNKQ = sigmoid_BNKQ + weights_BNKQ * (1 - sigmoid_BNKQ)
        return weights_BNKQ, d_weights_BNKQ * slopes_BNKQ

    return _gradients(inputs, d_out_BNLH, weigh, block, 1.0)


silu_attention.defvjp(_silu_forward, _silu_backward)


def _gradients(
    inputs: _Inputs,
    d_out_BNLH: jax.Array,
    weigh: Callable[[int, int, jax.Array], tuple[jax.Array, jax.Array]],
    block: int | None,
    scale: float,
) -> tuple[jax.Array | GapBias | None, ...]:
    """Return the gradients of the inputs.

    Args:
      inputs: the inputs.
      d_out_BNLH: the gradient of the output.
      weigh: the function from the begin and the end of a block, and the gradient of its weights, to its
        weights and the gradient of its scores, all `[B, N, K, Q]`.
      block: the number of queries of a block; None: all.
      scale: what the products of queries and keys are multiplied by.
    """
    q_BNLH, k_BNLH, v_BNLH, _, bias_NL, gaps = inputs
    seq_len = q_BNLH.shape[2]
    d_q, d_k, d_v, d_bias, d_table = [], [], [], [], []
    for begin, end in _blocks(inputs, block):
        d_out_BNQH = d_out_BNLH[:, :, begin:end]
        d_weights_BNKQ = _product("bnkh,bnqh->bnkq", v_BNLH[:, :, :end], d_out_BNQH)
        weights_BNKQ, d_biased_BNKQ = weigh(begin, end, d_weights_BNKQ)
        d_scores_BNKQ = d_biased_BNKQ * scale
        d_q.append(_product("bnkq,bnkh->bnqh", d_scores_BNKQ, k_BNLH[:, :, :end]))
        d_k_BNKH = _product("bnkq,bnqh->bnkh", d_scores_BNKQ, q_BNLH[:, :, begin:end])
        d_v_BNKH = _product("bnkq,bnqh->bnkh", weights_BNKQ, d_out_BNQH)
        later = ((0, 0), (0, 0), (0, seq_len - end), (0, 0))
        d_k.append(jnp.pad(d_k_BNKH, later))
        d_v.append(jnp.pad(d_v_BNKH, later))
        if bias_NL is not None:
            _, pull = jax.vjp(lambda b_NL, x=begin, y=end: spread(b_NL, x, y), bias_NL)
            d_bias.append(pull(d_biased_BNKQ.sum(axis=0))[0])
        if gaps is not None:
            d_table.append(time_bias.gradient_of_block(gaps, begin, end, d_biased_BNKQ))
    of_queries = jnp.concatenate(d_q, axis=2), sum(d_k[1:], d_k[0]), sum(d_v[1:], d_v[0])
    of_bias = None if bias_NL is None else sum(d_bias[1:], d_bias[0])
    of_gaps = (
        None if gaps is None else gaps._replace(table_NS=sum(d_table[1:], d_table[0]), time_BL=None)
    )
    return *(x_BNLH.astype(q_BNLH.dtype) for x_BNLH in of_queries), None, of_bias, of_gaps


def _blocks(inputs: _Inputs, block: int | None) -> list[tuple[int, int]]:
    seq_len = inputs.q_BNLH.shape[2]
    if block is None:
        return [(0, seq_len)]
    return [(begin, min(begin + block, seq_len)) for begin in range(0, seq_len, block)]


def _scores(inputs: _Inputs, begin: int, end: int, scale: float) -> jax.Array:
    """Return f32 `[B, N, K, Q]` scores of queries `begin` to `end` with keys up to `end`.

    Keys come before queries because the products of the backward pass sum over queries. With queries
    last, two of its five products need no transposed operand, which makes attention 10% faster.
    """
    q_BNLH, k_BNLH, _, _, bias_NL, gaps = inputs
    scores_BNKQ = _product("bnkh,bnqh->bnkq", k_BNLH[:, :, :end], q_BNLH[:, :, begin:end]) * scale
    if bias_NL is not None:
        scores_BNKQ += spread(bias_NL, begin, end)[None]
    if gaps is not None:
        scores_BNKQ += time_bias.of_block(gaps, begin, end)
    return scores_BNKQ


def _seen(inputs: _Inputs, begin: int, end: int) -> jax.Array:
    """Return bool `[B, 1, K, Q]`, or `[1, 1, K, Q]` for all rows: which keys a query sees."""
    seen = (jnp.arange(end)[:, None] <= jnp.arange(begin, end)[None])[None]
    if inputs.sequence_BL is not None:
        sequence_BL = inputs.sequence_BL
        seen &= sequence_BL[:, :end, None] == sequence_BL[:, None, begin:end]
    return seen[:, None]


def _masked_scores(inputs: _Inputs, begin: int, end: int, scale: float) -> jax.Array:
    return jnp.where(_seen(inputs, begin, end), _scores(inputs, begin, end, scale), _MASKED)


def _product(axes: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """Return the einsum of `a`, cast to the type of `b`, and `b`, accumulated in f32."""
    return jnp.einsum(axes, a.astype(b.dtype), b, preferred_element_type=jnp.float32)
