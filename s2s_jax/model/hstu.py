"""The layers of HSTU: gated attention without a feed-forward part.

HSTU is the "hierarchical sequential transduction unit" of Zhai et al., "Actions Speak Louder than
Words: Trillion-Parameter Sequential Transducers for Generative Recommendations", 2024. In that paper,
scores depend on distances, which is `distance_bias` here, and on time gaps, which is `time_bias`.

Shapes: B batch, L positions, M = B L, E width (`hidden_size`).
"""

import jax
import jax.numpy as jnp
from flax import nnx

from s2s_jax.config import ModelConfig
from s2s_jax.model.dropout import dropout
from s2s_jax.model.layers import Heads, Keys, add_part, make_gate
from s2s_jax.model.linear import compute_dtype, linear
from s2s_jax.model.norms import make_norm
from s2s_jax.model.positions import Rotation


class GatedAttention(nnx.Module):
    """Attention whose output is normalised and multiplied by a gate before its projection.

    The gate, queries, keys and values all go through SiLU. With "hstu", the weight of a value is the
    SiLU of its score, and scores are not divided by sqrt(H). The code of the paper divides the weights
    by the length of sequences; the norm that follows makes up for every such factor. With
    "hstu_softmax", weights are those of `CausalAttention`.
    """

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        dtype = compute_dtype(config)
        self.uqkv = linear(config.hidden_size, 4 * config.hidden_size, dtype, rngs)
        self.norm = make_norm(config, rngs)
        self.proj = linear(config.hidden_size, config.hidden_size, dtype, rngs)
        self.heads = Heads(config)
        self.dropout = config.dropout

    def __call__(
        self,
        x_ME: jax.Array,
        seq_len: int,
        key: jax.Array | None,
        sequence_BL: jax.Array | None,
        turns: Rotation | None,
        time_BL: jax.Array | None,
    ) -> jax.Array:
        """Return `[B*L, E]`. The arguments are those of `CausalAttention`, with one key of dropout."""
        u_ME, q_ME, k_ME, v_ME = jnp.split(jax.nn.silu(self.uqkv(x_ME)), 4, axis=-1)
        out_ME = self.heads(q_ME, k_ME, v_ME, seq_len, sequence_BL, turns, time_BL)
        out_ME = u_ME * self.norm(out_ME).astype(u_ME.dtype)
        return self.proj(dropout(out_ME, self.dropout, key))


class HSTULayer(nnx.Module):
    """A layer of HSTU: `x + attention(norm(x))`; for post-norm and gated residuals, see `Layer`."""

    def __init__(self, config: ModelConfig, prevent_cse: bool, rngs: nnx.Rngs):
        """Makes the initial parameters; the arguments are those of `Layer`."""
        self.norm1 = make_norm(config, rngs)
        self.attn = GatedAttention(config, rngs)
        self.gated = config.gated_residuals
        if self.gated:
            self.gate1 = make_gate(config, rngs)
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
        """Runs the layer. The arguments are those of `CausalAttention`."""

        def attend(x_ME: jax.Array, key: jax.Array | None) -> jax.Array:
            before_ME = self.norm1(x_ME) if self.pre_norm else x_ME
            return self.attn(before_ME, seq_len, key, sequence_BL, turns, time_BL)

        if self.remat == "attention":
            attend = jax.checkpoint(attend, prevent_cse=self.prevent_cse)
        added_ME = attend(x_ME, None if keys is None else keys[0])
        gate = self.gate1 if self.gated else None
        return add_part(x_ME, added_ME, gate, None if self.pre_norm else self.norm1)
