"""A causal transformer in Flax NNX, with stacked and scanned layers.

Shapes: B batch, L positions, M = B L, E width (`hidden_size`). Activations stay flat, `[B*L, E]`:
with three axes, XLA's CPU backend inserts a transposing copy before the weight gradient of every linear
layer.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from s2s_jax.config import ModelConfig
from s2s_jax.model.dropout import drop_rows, dropout
from s2s_jax.model.hstu import HSTULayer
from s2s_jax.model.layers import Layer
from s2s_jax.model.norms import make_norm
from s2s_jax.model.positions import rotation, sequence_positions

_POSITION_STD = 0.02
# With unroll="auto", models of up to this many layers are unrolled. Each unrolled layer is compiled.
_MAX_UNROLLED = 16


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
    """`num_layers` layers, with parameters stacked along a first axis, and a final norm.

    Before the first layer there can be learned positions (`position`), a norm (`input_norm`, as in
    Devlin et al., 2019), dropout (`input_dropout`), and dropout of whole events (`event_dropout`). With
    post-norm, there is no final norm, because each layer ends with one.
    """

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        @nnx.split_rngs(splits=config.num_layers)
        @nnx.vmap
        def stacked_layers(rngs: nnx.Rngs) -> Layer | HSTULayer:
            kind = Layer if config.layer == "transformer" else HSTULayer
            return kind(config, _prevent_cse(config), rngs)

        self.layers = stacked_layers(rngs)
        if config.norm_placement == "pre":
            self.final_norm = make_norm(config, rngs)
        if config.input_norm:
            self.input_norm = make_norm(config, rngs)
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
        time_BL: jax.Array | None = None,
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
          time_BL: int32, the time of each event in seconds; only with `model.time_bias`.

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
            run = nnx.merge(graph, params)
            return run(x_ME, seq_len, layer_keys, sequence_BL, turns, time_BL), None

        if config.remat == "full":
            run_layer = jax.checkpoint(run_layer, prevent_cse=_prevent_cse(config))
        x_ME, _ = jax.lax.scan(
            run_layer, x_ME, (stacked, keys), unroll=layers_per_iteration(config)
        )
        if config.norm_placement == "post":
            return x_ME.astype(jnp.float32)
        return self.final_norm(x_ME)
