"""Causal attention in three implementations, chosen by platform.

Shapes: B batch, L positions, N heads, H head width.

Padding is at the end of each row, so causality alone keeps real positions from attending to it. In
rows that pack several sequences, `sequence_BL` says which positions belong together; a position attends
only within its own sequence.
"""

from typing import Literal

import jax
import jax.numpy as jnp

from s2s_jax.model.blocked_attention import softmax_blocked
from s2s_jax.model.distance_bias import spread

_Implementation = Literal["blocked", "cudnn", "xla"]
Attention = _Implementation | Literal["auto"]

# Head widths that cuDNN's fused attention supports on every GPU that has it.
_CUDNN_WIDTH_MULTIPLE, _CUDNN_MAX_WIDTH = 8, 128


def causal_attention(
    q_BLNH: jax.Array,
    k_BLNH: jax.Array,
    v_BLNH: jax.Array,
    sequence_BL: jax.Array | None = None,
    implementation: Attention = "auto",
    bias_NL: jax.Array | None = None,
) -> jax.Array:
    """Computes attention of each position to itself and earlier ones, with scores scaled by 1/sqrt(H).

    Args:
      q_BLNH: queries.
      k_BLNH: keys.
      v_BLNH: values.
      sequence_BL: int32; positions with different numbers do not see each other. None: each row is one
        sequence.
      implementation: "blocked" is that of `blocked_attention`; "cudnn" and "xla" are those of
        `jax.nn.dot_product_attention`; "auto" is what `choose` returns.
      bias_NL: f32, what is added to the scaled scores of a head, by the distance from the query back to
        the key. None: nothing.

    Returns:
      `[B, L, N, H]`, of the same type as the inputs.
    """
    if implementation == "auto":
        backend, head_width = jax.default_backend(), q_BLNH.shape[-1]
        implementation = choose(backend, q_BLNH.dtype, head_width, bias_NL is not None)
    if implementation == "blocked":
        # With the head axis next to the batch axis, the products need no further copies.
        heads_first = (x.swapaxes(1, 2) for x in (q_BLNH, k_BLNH, v_BLNH))
        return softmax_blocked(*heads_first, sequence_BL, bias_NL).swapaxes(1, 2)
    mask_B1LL = None
    if sequence_BL is not None:
        mask_B1LL = (sequence_BL[:, :, None] == sequence_BL[:, None, :])[:, None]
    bias_1NLL = None
    if bias_NL is not None:
        # Queries come before keys here.
        bias_1NLL = spread(bias_NL, 0, q_BLNH.shape[1]).swapaxes(1, 2)[None]
    return jax.nn.dot_product_attention(
        q_BLNH,
        k_BLNH,
        v_BLNH,
        bias_1NLL,
        mask_B1LL,
        is_causal=True,
        implementation=implementation,
    )


def choose(
    backend: str, dtype: jnp.dtype, head_width: int, has_bias: bool = False
) -> _Implementation:
    """Return the fastest implementation on `backend` for this type and head width.

    With a bias it is never cuDNN, which would read the bias of all pairs of positions from memory, and
    was not tried.
    """
    if backend == "cpu":
        return "blocked"
    narrow = dtype in (jnp.bfloat16, jnp.float16)
    fits = head_width % _CUDNN_WIDTH_MULTIPLE == 0 and head_width <= _CUDNN_MAX_WIDTH
    fused = backend == "gpu" and narrow and fits and not has_bias
    return "cudnn" if fused else "xla"
