"""The dense part of a trained model as pure functions of embedded events.

Shapes: B batch, L positions, D width of an embedded event (of all features), E model width.
"""

import dataclasses
from typing import Self

import jax
import jax.numpy as jnp
from flax import nnx

from s2s_jax.config import LossConfig, ModelConfig
from s2s_jax.config.settings import Items
from s2s_jax.model.loss import comparable
from s2s_jax.model.seq2seq import Seq2Seq
from s2s_jax.training.step.params import Params, Tree
from s2s_jax.training.step.settings import StepSettings


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Tower:
    """The dense part of a trained model, without its tables.

    An embedded event has the embeddings of all features next to each other, in the order of the
    features; a feature without an id is zero.

    Attributes:
      items: the features of events, and those that items show.
      model: the sizes and options of the model.
      loss: how users and items are compared.
      dense: f32, the parameters, on the host.
    """

    items: Items
    model: ModelConfig
    loss: LossConfig
    dense: Tree

    @classmethod
    def of(cls, settings: StepSettings, params: Params) -> Self:
        """Return the tower of a trained state.

        It does not depend on this machine: attention uses operations that every platform has, and
        `model.dtype` auto stands for float32.

        Args:
          settings: the settings that the state was trained with.
          params: the parameters of the state; this process must have all of them.
        """
        return cls.with_dense(settings, jax.device_get(params["dense"]))

    @classmethod
    def with_dense(cls, settings: StepSettings, dense: Tree) -> Self:
        """Return the tower with some parameters, see `of`."""
        model = settings.model
        dtype = "float32" if model.dtype == "auto" else model.dtype
        model = dataclasses.replace(model, dtype=dtype, attention="xla", remat="none")
        return cls(items=settings.items, model=model, loss=settings.loss, dense=dense)

    @property
    def width(self) -> int:
        """D."""
        return sum(feature.emb_dim for feature in self.items.features)

    @property
    def timed(self) -> bool:
        """Whether `users` needs the times of events."""
        return self.model.time_bias is not None

    def users(
        self, events_BLD: jax.Array, length_B: jax.Array, time_BL: jax.Array | None = None
    ) -> jax.Array:
        """Return f32 `[B, E]`: the vectors of users, for dot products with those of items.

        They are those of `Inference.user_vectors`, and zeros for histories without events.

        Args:
          events_BLD: f32, embedded events, oldest first. What is after the end of a history is ignored.
          length_B: int32, the number of events of each history, up to L.
          time_BL: int32, the times of events in seconds, from any beginning; only if `timed`.
        """
        seq_len = events_BLD.shape[1]
        position_1L = jnp.arange(seq_len, dtype=jnp.int32)[None]
        real_BL = position_1L < length_B[:, None]
        # Attention multiplies later events by zero, which keeps infinite values and NaN.
        events_BLD = jnp.where(real_BL[..., None], events_BLD, 0)
        module = self.module()
        embeddings = self._by_feature(module, events_BLD)
        encoded = module(embeddings, position_BL=position_1L, time_BL=time_BL)
        preds_BLE = encoded.preds_ME.reshape(-1, seq_len, encoded.preds_ME.shape[-1])
        last_B1 = jnp.clip(length_B - 1, 0, seq_len - 1)[:, None]
        last_BE = jnp.take_along_axis(preds_BLE, last_B1[..., None], axis=1, mode="clip")[:, 0]
        return jnp.where(length_B[:, None] > 0, comparable(self.loss, last_BE), 0)

    def item_vectors(self, events_BD: jax.Array) -> jax.Array:
        """Return f32 `[B, E]`: the vectors of items, as those of `Inference.item_vectors`.

        Args:
          events_BD: f32, embedded events with these items. Features that items do not show are ignored.
        """
        module = self.module()
        embeddings = self._by_feature(module, events_BD[:, None])
        return comparable(self.loss, module.targets(embeddings))

    def module(self) -> Seq2Seq:
        """Return the dense part with its parameters."""

        def make() -> Seq2Seq:
            return Seq2Seq(self.items.features, self.items.shown, self.model, nnx.Rngs(0))

        graph = nnx.graphdef(nnx.eval_shape(make))
        return nnx.merge(graph, nnx.State(jax.tree.map(jnp.asarray, self.dense)))

    def _by_feature(self, module: Seq2Seq, events_BLD: jax.Array) -> dict[str, jax.Array]:
        return {name: events_BLD[..., slice(*ends)] for name, ends in module.begin_end.items()}
