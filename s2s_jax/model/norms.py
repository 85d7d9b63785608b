"""Norms of states, and of the queries and keys of a head. All are computed in float32.

Shapes: B batch, L positions, N heads, H head width.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from s2s_jax.config import ModelConfig

# Added to the variance of a layer norm, and to the mean square of an RMS norm.
LAYER_NORM_EPS = 1e-5
# Added to the square of the length of a query or key.
LENGTH_EPS = 1e-6

Norm = nnx.LayerNorm | nnx.RMSNorm


def make_norm(config: ModelConfig, rngs: nnx.Rngs) -> Norm:
    """Return a norm of states, of the kind `config.norm`.

    A layer norm subtracts the mean and divides by the standard deviation. Then it multiplies by a
    learned scale (1 at first) and adds a learned bias (0 at first). An RMS norm divides by the root of
    the mean square and multiplies by a scale (Zhang & Sennrich, "Root mean square layer normalization",
    2019).
    """
    make = nnx.LayerNorm if config.norm == "layer" else nnx.RMSNorm
    return make(config.hidden_size, epsilon=LAYER_NORM_EPS, dtype=jnp.float32, rngs=rngs)


def to_length_one(x_BLNH: jax.Array) -> jax.Array:
    """Return the vectors of heads, divided by their lengths; the type stays the same."""
    exact_BLNH = x_BLNH.astype(jnp.float32)
    square_BLN1 = jnp.square(exact_BLNH).sum(axis=-1, keepdims=True)
    return (exact_BLNH * jax.lax.rsqrt(square_BLN1 + LENGTH_EPS)).astype(x_BLNH.dtype)
