"""Linear layers with PyTorch's initial values, and the type in which they compute."""

import jax
import jax.numpy as jnp
from flax import nnx

from s2s_jax.config import ModelConfig


def compute_dtype(config: ModelConfig) -> jnp.dtype:
    """Return the type that `config.dtype` stands for on this machine."""
    if config.dtype == "auto":
        return jnp.dtype("float32" if jax.default_backend() == "cpu" else "bfloat16")
    return jnp.dtype(config.dtype)


def linear(size_in: int, size_out: int, dtype: jnp.dtype, rngs: nnx.Rngs) -> nnx.Linear:
    """Return a linear layer with PyTorch's initial values: uniform in ±1/sqrt(size_in)."""
    bound = size_in**-0.5

    def init(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return nnx.Linear(size_in, size_out, dtype=dtype, kernel_init=init, bias_init=init, rngs=rngs)
