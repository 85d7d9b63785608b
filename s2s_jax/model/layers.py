"""The layers of the transformer: attention and a feed-forward part, each added to the states.

Shapes: B batch, L positions, M = B L, E width (`hidden_size`), F feed-forward width, N heads, H head
width.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from s2s_jax.config import ModelConfig
from s2s_jax.model.attention import Attention, Weights, causal_attention
from s2s_jax.model.distance_bias import BUCKET_BEGINS, bias_of_distances
from s2s_jax.model.dropout import dropout
from s2s_jax.model.linear import compute_dtype, linear
from s2s_jax.model.norms import Norm, make_norm, to_length_one
from s2s_jax.model.positions import Rotation, rotate
from s2s_jax.model.time_bias import BUCKETS, GapBias

# Several random keys, or None to turn dropout off.
Keys = jax.Array | None


class Heads(nnx.Module):
    """What the heads of a layer do with queries, keys and values."""

    def __init__(self, config: ModelConfig):
        self.nhead = config.nhead
        self.implementation: Attention = config.attention
        self.weights: Weights = "silu" if config.layer == "hstu" else "softmax"
        self.qk_norm = config.qk_norm
        if config.qk_norm:
            first = math.log2(config.seq_len**2 - config.seq_len)
            self.qk_scale = nnx.Param(jnp.full((config.nhead,), first))
        self.biased = config.distance_bias
        if config.distance_bias:
            self.distance_bias = nnx.Param(jnp.zeros((config.nhead, len(BUCKET_BEGINS))))
        self.timed = config.time_bias is not None
        if self.timed:
            self.time_bias = nnx.Param(jnp.zeros((config.nhead, BUCKETS)))

    def __call__(
        self,
        q_ME: jax.Array,
        k_ME: jax.Array,
        v_ME: jax.Array,
        seq_len: int,
        sequence_BL: jax.Array | None,
        turns: Rotation | None,
        time_BL: jax.Array | None,
    ) -> jax.Array:
        """Return `[B*L, E]`: the outputs of the heads next to each other.

        Args:
          q_ME: queries of all heads, next to each other.
          k_ME: keys.
          v_ME: values.
          seq_len: L.
          sequence_BL: see `CausalAttention`.
          turns: see `CausalAttention`.
          time_BL: see `CausalAttention`.
        """
        q, k, v = (
            x_ME.reshape(-1, seq_len, self.nhead, x_ME.shape[-1] // self.nhead)
            for x_ME in (q_ME, k_ME, v_ME)
        )
        if self.qk_norm:
            scale_N = self.qk_scale[...]
            if self.weights == "softmax":
                # Attention divides by sqrt(H).
                scale_N = scale_N * q.shape[-1] ** 0.5
            scale_11N1 = scale_N[None, None, :, None]
            q, k = (to_length_one(q) * scale_11N1).astype(q.dtype), to_length_one(k)
        if turns is not None:
            q, k = rotate(q, turns), rotate(k, turns)
        bias_NL = bias_of_distances(self.distance_bias[...], seq_len) if self.biased else None
        gaps = None
        if self.timed:
            assert time_BL is not None, "events have times with model.time_bias"
            gaps = GapBias(self.time_bias[...], time_BL)
        out_BLNH = causal_attention(
            q, k, v, sequence_BL, self.implementation, bias_NL, self.weights, gaps
        )
        return out_BLNH.reshape(q_ME.shape)


class CausalAttention(nnx.Module):
    """Multi-head attention of each position to itself and earlier positions."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        dtype = compute_dtype(config)
        self.qkv = linear(config.hidden_size, 3 * config.hidden_size, dtype, rngs)
        self.proj = linear(config.hidden_size, config.hidden_size, dtype, rngs)
        self.heads = Heads(config)
        self.dropout = config.dropout

    def __call__(
        self,
        x_ME: jax.Array,
        seq_len: int,
        keys: Keys,
        sequence_BL: jax.Array | None = None,
        turns: Rotation | None = None,
        time_BL: jax.Array | None = None,
    ) -> jax.Array:
        """Attends within rows.

        Args:
          x_ME: `[B*L, E]` activations.
          seq_len: L.
          keys: the two random keys of dropout; None turns dropout off.
          sequence_BL: int32; positions attend only within their sequence. None: each row is one
            sequence.
          turns: the rotation of queries and keys; None: no rotary positions.
          time_BL: int32, the time of each event in seconds; only with `model.time_bias`.

        Returns:
          `[B*L, E]`.
        """
        q_ME, k_ME, v_ME = jnp.split(self.qkv(x_ME), 3, axis=-1)
        out_ME = self.heads(q_ME, k_ME, v_ME, seq_len, sequence_BL, turns, time_BL)
        out_ME = dropout(out_ME, self.dropout, None if keys is None else keys[0])
        return dropout(self.proj(out_ME), self.dropout, None if keys is None else keys[1])


