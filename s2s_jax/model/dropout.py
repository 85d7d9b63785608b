"""Dropout of single numbers and of whole events.

Shapes: M positions of a batch, E model width.
"""

import jax
import jax.numpy as jnp


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Zeroes elements with probability `rate` and scales the others; does nothing without a key."""
    if key is None or rate == 0:
        return x
    kept = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(kept, x / (1 - rate), 0).astype(x.dtype)


def drop_rows(x_ME: jax.Array, rate: float, key: jax.Array) -> jax.Array:
    """Zeroes whole rows with probability `rate`; the others stay as they are."""
    if rate == 0:
        return x_ME
    kept_M1 = jax.random.bernoulli(key, 1 - rate, (x_ME.shape[0], 1))
    return jnp.where(kept_M1, x_ME, 0)
