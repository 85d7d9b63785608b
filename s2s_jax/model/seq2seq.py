"""The dense part of the model: embedded events → projection → causal transformer.

Shapes: B batch, L positions, M = B L, D concatenated embedding width, E model width.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from s2s_jax.config import FeatureConfig, ModelConfig
from s2s_jax.model.linear import compute_dtype, linear
from s2s_jax.model.transformer import Transformer


class Encoded(NamedTuple):
    """The model's output for a batch.

    Attributes:
      preds_ME: f32 `[B*L, E]`, the prediction after each event.
      targets_ME: f32 `[B*L, E]`, the vector of each event as a target.
    """

    preds_ME: jax.Array
    targets_ME: jax.Array


class Seq2Seq(nnx.Module):
    """The dense part of the model."""

    def __init__(
        self,
        features: Sequence[FeatureConfig],
        shown: Sequence[str],
        model: ModelConfig,
        rngs: nnx.Rngs,
    ):
        """Makes the initial parameters.

        Args:
          features: the features of an event.
          shown: the names of the features that a target shows.
          model: the sizes and options of the model.
          rngs: the source of the initial values.
        """
        self.shown = tuple(shown)
        self.hidden = tuple(f.name for f in features if f.name not in shown)
        # The first row of the projection's kernel for each feature, and the row after its last.
        self.begin_end: dict[str, tuple[int, int]] = {}
        begin = 0
        for feature in features:
            self.begin_end[feature.name] = (begin, begin + feature.emb_dim)
            begin += feature.emb_dim
        self.dtype = compute_dtype(model)
        self.proj = linear(begin, model.hidden_size, self.dtype, rngs)
        self.transformer = Transformer(model, rngs)

    def __call__(
        self,
        embeddings: Mapping[str, jax.Array],
        key: jax.Array | None = None,
        sequence_BL: jax.Array | None = None,
        position_BL: jax.Array | None = None,
        time_BL: jax.Array | None = None,
    ) -> Encoded:
        """Encodes a batch.

        Args:
          embeddings: f32 `[B, L, emb_dim]` of each feature.
          key: the random key of dropout; None turns dropout off, as in evaluation.
          sequence_BL: int32, the number of the sequence that a position belongs to; None: each row is
            one sequence.
          position_BL: int32, the index of each position within its sequence; None: it is computed.
          time_BL: int32, the time of each event in seconds; only with `model.time_bias`.
        """
        seq_len = embeddings[self.shown[0]].shape[1]
        # Projecting target features and other features separately gives both vectors at no extra cost.
        targets_ME = self._targets(embeddings)
        events_ME = targets_ME
        if self.hidden:
            events_ME = targets_ME + self._project(embeddings, self.hidden)
        preds_ME = self.transformer(events_ME, seq_len, key, sequence_BL, position_BL, time_BL)
        return Encoded(preds_ME, targets_ME.astype(jnp.float32))

    def targets(self, embeddings: Mapping[str, jax.Array]) -> jax.Array:
        """Return f32 `[B*L, E]`: the vectors of events, or of items, as targets.

        Args:
          embeddings: f32 `[B, L, emb_dim]` of each target feature.
        """
        return self._targets(embeddings).astype(jnp.float32)

    def _targets(self, embeddings: Mapping[str, jax.Array]) -> jax.Array:
        assert self.proj.bias is not None
        bias_1E = self.proj.bias[...].astype(self.dtype)[None]
        return self._project(embeddings, self.shown) + bias_1E

    def _project(self, embeddings: Mapping[str, jax.Array], names: tuple[str, ...]) -> jax.Array:
        """Return `[B*L, E]`: the projection of some features without bias, as if others were zero."""
        kernel_DE = self.proj.kernel[...]
        flat = [embeddings[name].reshape(-1, embeddings[name].shape[-1]) for name in names]
        kernels = [kernel_DE[slice(*self.begin_end[name])] for name in names]
        x_MD = jnp.concatenate(flat, axis=-1).astype(self.dtype)
        return x_MD @ jnp.concatenate(kernels).astype(self.dtype)
