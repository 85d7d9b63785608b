"""Causal attention in three implementations, chosen by platform.

Shapes: B batch, L positions, N heads, H head width, Q queries of a block, K keys that they may see.

Padding is at the end of each row, so causality alone keeps real positions from attending to it. In
rows that pack several sequences, `sequence_BL` says which positions belong together; a position attends
only within its own sequence.
"""

from typing import Literal

import jax
import jax.numpy as jnp

_Implementation = Literal["blocked", "cudnn", "xla"]
Attention = _Implementation | Literal["auto"]

# Queries scored together. At 64, the part of a block above the diagonal is small and matrix products
# are still large; 32 and 128 are 10% to 50% slower on CPUs.
_BLOCK = 64
# Finite, so that subtracting masked scores never gives NaN.
_MASKED = -1e30
# Head widths that cuDNN's fused attention supports on every GPU that has it.
_CUDNN_WIDTH_MULTIPLE, _CUDNN_MAX_WIDTH = 8, 128


def causal_attention(
    q_BLNH: jax.Array,
    k_BLNH: jax.Array,
    v_BLNH: jax.Array,
    sequence_BL: jax.Array | None = None,
    implementation: Attention = "auto",
) -> jax.Array:
    """Computes attention of each position to itself and earlier ones, with scores scaled by 1/sqrt(H).

    Args:
      q_BLNH: queries.
      k_BLNH: keys.
      v_BLNH: values.
      sequence_BL: int32; positions with different numbers do not see each other. None: each row is one
        sequence.
      implementation: "blocked" is `_blocked`; "cudnn" and "xla" are those of
        `jax.nn.dot_product_attention`; "auto" is what `choose` returns.

    Returns:
      `[B, L, N, H]`, of the same type as the inputs.
    """
    if implementation == "auto":
        implementation = choose(jax.default_backend(), q_BLNH.dtype, q_BLNH.shape[-1])
    if implementation == "blocked":
        # With the head axis next to the batch axis, the products need no further copies.
        heads_first = (x.swapaxes(1, 2) for x in (q_BLNH, k_BLNH, v_BLNH))
        return _blocked(*heads_first, sequence_BL).swapaxes(1, 2)
    mask_B1LL = None
    if sequence_BL is not None:
        mask_B1LL = (sequence_BL[:, :, None] == sequence_BL[:, None, :])[:, None]
    return jax.nn.dot_product_attention(
        q_BLNH, k_BLNH, v_BLNH, mask=mask_B1LL, is_causal=True, implementation=implementation
    )


def choose(backend: str, dtype: jnp.dtype, head_width: int) -> _Implementation:
    """Return the fastest implementation on `backend` for this type and head width."""
    if backend == "cpu":
        return "blocked"
    narrow = dtype in (jnp.bfloat16, jnp.float16)
    fits = head_width % _CUDNN_WIDTH_MULTIPLE == 0 and head_width <= _CUDNN_MAX_WIDTH
    return "cudnn" if backend == "gpu" and narrow and fits else "xla"


@jax.custom_vjp
def _blocked(
    q_BNLH: jax.Array, k_BNLH: jax.Array, v_BNLH: jax.Array, sequence_BL: jax.Array | None
) -> jax.Array:
    """Exact attention in blocks of queries; each block sees keys only up to its own end.

    This skips about half of the scores. The backward pass recomputes the others from the log-sum-exp of
    each query, as flash attention does (Dao et al., 2022). Otherwise a scan over layers would write all
    of them to memory and read them back.
    """
    return _blocked_forward(q_BNLH, k_BNLH, v_BNLH, sequence_BL)[0]


