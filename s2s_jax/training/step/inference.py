"""The vectors of users and items, computed without training.

Encoding users takes two programs. The first looks up the events. It takes long to compile, but has the
same shape for histories of all lengths. The second applies the model. Its layers are scanned, so that it
compiles fast for each length.

Shapes: B rows of a batch, L positions, K ids of a bag, C columns of ids, U unique rows, D table width,
n devices, P positions of a device, M = n P or B L, E model width.
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
from s2s_jax.training.step.batches import TIME, Batch, ids_of, unpack
from s2s_jax.training.step.forward import Forward, model_graph
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


class EmbeddedEvents(NamedTuple):
    """Events that were looked up.

    Attributes:
      embeddings: f32 `[M, D]` of each feature.
      unknown_M: bool, whether the item of an event has no row in its growing table.
      time_M: int32, the time of an event in seconds; None without `model.time_bias`.
    """

    embeddings: Arrays
    unknown_M: jax.Array
    time_M: jax.Array | None


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
        # Adds the axis of microbatches.
        batch = jax.tree.map(lambda x: x[None], unpack(self.forward.settings, batch))
        found = self._look_up(state, ids_of(batch))
        places, batch = jax.tree.map(lambda x: x[0], (found.places, batch))
        return self.forward.encode(self.dense(state), found.rows, places, batch, None)

    def dense(self, state: TrainState) -> Tree:
        """Return the parameters of the dense part that are applied."""
        return self._others(state)[0]

    def events(self, state: TrainState, ids_MC: jax.Array) -> EmbeddedEvents:
        """Look up events.

        Args:
          state: the trained state.
          ids_MC: int32, the ids of all features of n P events and, with `model.time_bias`, their times;
            sharded over the devices.
        """
        settings = self.forward.settings
        item = settings.items.item
        # A microbatch of rows of one position.
        one = {"length": jnp.ones(ids_MC.shape[0], jnp.int32), "ids": ids_MC[:, None]}
        batch = unpack(settings, jax.tree.map(lambda x: x[None], one))
        found = self._look_up(state, ids_of(batch))
        places, ids = jax.tree.map(lambda x: x[0], (found.places, ids_of(batch)))
        embeddings = self.tables.embed(found.rows, places, ids)
        unknown_M = jnp.zeros(ids_MC.shape[0], bool)
        if item.grows:
            unknown_M = self.tables.without_row(found, item.name)[0].any(axis=(1, 2))
        time_M = batch[TIME][0, :, 0] if TIME in batch else None
        return EmbeddedEvents({name: x[:, 0] for name, x in embeddings.items()}, unknown_M, time_M)

    def users(
        self, dense: Tree, events: EmbeddedEvents, length_B: jax.Array, seq_len: int
    ) -> Users:
        """Return the vectors of users.

        Args:
          dense: the parameters of the model.
          events: the events of their histories, padded to L positions. Each device has those of its
            users, B / n times L, and may have others after them, which are ignored.
          length_B: int32, number of events of each user.
          seq_len: L.
        """
        settings, devices = self.forward.settings, self.forward.mesh.size
        used = length_B.size // devices * seq_len

        def rows(x_M: jax.Array) -> jax.Array:
            of_device = x_M.reshape(devices, -1, *x_M.shape[1:])[:, :used]
            return of_device.reshape(length_B.size, seq_len, *x_M.shape[1:])

        scanned = dataclasses.replace(settings, model=dataclasses.replace(settings.model, unroll=1))
        module = nnx.merge(model_graph(scanned), nnx.State(dense))
        time_BL = None if events.time_M is None else rows(events.time_M)
        preds_ME = module(jax.tree.map(rows, events.embeddings), time_BL=time_BL).preds_ME
        preds_BLE = preds_ME.reshape(length_B.size, seq_len, -1)
        last_B1 = jnp.maximum(length_B - 1, 0)[:, None]
        last_BE = jnp.take_along_axis(preds_BLE, last_B1[..., None], axis=1)[:, 0]
        unknown_B = rows(events.unknown_M).sum(axis=1, dtype=jnp.int32)
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
        module = nnx.merge(self.forward.graph, nnx.State(self.dense(state)))
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
