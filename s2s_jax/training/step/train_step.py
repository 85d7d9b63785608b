"""One training step: looks up rows, encodes, scores, differentiates and updates.

Shapes: A microbatches, B rows of a microbatch, L positions, K ids of a bag, E model width.
"""

import dataclasses
import functools
from typing import cast

import jax
import jax.numpy as jnp
import optax

from s2s_jax.embedding.id_map import IdMap
from s2s_jax.embedding.sharded import Found, ShardedTables, Stored
from s2s_jax.training.step.averages import next_averages
from s2s_jax.training.step.batches import Batch, count_rows, ids_of, unpack
from s2s_jax.training.step.forward import Forward
from s2s_jax.training.step.gradients import gradients
from s2s_jax.training.step.item_stream import ItemStream, with_stream_shares
from s2s_jax.training.step.optimizer import (
    Updates,
    apply_updates,
    rows_norm,
    table_moments,
    with_table_moments,
)
from s2s_jax.training.step.params import Params, default_rows
from s2s_jax.training.step.state import TrainState

Metrics = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True, eq=False)
class TrainStep:
    """The training step.

    Attributes:
      forward: the model and the loss, with the tables of events and sampled negatives.
      tables: the tables of events.
      optimizer: the optimizer of all parameters.
      dense_shardings: the shardings of the dense part.
    """

    forward: Forward
    tables: ShardedTables
    optimizer: optax.GradientTransformationExtraArgs
    dense_shardings: object

    def train_step(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        """Return the state after a step, and the metrics of the step.

        Args:
          state: the state before the step.
          batch: a batch from `batches.put_batch`.
        """
        settings = self.forward.settings
        key = jax.random.fold_in(jax.random.key(settings.seed), state.step)
        key = key if settings.model.drops_out else None
        sent, batch = batch, unpack(settings, batch)
        state, found, batch = self._admit(state, batch)
        sums, grads = gradients(self.forward, state.params, found, batch, key)
        state, norm = self._update(state, found, grads)
        metrics = {
            "loss": sums.mean,
            "hit_rate": sums.next.hits / jnp.maximum(sums.next.pairs, 1),
            "pairs": sums.next.pairs,
            "grad_norm": norm,
            **count_rows(sent),
        }
        for name, of_table in state.maps.items():
            metrics |= _table_metrics(name, of_table, self.tables.specs[name].rows)
        if "stop" in sent:
            metrics["stop"] = sent["stop"].max()
        return state._replace(step=state.step + 1), metrics

    def _admit(self, state: TrainState, batch: Batch) -> tuple[TrainState, Found, Batch]:
        """Count items, and assign rows to new ids.

        Returns:
          The new state, the rows that the batch uses, and the batch with the shares of items.
        """
        stream = state.stream
        if isinstance(stream, ItemStream):
            item, mesh = self.forward.settings.items.item, self.forward.mesh
            stream, batch = with_stream_shares(item, mesh, stream, batch)
        averages = cast(Params, state.averages)
        stored = Stored(
            state.params["tables"],
            table_moments(state.opt_state),
            state.maps,
            averages["tables"] if averages else None,
        )
        stored, found = self.forward.tables.admit(stored, ids_of(batch), state.step + 1)
        state = state._replace(
            params=state.params | {"tables": stored.values},
            opt_state=with_table_moments(state.opt_state, stored.moments),
            maps=stored.maps,
            stream=stream,
            averages=averages
            if stored.averages is None
            else averages | {"tables": stored.averages},
        )
        return state, found, batch

    def _update(
        self, state: TrainState, found: Found, grads: Params
    ) -> tuple[TrainState, jax.Array]:
        """Update the parameters, and return the new state and the norm of the gradient."""
        reduce = functools.partial(self.tables.reduce, found.needed)
        grads["dense"] = jax.lax.with_sharding_constraint(grads["dense"], self.dense_shardings)
        dense_norm = optax.tree.norm((grads["dense"], default_rows(grads)))
        norm, averages = None, cast(Params, state.averages)
        if self.forward.settings.lr.clip_norm is not None:
            norm = jnp.hypot(dense_norm, rows_norm(grads["tables"], reduce))
        updates, opt_state = self.optimizer.update(
            cast(optax.Updates, grads),
            state.opt_state,
            cast(optax.Params, state.params),
            reduce=reduce,
            grad_norm=norm,
            averages=averages["tables"] if averages else None,
        )
        updates = cast(Updates, updates)
        if norm is None:
            norm = jnp.sqrt(dense_norm**2 + updates["tables"].square_norm.sum())
        params = apply_updates(state.params, updates)
        decay = self.forward.settings.lr.average_decay
        if decay is not None:
            of_tables = updates["tables"].averages
            averages = next_averages(decay, averages, params, of_tables, state.step + 1)
        return state._replace(params=params, opt_state=opt_state, averages=averages), norm


def _table_metrics(name: str, of_table: IdMap, capacity: int) -> Metrics:
    return {
        f"table/{name}/rows": of_table.rows_S.sum(),
        f"table/{name}/capacity": jnp.asarray(capacity),
        # Counts since the run began. The host adds up the segments, because the sum may overflow int32.
        f"table/{name}/dropped": of_table.dropped_S,
        f"table/{name}/evicted": of_table.evicted_S,
    }
