"""Embedded events → projection → causal transformer: what users do next, and what events look like.

Shapes: B batch, L positions, D concatenated embedding width, T of it in target features, E model
width.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from s2s_jax.config import Config
from s2s_jax.model.transformer import Transformer, linear


class Encoded(NamedTuple):
    """What the model makes of a batch.

    Attributes:
      preds_ME: f32 `[B*L, E]`, the user's state after each event.
      targets_ME: f32 `[B*L, E]`, each event as it looks when it is to be predicted.
    """

    preds_ME: jax.Array
    targets_ME: jax.Array


class Seq2Seq(nnx.Module):
    """The dense part of the model."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        # Target features come first, so that both parts of the projection are slices of its kernel.
        shown = config.target_features
        hidden = tuple(f.name for f in config.features if f.name not in shown)
        self.shown = shown
        self.hidden = hidden
        self.shown_size = sum(config.feature(name).emb_dim for name in shown)
        size = sum(f.emb_dim for f in config.features)
        self.dtype = jnp.dtype(config.model.dtype)
        self.proj = linear(size, config.model.hidden_size, self.dtype, rngs)
        self.transformer = Transformer(config.model, rngs)

    def __call__(
        self, embeddings: Mapping[str, jax.Array], key: jax.Array | None = None
    ) -> Encoded:
        """Encodes a batch.

        Args:
          embeddings: f32 `[B, L, emb_dim]` of each feature.
          key: for dropout; None turns it off, as for evaluation.
        """
        seq_len = embeddings[self.shown[0]].shape[1]
        kernel_DE = self.proj.kernel[...].astype(self.dtype)
        targets_ME = self._concatenate(embeddings, self.shown) @ kernel_DE[: self.shown_size]
        targets_ME = targets_ME + self.proj.bias[...].astype(self.dtype)
        # An event is its target features and the rest: projecting them apart gives both at no cost.
        events_ME = targets_ME
        if self.hidden:
            rest_ME = self._concatenate(embeddings, self.hidden) @ kernel_DE[self.shown_size :]
            events_ME = targets_ME + rest_ME
        preds_ME = self.transformer(events_ME, seq_len, key)
        return Encoded(preds_ME, targets_ME.astype(jnp.float32))

    def _concatenate(
        self, embeddings: Mapping[str, jax.Array], names: tuple[str, ...]
    ) -> jax.Array:
        flat = [embeddings[name].reshape(-1, embeddings[name].shape[-1]) for name in names]
        return jnp.concatenate(flat, axis=-1).astype(self.dtype)