class FeedForward(nnx.Module):
    """The feed-forward part of a layer: linear, exact GELU, linear, dropout.

    With swiglu, the output of the first linear layer is instead multiplied by the SiLU of another one,
    `gate` (Shazeer, "GLU variants improve transformer", 2020).
    """

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        dtype = compute_dtype(config)
        self.up = linear(config.hidden_size, config.dim_feedforward, dtype, rngs)
        self.down = linear(config.dim_feedforward, config.hidden_size, dtype, rngs)
        self.gated = config.feed_forward == "swiglu"
        if self.gated:
            self.gate = linear(config.hidden_size, config.dim_feedforward, dtype, rngs)
        self.dropout = config.dropout

    def __call__(self, x_ME: jax.Array, key: jax.Array | None) -> jax.Array:
        """Applies the layers to activations; without a key of dropout, nothing is dropped."""
        x_MF = self.up(x_ME)
        if self.gated:
            x_MF = x_MF * jax.nn.silu(self.gate(x_ME))
        else:
            # Faster than jax.nn.gelu(approximate=False), which goes through erfc.
            x_MF = 0.5 * x_MF * (1 + jax.lax.erf(x_MF * jnp.asarray(0.5**0.5, x_MF.dtype)))
        return dropout(self.down(x_MF), self.dropout, key)


class Layer(nnx.Module):
    """A transformer layer: `x + attention(norm(x))`, then the same with the feed-forward part.

    With post-norm, it is `norm(x + attention(x))`, as in Vaswani et al., "Attention is all you need",
    2017. With gated residuals, what is added to x is multiplied by `sigmoid(gate(x))`, where `gate` is a
    linear layer (Borisyuk et al., "From Features to Transformers: Redefining Ranking for Scalable
    Impact", 2025).
    """

    def __init__(self, config: ModelConfig, prevent_cse: bool, rngs: nnx.Rngs):
        """Makes the initial parameters.

        Args:
          config: the sizes and options of the model.
          prevent_cse: whether XLA must be kept from reusing what is to be recomputed.
          rngs: the source of the initial values.
        """
        self.norm1 = make_norm(config, rngs)
        self.attn = CausalAttention(config, rngs)
        self.norm2 = make_norm(config, rngs)
        self.ffn = FeedForward(config, rngs)
        self.gated = config.gated_residuals
        if self.gated:
            self.gate1, self.gate2 = make_gate(config, rngs), make_gate(config, rngs)
        self.pre_norm = config.norm_placement == "pre"
        self.remat = config.remat
        self.prevent_cse = prevent_cse

    def __call__(
        self,
        x_ME: jax.Array,
        seq_len: int,
        keys: Keys,
        sequence_BL: jax.Array | None = None,
        turns: Rotation | None = None,
        time_BL: jax.Array | None = None,
    ) -> jax.Array:
        """Runs the layer. The arguments are those of `CausalAttention`, with three keys of dropout."""

        pre_norm = self.pre_norm

        def attend(x_ME: jax.Array, keys: Keys) -> jax.Array:
            before_ME = self.norm1(x_ME) if pre_norm else x_ME
            return self.attn(before_ME, seq_len, keys, sequence_BL, turns, time_BL)

        if self.remat == "attention":
            attend = jax.checkpoint(attend, prevent_cse=self.prevent_cse)
        added_ME = attend(x_ME, None if keys is None else keys[:2])
        gate = self.gate1 if self.gated else None
        x_ME = add_part(x_ME, added_ME, gate, None if pre_norm else self.norm1)
        before_ME = self.norm2(x_ME) if pre_norm else x_ME
        added_ME = self.ffn(before_ME, None if keys is None else keys[2])
        gate = self.gate2 if self.gated else None
        return add_part(x_ME, added_ME, gate, None if pre_norm else self.norm2)


def make_gate(config: ModelConfig, rngs: nnx.Rngs) -> nnx.Linear:
    """Return the linear layer of the gate of a residual."""
    return linear(config.hidden_size, config.hidden_size, compute_dtype(config), rngs)


def add_part(
    x_ME: jax.Array, added_ME: jax.Array, gate: nnx.Linear | None, norm: Norm | None
) -> jax.Array:
    """Return the states after a part of a layer.

    Args:
      x_ME: the states before the part.
      added_ME: the output of the part.
      gate: its sigmoid is multiplied with the output; None: nothing is.
      norm: the norm of the sum, with post-norm; None with pre-norm.
    """
    if gate is not None:
        added_ME = added_ME * jax.nn.sigmoid(gate(x_ME))
    x_ME = x_ME + added_ME
    return x_ME if norm is None else norm(x_ME).astype(x_ME.dtype)
