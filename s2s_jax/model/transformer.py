"""A causal pre-LN transformer in Flax NNX, with stacked and scanned layers.

Shapes: B batch, L positions, M = B L, E width (`hidden_size`), F feed-forward width, N heads, H head
width. Activations stay flat, `[B*L, E]`: with three axes, XLA's CPU backend inserts a transposing copy
before the weight gradient of every linear layer.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from s2s_jax.config import ModelConfig
from s2s_jax.model.attention import (
    Attention,
    Rotation,
    causal_attention,
    rotate,
    rotation,
    sequence_positions,
)

LAYER_NORM_EPS = 1e-5
_POSITION_STD = 0.02
# With unroll="auto", models of up to this many layers are unrolled. Each unrolled layer is compiled.
_MAX_UNROLLED = 16


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


def layer_norm(size: int, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """Return a layer norm, which is always computed in float32."""
    return nnx.LayerNorm(size, epsilon=LAYER_NORM_EPS, dtype=jnp.float32, rngs=rngs)


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


class CausalAttention(nnx.Module):
    """Multi-head attention of each position to itself and earlier positions."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        dtype = compute_dtype(config)
        self.qkv = linear(config.hidden_size, 3 * config.hidden_size, dtype, rngs)
        self.proj = linear(config.hidden_size, config.hidden_size, dtype, rngs)
        self.nhead = config.nhead
        self.dropout = config.dropout
        self.implementation: Attention = config.attention

    def __call__(
        self,
        x_ME: jax.Array,
        seq_len: int,
        keys: jax.Array | None,
        sequence_BL: jax.Array | None = None,
        turns: Rotation | None = None,
    ) -> jax.Array:
        """Attends within rows.

        Args:
          x_ME: `[B*L, E]` activations.
          seq_len: L.
          keys: the two random keys of dropout; None turns dropout off.
          sequence_BL: int32; positions attend only within their sequence. None: each row is one
            sequence.
          turns: the rotation of queries and keys; None: no rotary positions.

        Returns:
          `[B*L, E]`.
        """
        qkv_ME3 = self.qkv(x_ME)
        q, k, v = (
            part.reshape(-1, seq_len, self.nhead, part.shape[-1] // self.nhead)
            for part in jnp.split(qkv_ME3, 3, axis=-1)
        )
        if turns is not None:
            q, k = rotate(q, turns), rotate(k, turns)
        out_BLNH = causal_attention(q, k, v, sequence_BL, self.implementation)
        out_ME = out_BLNH.reshape(x_ME.shape)
        out_ME = dropout(out_ME, self.dropout, None if keys is None else keys[0])
        return dropout(self.proj(out_ME), self.dropout, None if keys is None else keys[1])


class FeedForward(nnx.Module):
    """The feed-forward part of a layer: linear, exact GELU, linear, dropout."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        dtype = compute_dtype(config)
        self.up = linear(config.hidden_size, config.dim_feedforward, dtype, rngs)
        self.down = linear(config.dim_feedforward, config.hidden_size, dtype, rngs)
        self.dropout = config.dropout

    def __call__(self, x_ME: jax.Array, key: jax.Array | None) -> jax.Array:
        """Applies the layers to activations; without a key of dropout, nothing is dropped."""
        x_MF = self.up(x_ME)
        # Faster than jax.nn.gelu(approximate=False), which goes through erfc.
        x_MF = 0.5 * x_MF * (1 + jax.lax.erf(x_MF * jnp.asarray(0.5**0.5, x_MF.dtype)))
        return dropout(self.down(x_MF), self.dropout, key)


class Layer(nnx.Module):
    """A pre-LN transformer layer."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.norm1 = layer_norm(config.hidden_size, rngs)
        self.attn = CausalAttention(config, rngs)
        self.norm2 = layer_norm(config.hidden_size, rngs)
        self.ffn = FeedForward(config, rngs)
        self.remat = config.remat
        self.prevent_cse = _prevent_cse(config)

    def __call__(
        self,
        x_ME: jax.Array,
        seq_len: int,
        keys: jax.Array | None,
        sequence_BL: jax.Array | None = None,
        turns: Rotation | None = None,
    ) -> jax.Array:
        """Runs the layer. The arguments are those of `CausalAttention`, with three keys of dropout."""

        def attend(x_ME: jax.Array, keys: jax.Array | None) -> jax.Array:
            return self.attn(self.norm1(x_ME), seq_len, keys, sequence_BL, turns)

        if self.remat == "attention":
            attend = jax.checkpoint(attend, prevent_cse=self.prevent_cse)
        x_ME = x_ME + attend(x_ME, None if keys is None else keys[:2])
        return x_ME + self.ffn(self.norm2(x_ME), None if keys is None else keys[2])


def layers_per_iteration(config: ModelConfig) -> int:
    """Return the number of layers in one iteration of the scan over layers.

    A scan collects what the layers save for the backward pass: it fills one array for all layers with
    zeros, writes each layer's part, and reads it back. On a GPU this takes a quarter of a step.
    """
    if config.unroll != "auto":
        return config.unroll
    return config.num_layers if config.remat == "none" and config.num_layers <= _MAX_UNROLLED else 1


def _prevent_cse(config: ModelConfig) -> bool:
    # The forward and the backward scan cannot share computations. Without a scan, XLA would see that the
    # recomputed values equal the first ones and keep those in memory after all.
    return layers_per_iteration(config) == config.num_layers


class Transformer(nnx.Module):
    """`num_layers` layers, with parameters stacked along a first axis, and a final layer norm.

    Before the first layer there can be learned positions (`position`), a layer norm (`input_norm`, as in
    Devlin et al., 2019), dropout (`input_dropout`), and dropout of whole events (`event_dropout`).
    """

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        @nnx.split_rngs(splits=config.num_layers)
        @nnx.vmap
        def stacked_layers(rngs: nnx.Rngs) -> Layer:
            return Layer(config, rngs)

        self.layers = stacked_layers(rngs)
        self.final_norm = layer_norm(config.hidden_size, rngs)
        if config.input_norm:
            self.input_norm = layer_norm(config.hidden_size, rngs)
        if config.position == "learned":
            shape = (config.seq_len, config.hidden_size)
            self.positions = nnx.Param(_POSITION_STD * jax.random.normal(rngs.params(), shape))
        self.config = config

    def __call__(
        self,
        x_ME: jax.Array,
        seq_len: int,
        key: jax.Array | None,
        sequence_BL: jax.Array | None = None,
        position_BL: jax.Array | None = None,
    ) -> jax.Array:
        """Runs the layers.

        Args:
          x_ME: `[B*L, E]`; padding must be at the end of each row, so that causality alone keeps real
            positions from attending to it.
          seq_len: L.
          key: the random key of dropout; None turns dropout off.
          sequence_BL: int32, the number of the packed sequence that a position belongs to; each sequence
            is encoded as if it were alone. None: each row is one sequence.
          position_BL: int32, position numbers for learned and rotary positions. None: they count from 0
            at the start of each sequence.

        Returns:
          f32 `[B*L, E]`.
        """
        config = self.config
        if position_BL is None:
            one_row = jnp.zeros((1, seq_len), jnp.int32)
            position_BL = sequence_positions(one_row if sequence_BL is None else sequence_BL)
        if config.position == "learned":
            assert seq_len <= config.seq_len, f"{seq_len} positions, {config.seq_len} learned"
            x_BLE = x_ME.reshape(-1, seq_len, x_ME.shape[-1])
            x_ME = (x_BLE + self.positions[...][position_BL].astype(x_ME.dtype)).reshape(x_ME.shape)
        if config.input_norm:
            x_ME = self.input_norm(x_ME).astype(x_ME.dtype)
        if key is not None:
            key, of_input = jax.random.split(key)
            x_ME = dropout(x_ME, config.input_dropout, of_input)
            x_ME = drop_rows(x_ME, config.event_dropout, jax.random.fold_in(of_input, 1))
        turns = None
        if config.position == "rope":
            turns = rotation(position_BL, config.hidden_size // config.nhead)
        graph, stacked = nnx.split(self.layers)
        keys = None if key is None else jax.random.split(key, (config.num_layers, 3))

        def run_layer(x_ME: jax.Array, layer: tuple) -> tuple[jax.Array, None]:
            params, layer_keys = layer
            return nnx.merge(graph, params)(x_ME, seq_len, layer_keys, sequence_BL, turns), None

        if config.remat == "full":
            run_layer = jax.checkpoint(run_layer, prevent_cse=_prevent_cse(config))
        x_ME, _ = jax.lax.scan(
            run_layer, x_ME, (stacked, keys), unroll=layers_per_iteration(config)
        )
        return self.final_norm(x_ME)
