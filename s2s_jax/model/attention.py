"""Causal attention in three implementations, chosen by platform.

Shapes: B batch, L positions, N heads, H head width.

Padding is at the end of each row, so causality alone keeps real positions from attending to it. In
rows that pack several sequences, `sequence_BL` says which positions belong together; a position attends
only within its own sequence.
"""

from typing import Literal

import jax
import jax.numpy as jnp

from s2s_jax.model import time_bias
from s2s_jax.model.blocked_attention import BLOCK, silu_attention, softmax_blocked
from s2s_jax.model.distance_bias import spread
from s2s_jax.model.time_bias import GapBias

_Implementation = Literal["blocked", "cudnn", "xla"]
Attention = _Implementation | Literal["auto"]
Weights = Literal["softmax", "silu"]

# Head widths that cuDNN's fused attention supports on every GPU that has it.
_CUDNN_WIDTH_MULTIPLE, _CUDNN_MAX_WIDTH = 8, 128


def causal_attention(
    q_BLNH: jax.Array,
    k_BLNH: jax.Array,
    v_BLNH: jax.Array,
    sequence_BL: jax.Array | None = None,
    implementation: Attention = "auto",
    bias_NL: jax.Array | None = None,
    weights: Weights = "softmax",
    gaps: GapBias | None = None,
) -> jax.Array:
    """Computes attention of each position to itself and earlier ones.

    Args:
      q_BLNH: queries.
      k_BLNH: keys.
      v_BLNH: values.
      sequence_BL: int32; positions with different numbers do not see each other. None: each row is one
        sequence.
      implementation: "blocked" is that of `blocked_attention`; "cudnn" and "xla" are those of
        `jax.nn.dot_product_attention`, or for "silu" all scores at once; "auto" is what `choose`
        returns.
      bias_NL: f32, what is added to the scores of a head, by the distance from the query back to the
        key. None: nothing.
      weights: how values are weighted. "softmax": by the softmax of the products of queries and keys,
        scaled by 1/sqrt(H); "silu": by the SiLU of the products, as in HSTU.
      gaps: what is added to the scores of a head by time gaps. None: nothing.

    Returns:
      `[B, L, N, H]`, of the same type as the inputs.
    """
    if implementation == "auto":
        backend, head_width = jax.default_backend(), q_BLNH.shape[-1]
        is_plain = bias_NL is None and gaps is None and weights == "softmax"
        implementation = choose(backend, q_BLNH.dtype, head_width, is_plain)
    # With the head axis next to the batch axis, the products need no further copies.
    q, k, v = (jnp.swapaxes(x_BLNH, 1, 2) for x_BLNH in (q_BLNH, k_BLNH, v_BLNH))
    if weights == "silu":
        assert implementation != "cudnn", "cuDNN has no attention without softmax"
        block = BLOCK if implementation == "blocked" else None
        return silu_attention(q, k, v, sequence_BL, bias_NL, gaps, block).swapaxes(1, 2)
    if implementation == "blocked":
        return softmax_blocked(q, k, v, sequence_BL, bias_NL, gaps).swapaxes(1, 2)
    mask_B1LL = None
    if sequence_BL is not None:
        mask_B1LL = (sequence_BL[:, :, None] == sequence_BL[:, None, :])[:, None]
    seq_len, bias_BNLL = q_BLNH.shape[1], None
    # Queries come before keys here.
    if bias_NL is not None:
        bias_BNLL = spread(bias_NL, 0, seq_len).swapaxes(1, 2)[None]
    if gaps is not None:
        of_gaps_BNLL = time_bias.of_block(gaps, 0, seq_len).swapaxes(2, 3)
        bias_BNLL = of_gaps_BNLL if bias_BNLL is None else bias_BNLL + of_gaps_BNLL
    return jax.nn.dot_product_attention(
        q_BLNH,
        k_BLNH,
        v_BLNH,
        bias_BNLL,
        mask_B1LL,
        is_causal=True,
        implementation=implementation,
    )


def choose(
    backend: str, dtype: jnp.dtype, head_width: int, is_plain: bool = True
) -> _Implementation:
    """Return the fastest implementation on `backend` for this type and head width.

    cuDNN is only chosen for plain attention: softmax without a bias. It has no other weights than
    softmax, and would read the bias of all pairs of positions from memory, which was not tried.
    """
    if backend == "cpu":
        return "blocked"
    narrow = dtype in (jnp.bfloat16, jnp.float16)
    fits = head_width % _CUDNN_WIDTH_MULTIPLE == 0 and head_width <= _CUDNN_MAX_WIDTH
    fused = backend == "gpu" and narrow and fits and is_plain
    return "cudnn" if fused else "xla"
