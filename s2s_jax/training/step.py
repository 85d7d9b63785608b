"""One pure train step: look up, encode, score, differentiate, update; and all pure functions of a job.

Shapes: A microbatches, B rows of one, L positions, K ids of a bag, E model width.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from s2s_jax.cluster import mesh as meshes
from s2s_jax.config import Config
from s2s_jax.config.settings import Items
from s2s_jax.embedding.id_map import IdMap
from s2s_jax.embedding.sharded import Found, ShardedTables, Stored
from s2s_jax.model.seq2seq import Encoded
from s2s_jax.training.batches import Batch, count_rows, ids_of, unpack
from s2s_jax.training.forward import Forward, model_graph
from s2s_jax.training.gradients import gradients
from s2s_jax.training.inference import Inference, Users
from s2s_jax.training.item_stream import ItemStream, with_stream_shares
from s2s_jax.training.negatives import negative_features
from s2s_jax.training.optimizer import (
    Updates,
    apply_updates,
    make_optimizer,
    rows_norm,
    table_moments,
    with_table_moments,
)
from s2s_jax.training.params import Params, default_rows
from s2s_jax.training.schedule import Clock
from s2s_jax.training.state import TrainState, initial_state, with_shardings

Metrics = dict[str, jax.Array]


class StepFunctions(NamedTuple):
    """The pure functions of a job, made by `make_step_functions`.

    Attributes:
      init: `() -> TrainState`, sharded from the start.
      abstract: the state's shapes, types and shardings, for restoring.
      train_step: `(state, batch) -> (state, metrics)`, jitted; the state passed in is donated.
      predict: `(state, batch) -> Encoded`, jitted, see `Inference.predict`.
      user_vectors: `(state, batch) -> Users`, jitted, see `Inference.user_vectors`.
      item_vectors: `(state, ids) -> f32 [B, E]`, jitted, see `Inference.item_vectors`.
      items_trained: `(state, ids) -> bool [B]`, jitted, see `Inference.items_trained`.
    """

    init: Callable[[], TrainState]
    abstract: TrainState
    train_step: Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
    predict: Callable[[TrainState, Batch], Encoded]
    user_vectors: Callable[[TrainState, Batch], Users]
    item_vectors: Callable[[TrainState, Mapping[str, jax.Array]], jax.Array]
    items_trained: Callable[[TrainState, Mapping[str, jax.Array]], jax.Array]


def make_step_functions(
    config: Config,
    mesh: Mesh,
    capacities: Mapping[str, int] | None = None,
    clock: Clock | None = None,
) -> StepFunctions:
    """Builds the train step of `config` over `mesh`.

    Args:
      config: the configuration.
      mesh: the devices.
      capacities: rows of the tables that grow; None: those they start with.
      clock: of the run that takes steps, which learning rates follow.
    """
    seed = config.train.seed
    tables = ShardedTables(config.features, config.tables, mesh, capacities, seed)
    # Negatives are looked up with the events.
    drawn = () if config.loss.negatives == "in_batch" else negative_features(Items.of(config))
    in_training = ShardedTables((*config.features, *drawn), config.tables, mesh, capacities, seed)
    has_default_rows = any(spec.default_row for spec in tables.specs.values())
    optimizer = make_optimizer(config.lr, has_default_rows, clock)
    forward = Forward(config, model_graph(config), in_training, mesh)

    def init() -> TrainState:
        return initial_state(config, tables, optimizer)

    fsdp = config.train.dense_sharding == "fsdp"
    abstract = with_shardings(jax.eval_shape(init), tables.specs, mesh, fsdp)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    everywhere = meshes.replicated(mesh)
    step = _Step(forward, tables, optimizer, shardings.params["dense"])
    inference = Inference(forward, tables)
    return StepFunctions(
        init=jax.jit(init, out_shardings=shardings),
        abstract=abstract,
        train_step=jax.jit(
            step.train_step, donate_argnums=0, out_shardings=(shardings, everywhere)
        ),
        predict=jax.jit(inference.predict),
        user_vectors=jax.jit(inference.user_vectors, out_shardings=everywhere),
        item_vectors=jax.jit(inference.item_vectors, out_shardings=everywhere),
        items_trained=jax.jit(inference.items_trained, out_shardings=everywhere),
    )


@dataclasses.dataclass(frozen=True, eq=False)
class _Step:
    """The train step.

    Attributes:
      forward: what is differentiated, with the tables of the events and of drawn negatives.
      tables: of the events.
      optimizer: of all parameters.
      dense_shardings: how the dense part lies on devices.
    """

    forward: Forward
    tables: ShardedTables
    optimizer: optax.GradientTransformationExtraArgs
    dense_shardings: object

    def train_step(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        """The state and the metrics after a step over `batch`, see `batches.put_batch`."""
        config = self.forward.config
        key = jax.random.fold_in(jax.random.key(config.train.seed), state.step)
        key = key if config.model.drops_out else None
        sent, batch = batch, unpack(config, batch)
        state, found, batch = self._admit(state, batch)
        sums, grads = gradients(self.forward, state.params, found, batch, key)
        state, norm = self._update(state, found, grads)
        pairs = jnp.maximum(sums.pairs, 1)
        metrics = {
            "loss": sums.loss / pairs,
            "hit_rate": sums.hits / pairs,
            "pairs": sums.pairs,
            "grad_norm": norm,
            **count_rows(sent),
        }
        for name, of_table in state.maps.items():
            metrics |= _table_metrics(name, of_table, self.tables.specs[name].rows)
        if "stop" in sent:
            metrics["stop"] = sent["stop"].max()
        return state._replace(step=state.step + 1), metrics

    def _admit(self, state: TrainState, batch: Batch) -> tuple[TrainState, Found, Batch]:
        """Counts items and gives new ids rows; the state then, what was found, the batch with shares."""
        stream = state.stream
        if isinstance(stream, ItemStream):
            config, mesh = self.forward.config, self.forward.mesh
            item = config.feature(config.loss.item_feature)
            stream, batch = with_stream_shares(item, mesh, stream, batch)
        stored = Stored(state.params["tables"], table_moments(state.opt_state), state.maps)
        stored, found = self.forward.tables.admit(stored, ids_of(batch), state.step + 1)
        state = state._replace(
            params=state.params | {"tables": stored.values},
            opt_state=with_table_moments(state.opt_state, stored.moments),
            maps=stored.maps,
            stream=stream,
        )
        return state, found, batch

    def _update(
        self, state: TrainState, found: Found, grads: Params
    ) -> tuple[TrainState, jax.Array]:
        """The state with new parameters, and the norm of the gradient."""
        reduce = functools.partial(self.tables.reduce, found.needed)
        grads["dense"] = jax.lax.with_sharding_constraint(grads["dense"], self.dense_shardings)
        dense_norm = optax.tree.norm((grads["dense"], default_rows(grads)))
        norm = None
        if self.forward.config.lr.clip_norm is not None:
            norm = jnp.hypot(dense_norm, rows_norm(grads["tables"], reduce))
        updates, opt_state = self.optimizer.update(
            cast(optax.Updates, grads),
            state.opt_state,
            cast(optax.Params, state.params),
            reduce=reduce,
            grad_norm=norm,
        )
        updates = cast(Updates, updates)
        if norm is None:
            norm = jnp.sqrt(dense_norm**2 + updates["tables"].square_norm.sum())
        params = apply_updates(state.params, updates)
        return state._replace(params=params, opt_state=opt_state), norm


def _table_metrics(name: str, of_table: IdMap, capacity: int) -> Metrics:
    return {
        f"table/{name}/rows": of_table.rows_S.sum(),
        f"table/{name}/capacity": jnp.asarray(capacity),
        # Since the run began: their sums may leave int32, so the host adds up.
        f"table/{name}/dropped": of_table.dropped_S,
        f"table/{name}/evicted": of_table.evicted_S,
    }
