"""The training state, its initial values, and its sharding.

Shapes: R rows and D width of a table.
"""

from collections.abc import Mapping
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from s2s_jax.cluster import mesh as meshes
from s2s_jax.embedding.sharded import Maps, ShardedTables
from s2s_jax.embedding.tables import TableSpec, init_table
from s2s_jax.model.seq2seq import Seq2Seq
from s2s_jax.training.step.averages import empty_averages
from s2s_jax.training.step.item_stream import ItemStream, empty_stream
from s2s_jax.training.step.params import Params
from s2s_jax.training.step.settings import StepSettings


class TrainState(NamedTuple):
    """Everything on the devices that a step changes and a checkpoint saves.

    Attributes:
      step: int32 scalar, the number of optimizer steps done.
      params: the parameters.
      opt_state: the state of the optimizer.
      maps: the maps from ids to rows of growing tables.
      stream: the counts of items so far; empty unless `loss.log_q` is stream.
      averages: the averages of the parameters, see `averages`; empty without `lr.average_decay`.
    """

    step: jax.Array
    params: Params
    opt_state: optax.OptState
    maps: Maps
    stream: ItemStream | dict[str, jax.Array]
    averages: Params | dict[str, jax.Array]

    def saved_parts(self) -> dict[str, object]:
        """Return the parts for a checkpoint; those of options are left out if they are empty."""
        optional = ("stream", "averages")
        return {name: part for name, part in self._asdict().items() if name not in optional or part}

    def with_saved_parts(self, parts: Mapping[str, object]) -> "TrainState":
        """Return the state with the parts of a checkpoint."""
        return TrainState(**{**self._asdict(), **parts})


def initial_state(
    settings: StepSettings,
    tables: ShardedTables,
    optimizer: optax.GradientTransformationExtraArgs,
) -> TrainState:
    """Return the state before the first step, which is the same for any number of devices.

    Args:
      settings: the settings of the step; their seed determines all values.
      tables: the tables of events.
      optimizer: the optimizer of all parameters.
    """
    key = jax.random.key(settings.seed)
    items, rngs = settings.items, nnx.Rngs(jax.random.fold_in(key, 0))
    model = Seq2Seq(items.features, items.shown, settings.model, rngs)
    dense = nnx.to_pure_dict(nnx.state(model))
    specs = tables.specs
    values = {name: init_table(s, jax.random.fold_in(key, 1)) for name, s in specs.items()}
    params: Params = {"dense": dense, "tables": values}
    defaults = {n: jnp.zeros(spec.emb_dim) for n, spec in specs.items() if spec.default_row}
    if defaults:
        params["unknown"] = defaults
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(cast(optax.Params, params)),
        maps=tables.empty_maps(),
        stream=empty_stream() if settings.loss.stream_shares else {},
        averages={} if settings.lr.average_decay is None else empty_averages(params),
    )


def with_shardings(
    state: TrainState, specs: Mapping[str, TableSpec], mesh: Mesh, fsdp: bool
) -> TrainState:
    """Add shardings to the shapes of a state.

    Tables, their moments, averages and maps are sharded by rows.

    Args:
      state: the shapes of the state.
      specs: the tables.
      mesh: the devices.
      fsdp: whether the dense part is sharded; otherwise it is replicated.
    """

    def place(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        names = [entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey)]
        of_table = "tables" in names and names[-1] in specs
        if of_table or path[0] == jax.tree_util.GetAttrKey("maps"):
            sharding = meshes.row_sharded(mesh)
        elif fsdp and "dense" in names:
            sharding = meshes.fsdp_sharded("/".join(names), leaf.shape, mesh)
        else:
            sharding = meshes.replicated(mesh)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree_util.tree_map_with_path(place, state)
