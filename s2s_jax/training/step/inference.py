"""The vectors of users and items, computed without training.

Shapes: B rows of a batch, L positions, K ids of a bag, U unique rows, D table width, M = B L, E model
width.
"""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
from flax import nnx

from s2s_jax.embedding.lookup import Arrays
from s2s_jax.embedding.row_averages import averaged
from s2s_jax.embedding.sharded import Found, ShardedTables, with_default_rows
from s2s_jax.model.loss import comparable
from s2s_jax.model.seq2seq import Encoded
from s2s_jax.training.step.averages import averaged_others
from s2s_jax.training.step.batches import Batch, ids_of, unpack
from s2s_jax.training.step.forward import Forward
from s2s_jax.training.step.optimizer import table_moments
from s2s_jax.training.step.params import Params, Tree, default_rows
from s2s_jax.training.step.state import TrainState


class Users(NamedTuple):
    """The vectors of users, and the number of unknown events in their histories.

    Attributes:
      vectors_BE: f32, the vector after the last event of each row; its dot product with the vector of an
        item is their similarity.
      unknown_B: int32, the number of events whose item has no row in its growing table; 0 with a bucket
        table.
    """

    vectors_BE: jax.Array
    unknown_B: jax.Array


@dataclasses.dataclass(frozen=True, eq=False)
class Inference:
    """Functions that apply a state to batches and items, without dropout.

    With `lr.average_decay`, the averages of the weights are applied, not the weights themselves.

    Ids without a row in a growing table do not get one; their vector is zero or the table's default row.

    Attributes:
      forward: the model.
      tables: the tables of events.
    """

    forward: Forward
    tables: ShardedTables

    def predict(self, state: TrainState, batch: Batch) -> Encoded:
        """Encode a batch from `batches.put_batch`, without its axis of microbatches."""
        return self._encode(state, batch)[0]

    def user_vectors(self, state: TrainState, batch: Batch) -> Users:
        """Return the vectors of users from one microbatch `[1, B, …]` of their histories."""
        settings = self.forward.settings
        item = settings.items.item
        batch = jax.tree.map(lambda x: x[0], dict(batch))
        (preds_ME, _), found = self._encode(state, batch)
        length_B = batch["length"]
        preds_BLE = preds_ME.reshape(length_B.size, -1, preds_ME.shape[-1])
        last_B1 = jnp.maximum(length_B - 1, 0)[:, None]
        last_BE = jnp.take_along_axis(preds_BLE, last_B1[..., None], axis=1)[:, 0]
        unknown_B = jnp.zeros_like(length_B)
        if item.grows:
            unknown_BLK = self.tables.without_row(found, item.name)[0]
            unknown_B = unknown_BLK.any(axis=-1).sum(axis=-1, dtype=jnp.int32)
        return Users(comparable(settings.loss, last_BE), unknown_B)

    def item_vectors(self, state: TrainState, ids: Mapping[str, jax.Array]) -> jax.Array:
        """Return f32 `[B, E]`: the vectors of items, for dot products with the vectors of users.

        Args:
          state: the trained state.
          ids: the ids of all target features of the items, `[1, B, 1, K]` (or `[1, B, 1, K, 2]`).
        """
        found = self._look_up(state, ids)
        places, ids = jax.tree.map(lambda x: x[0], (found.places, dict(ids)))
        embeddings = self.tables.embed(found.rows, places, ids)
        dense, _ = self._others(state)
        module = nnx.merge(self.forward.graph, nnx.State(dense))
        return comparable(self.forward.settings.loss, module.targets(embeddings))

    def items_trained(self, state: TrainState, ids: Mapping[str, jax.Array]) -> jax.Array:
        """Return bool `[B]`: whether the table row of an item's id was ever trained.

        If the item feature is not a target feature, one trained row of any target feature is enough. A
        bucket counts for all ids that share it. An id without a row in a growing table was not trained.

        Args:
          state: the trained state.
          ids: see `item_vectors`.
        """
        items = self.forward.settings.items
        own = (items.item.name,) if items.item.name in items.shown else items.shown
        # The moments of a trained row never become zero again.
        found = self.tables.look_up(table_moments(state.opt_state), state.maps, ids)
        touched: Arrays = {
            name: (rows_UD != 0).any(axis=1, keepdims=True).astype(jnp.float32)
            for name, rows_UD in found.rows.items()
        }
        places, ids = jax.tree.map(lambda x: x[0], (found.places, dict(ids)))
        touched_BL1 = self.tables.embed(touched, places, ids)
        return jnp.stack([touched_BL1[name][:, 0, 0] > 0 for name in own]).any(axis=0)

    def _look_up(self, state: TrainState, ids: Mapping[str, jax.Array]) -> Found:
        found = self.tables.look_up(state.params["tables"], state.maps, ids)
        rows, decay = found.rows, self.forward.settings.lr.average_decay
        if decay is not None:
            tables = cast(Params, state.averages)["tables"]
            averages = self.tables.look_up(tables, state.maps, ids).rows
            rows = {n: averaged(decay, rows[n], averages[n], state.step) for n in rows}
        rows = with_default_rows(rows, found.unknown, self._others(state)[1])
        return found._replace(rows=rows)

    def _others(self, state: TrainState) -> tuple[Tree, Arrays]:
        """Return the dense part and the default rows."""
        if self.forward.settings.lr.average_decay is None:
            return state.params["dense"], default_rows(state.params)
        return averaged_others(cast(Params, state.averages), state.params, state.step)

    def _encode(self, state: TrainState, batch: Batch) -> tuple[Encoded, Found]:
        # Adds the axis of microbatches.
        batch = jax.tree.map(lambda x: x[None], unpack(self.forward.settings, batch))
        found = self._look_up(state, ids_of(batch))
        places, batch = jax.tree.map(lambda x: x[0], (found.places, batch))
        dense, _ = self._others(state)
        return self.forward.encode(dense, found.rows, places, batch, None), found
