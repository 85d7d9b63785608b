"""Gives the items of a log their rows before the first step (`tables.NAME.init` neighbours).

Shapes: I items, B items that are written together, n devices, K = 1 id of an item, D width of the table.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from s2s_jax.cluster.mesh import DATA_AXIS, batch_sharded
from s2s_jax.embedding.given_rows import with_given_rows
from s2s_jax.embedding.sharded import ShardedTables, Stored
from s2s_jax.training.growth import GrowthPlan
from s2s_jax.training.step.optimizer import table_moments, with_table_moments
from s2s_jax.training.step.settings import StepSettings
from s2s_jax.training.step.state import TrainState
from s2s_serve.encoding.feature import NO_ID

# Items of a device that are written together.
_TOGETHER = 4096


def with_item_rows(
    settings: StepSettings,
    mesh: Mesh,
    plan: GrowthPlan,
    state: TrainState,
    ids: np.ndarray,
    rows_ID: np.ndarray,
) -> TrainState:
    """Return the state before the first step, with given rows for items.

    Args:
      settings: the settings of the step.
      mesh: the devices.
      plan: the plan of the growth of tables, with room for the items; it learns how many ids have rows.
      state: the initial state; its item table is donated.
      ids: int32 `[I, K]` or `[I, K, 2]`, the encoded ids of different items; the same on all processes.
      rows_ID: f32, their rows; the same on all processes.
    """
    feature, name = settings.items.item, settings.items.item.table_name
    tables = ShardedTables((feature,), settings.tables, mesh, plan.capacities, settings.seed)
    by_place, by_row = batch_sharded(mesh), NamedSharding(mesh, PartitionSpec(DATA_AXIS))
    write = jax.jit(
        functools.partial(with_given_rows, tables, mesh, feature), donate_argnames="stored"
    )
    maps = {name: state.maps[name]} if feature.grows else {}
    moments = table_moments(state.opt_state)
    stored = Stored({name: state.params["tables"][name]}, {name: moments[name]}, maps)
    together = max(min(_TOGETHER, -(-len(ids) // mesh.size)), 1) * mesh.size
    with jax.transfer_guard("allow"):
        for begin in range(0, len(ids), together):
            part = slice(begin, begin + together)
            missing = together - len(ids[part])
            ids_B = _filled_up(ids[part], missing, NO_ID)[None, :, None]
            rows_BD = _filled_up(rows_ID[part], missing, 0)
            stored = write(
                stored=stored,
                ids=jax.make_array_from_callback(ids_B.shape, by_place, ids_B.__getitem__),
                given_BD=jax.make_array_from_callback(rows_BD.shape, by_row, rows_BD.__getitem__),
            )
        if feature.grows:
            of_table = stored.maps[name]
            # These ids were not seen in training yet.
            of_table = of_table._replace(count_R=jnp.zeros_like(of_table.count_R))
            stored = stored._replace(maps={name: of_table})
            plan.begin_with(name, int(of_table.rows_S.sum()), int(of_table.dropped_S.sum()))
    return state._replace(
        params=state.params | {"tables": state.params["tables"] | stored.values},
        opt_state=with_table_moments(state.opt_state, moments | stored.moments),
        maps=state.maps | stored.maps,
    )


def _filled_up(x_B: np.ndarray, missing: int, value: float) -> np.ndarray:
    return np.concatenate([x_B, np.full((missing, *x_B.shape[1:]), value, x_B.dtype)])