def _blocked_forward(
    q_BNLH: jax.Array, k_BNLH: jax.Array, v_BNLH: jax.Array, sequence_BL: jax.Array | None
) -> tuple[jax.Array, tuple]:
    outs, log_sums = [], []
    for begin, end in _blocks(q_BNLH.shape[2]):
        scores_BNKQ = _scores(q_BNLH, k_BNLH, sequence_BL, begin, end)
        top_BN1Q = scores_BNKQ.max(axis=2, keepdims=True)
        weights_BNKQ = jnp.exp(scores_BNKQ - top_BN1Q)
        sum_BN1Q = weights_BNKQ.sum(axis=2, keepdims=True)
        out_BNQH = _product("bnkq,bnkh->bnqh", weights_BNKQ, v_BNLH[:, :, :end])
        # Dividing by the sums after the product takes H instead of K divisions per query.
        outs.append(out_BNQH / sum_BN1Q.swapaxes(2, 3))
        log_sums.append(top_BN1Q + jnp.log(sum_BN1Q))
    out_BNLH = jnp.concatenate(outs, axis=2).astype(q_BNLH.dtype)
    log_sum_BN1L = jnp.concatenate(log_sums, axis=3)
    return out_BNLH, (q_BNLH, k_BNLH, v_BNLH, sequence_BL, out_BNLH, log_sum_BN1L)


def _blocked_backward(saved: tuple, d_out_BNLH: jax.Array) -> tuple:
    q_BNLH, k_BNLH, v_BNLH, sequence_BL, out_BNLH, log_sum_BN1L = saved
    seq_len, scale = q_BNLH.shape[2], q_BNLH.shape[-1] ** -0.5
    # The part of the gradient that is the same for all scores of a query.
    shared_BN1L = (d_out_BNLH.astype(jnp.float32) * out_BNLH).sum(axis=-1)[:, :, None]
    d_q, d_k, d_v = [], [], []
    for begin, end in _blocks(seq_len):
        scores_BNKQ = _scores(q_BNLH, k_BNLH, sequence_BL, begin, end)
        weights_BNKQ = jnp.exp(scores_BNKQ - log_sum_BN1L[..., begin:end])
        d_out_BNQH = d_out_BNLH[:, :, begin:end]
        d_weights_BNKQ = _product("bnkh,bnqh->bnkq", v_BNLH[:, :, :end], d_out_BNQH)
        d_scores_BNKQ = weights_BNKQ * (d_weights_BNKQ - shared_BN1L[..., begin:end]) * scale
        d_q.append(_product("bnkq,bnkh->bnqh", d_scores_BNKQ, k_BNLH[:, :, :end]))
        d_k_BNKH = _product("bnkq,bnqh->bnkh", d_scores_BNKQ, q_BNLH[:, :, begin:end])
        d_v_BNKH = _product("bnkq,bnqh->bnkh", weights_BNKQ, d_out_BNQH)
        later = ((0, 0), (0, 0), (0, seq_len - end), (0, 0))
        d_k.append(jnp.pad(d_k_BNKH, later))
        d_v.append(jnp.pad(d_v_BNKH, later))
    gradients = (jnp.concatenate(d_q, axis=2), sum(d_k[1:], d_k[0]), sum(d_v[1:], d_v[0]))
    return *(x_BNLH.astype(q_BNLH.dtype) for x_BNLH in gradients), None


_blocked.defvjp(_blocked_forward, _blocked_backward)


def _blocks(seq_len: int) -> list[tuple[int, int]]:
    return [(begin, min(begin + _BLOCK, seq_len)) for begin in range(0, seq_len, _BLOCK)]


def _scores(
    q_BNLH: jax.Array, k_BNLH: jax.Array, sequence_BL: jax.Array | None, begin: int, end: int
) -> jax.Array:
    """Return f32 `[B, N, K, Q]` scores of queries `begin` to `end` with keys up to `end`.

    Keys come before queries because the products of the backward pass sum over queries. With queries
    last, two of its five products need no transposed operand, which makes attention 10% faster.
    """
    scale = q_BNLH.shape[-1] ** -0.5
    scores_BNKQ = _product("bnkh,bnqh->bnkq", k_BNLH[:, :, :end], q_BNLH[:, :, begin:end]) * scale
    seen = (jnp.arange(end)[:, None] <= jnp.arange(begin, end)[None])[None]
    if sequence_BL is not None:
        seen &= sequence_BL[:, :end, None] == sequence_BL[:, None, begin:end]
    return jnp.where(seen[:, None], scores_BNKQ, _MASKED)


def _product(axes: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """Return the einsum of `a`, cast to the type of `b`, and `b`, accumulated in f32."""
    return jnp.einsum(axes, a.astype(b.dtype), b, preferred_element_type=jnp.float32)
