"""The pure functions of a job: the initial state, a training step, and vectors of users and items."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
from jax.sharding import Mesh

from s2s_jax.cluster import mesh as meshes
from s2s_jax.embedding.sharded import ShardedTables
from s2s_jax.model.seq2seq import Encoded
from s2s_jax.training.step.batches import Batch
from s2s_jax.training.step.forward import Forward, model_graph
from s2s_jax.training.step.inference import Inference, Users
from s2s_jax.training.step.negatives import negative_features
from s2s_jax.training.step.optimizer import make_optimizer
from s2s_jax.training.step.schedule import Clock
from s2s_jax.training.step.settings import StepSettings
from s2s_jax.training.step.state import TrainState, initial_state, with_shardings
from s2s_jax.training.step.train_step import Metrics, TrainStep


class StepFunctions(NamedTuple):
    """The pure functions of a job, made by `make_step_functions`.

    Attributes:
      init: `() -> TrainState`, sharded from the start.
      abstract: the shapes, types and shardings of the state, for restoring a checkpoint.
      train_step: `(state, batch) -> (state, metrics)`, jitted; it donates the old state.
      predict: `(state, batch) -> Encoded`, jitted, see `Inference.predict`.
      user_vectors: `(state, ids_MC, length_B, seq_len) -> Users`, see `Inference.events` and
        `Inference.users`.
      item_vectors: `(state, ids) -> f32 [B, E]`, jitted, see `Inference.item_vectors`.
      items_trained: `(state, ids) -> bool [B]`, jitted, see `Inference.items_trained`.
    """

    init: Callable[[], TrainState]
    abstract: TrainState
    train_step: Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
    predict: Callable[[TrainState, Batch], Encoded]
    user_vectors: Callable[[TrainState, jax.Array, jax.Array, int], Users]
    item_vectors: Callable[[TrainState, Mapping[str, jax.Array]], jax.Array]
    items_trained: Callable[[TrainState, Mapping[str, jax.Array]], jax.Array]


def make_step_functions(
    settings: StepSettings,
    mesh: Mesh,
    capacities: Mapping[str, int] | None = None,
    clock: Clock | None = None,
) -> StepFunctions:
    """Return the functions for some settings, on the devices of `mesh`.

    Args:
      settings: the settings of the step.
      mesh: the devices.
      capacities: the number of rows of each growing table; None means the configured capacities.
      clock: the clock that learning rates follow; None if no steps are taken.
    """
    items, seed = settings.items, settings.seed
    tables = ShardedTables(items.features, settings.tables, mesh, capacities, seed)
    # Negatives are looked up together with the events.
    drawn = () if settings.loss.negatives == "in_batch" else negative_features(items)
    in_training = ShardedTables((*items.features, *drawn), settings.tables, mesh, capacities, seed)
    has_default_rows = any(spec.default_row for spec in tables.specs.values())
    ratios = {table.name: table.lr_ratio for table in settings.tables}
    optimizer = make_optimizer(settings.lr, has_default_rows, clock, ratios)
    forward = Forward(settings, model_graph(settings), in_training, mesh)

    def init() -> TrainState:
        return initial_state(settings, tables, optimizer)

    abstract = with_shardings(jax.eval_shape(init), tables.specs, mesh, settings.fsdp)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    everywhere = meshes.replicated(mesh)
    step = TrainStep(forward, tables, optimizer, shardings.params["dense"])
    inference = Inference(forward, tables)
    dense, events = jax.jit(inference.dense), jax.jit(inference.events)
    users = jax.jit(inference.users, static_argnames="seq_len", out_shardings=everywhere)

    def user_vectors(
        state: TrainState, ids_MC: jax.Array, length_B: jax.Array, seq_len: int
    ) -> Users:
        return users(dense(state), events(state, ids_MC), length_B, seq_len=seq_len)

    return StepFunctions(
        init=jax.jit(init, out_shardings=shardings),
        abstract=abstract,
        train_step=jax.jit(
            step.train_step, donate_argnums=0, out_shardings=(shardings, everywhere)
        ),
        predict=jax.jit(inference.predict),
        user_vectors=user_vectors,
        item_vectors=jax.jit(inference.item_vectors, out_shardings=everywhere),
        items_trained=jax.jit(inference.items_trained, out_shardings=everywhere),
    )
