"""Growth of tables and eviction of ids between steps, decided from the metrics of steps.

The metrics of step s are read while step s + 1 runs, so a table doubles just before step s + 2. The
plan is saved in checkpoints, so a continued run grows tables at the same steps as an uninterrupted one.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import jax
from jax.sharding import Mesh, PartitionSpec

from s2s_jax.cluster.mesh import DATA_AXIS
from s2s_jax.config import FeatureConfig, TableConfig
from s2s_jax.embedding import id_map
from s2s_jax.embedding.tables import NUM_SEGMENTS, table_specs, usable_capacity
from s2s_jax.training.step.optimizer import table_moments, with_table_moments
from s2s_jax.training.step.params import Params
from s2s_jax.training.step.state import TrainState

_MAX_LOAD = 0.85
_LAG = 2
# The fullest of 256 segments exceeds their mean by about this many standard deviations.
_UNEVEN = 3.2


def max_load(capacity: int) -> float:
    """Return the load at which a table grows; lower for small tables, whose segments fill unevenly."""
    return min(_MAX_LOAD, 1 - _UNEVEN / (capacity / NUM_SEGMENTS) ** 0.5)


class GrowthPlan:
    """Decides which tables grow before which steps.

    Attributes:
      capacities: the number of rows of each growing table, including growth that is already planned.
      full: a message about a full table that must not grow; None if there is no such table.
    """

    def __init__(self, features: Sequence[FeatureConfig], tables: Sequence[TableConfig]):
        """Start with the configured capacities.

        Args:
          features: the features of events.
          tables: the settings of their tables.
        """
        specs = table_specs(features, tables)
        by_name = {table.name: table for table in tables}
        self._tables = {name: by_name[name] for name, spec in specs.items() if spec.grows}
        self.capacities = {name: specs[name].rows for name in self._tables}
        self.full: str | None = None
        self._rows = dict.fromkeys(self._tables, 0)
        self._dropped = dict.fromkeys(self._tables, 0)
        self._due: dict[int, list[str]] = {}

    def make_room(self, name: str, ids: int) -> int:
        """Raise the capacity of a table before the first step, so that some ids fit.

        Args:
          name: the table; the capacity of a table that does not grow stays as it is.
          ids: the number of ids that should fit.

        Returns:
          How many of them fit.
        """
        if name not in self._tables:
            return ids
        while ids > max_load(self.capacities[name]) * self.capacities[name]:
            if not _may_double(self._tables[name], self.capacities[name]):
                return int(max_load(self.capacities[name]) * self.capacities[name])
            self.capacities[name] *= 2
        return ids

    def begin_with(self, name: str, rows: int, dropped: int) -> None:
        """Take note of the rows that have ids before the first step, and of ids without a free slot."""
        self._rows[name], self._dropped[name] = rows, dropped

    def update(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Plan growth from the metrics of `step`."""
        for name, table in self._tables.items():
            rows = int(metrics[f"table/{name}/rows"])
            dropped = int(metrics[f"table/{name}/dropped"])
            new, newly_dropped = rows - self._rows[name], dropped - self._dropped[name]
            self._rows[name], self._dropped[name] = rows, dropped
            capacity = self.capacities[name]
            if int(metrics[f"table/{name}/capacity"]) != capacity:
                continue  # Growth is planned, but this step was before it.
            expected = rows + _LAG * max(new, 0)
            if expected <= max_load(capacity) * capacity and newly_dropped == 0:
                continue
            if _may_double(table, capacity):
                self.capacities[name] = 2 * capacity
                self._due.setdefault(step + _LAG, []).append(name)
            elif table.on_full == "stop" and newly_dropped > 0:
                self.full = (
                    f"table {name} is full: {rows:,} ids in {capacity:,} rows, and {newly_dropped:,} of "
                    f"step {step} found no place; raise tables.{name}.max_capacity, or set its on_full "
                    f"to evict"
                )

    def take(self, step: int) -> list[str]:
        """Return the tables to double before `step`, and remove them from the plan."""
        return self._due.pop(step, [])

    def due(self, step: int) -> bool:
        """Whether tables must be doubled before `step`."""
        return step in self._due

    def capacities_now(self, step: int = 0) -> dict[str, int]:
        """Return the number of rows of each growing table in `step`, or now if `step` is past."""
        waiting = [name for after, names in self._due.items() if after > step for name in names]
        return {n: c // 2 ** waiting.count(n) for n, c in self.capacities.items()}

    def get_state(self) -> dict[str, Any]:
        """Return the state for a checkpoint, as JSON."""
        return {
            "capacities": self.capacities,
            "rows": self._rows,
            "dropped": self._dropped,
            "due": {str(step): names for step, names in self._due.items()},
        }

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Restore a state from `get_state`."""
        self.capacities = dict(state["capacities"])
        self._rows = dict(state["rows"])
        # In older checkpoints, devices computed these sums, and int32 may have overflowed.
        self._dropped = {n: x % 2**32 if x < 0 else x for n, x in state["dropped"].items()}
        self._due = {int(step): list(names) for step, names in state["due"].items()}

    def grow_at_least(self, step: int) -> None:
        """Plan growth to at least the configured capacities, for the step after `step`."""
        for name, table in self._tables.items():
            while self.capacities[name] < usable_capacity(table.capacity):
                self.capacities[name] *= 2
                self._due.setdefault(step + 1, []).append(name)


def _may_double(table: TableConfig, capacity: int) -> bool:
    most = table.max_capacity
    return 2 * capacity <= (2**30 if most is None else usable_capacity(most))


def doubled(state: TrainState, name: str, mesh: Mesh) -> TrainState:
    """Return the state with twice as many rows in table `name`; the old arrays are freed.

    Each device copies its own rows, one array after the other. So at any time, there is at most one new
    array in addition to the state.
    """
    segments = NUM_SEGMENTS // mesh.size
    spec = PartitionSpec(DATA_AXIS)

    def replaced(change: Any, old: Any) -> Any:
        new = jax.jit(jax.shard_map(change, mesh=mesh, in_specs=spec, out_specs=spec))(old)
        jax.block_until_ready(new)
        # Arrays that did not grow are small, and may be part of the new state.
        for was, now in zip(jax.tree.leaves(old), jax.tree.leaves(new), strict=True):
            if was.shape != now.shape:
                was.delete()
        return new

    def rows(x_R: jax.Array) -> jax.Array:
        return id_map.doubled_rows(x_R, segments)

    values, moments = state.params["tables"], table_moments(state.opt_state)
    values = values | {name: replaced(rows, values[name])}
    moments = moments | {name: replaced(rows, moments[name])}
    averages = cast(Params, state.averages)
    if averages:
        of_tables = averages["tables"]
        averages = averages | {"tables": of_tables | {name: replaced(rows, of_tables[name])}}
    return state._replace(
        params=state.params | {"tables": values},
        opt_state=with_table_moments(state.opt_state, moments),
        maps=state.maps | {name: replaced(id_map.doubled, state.maps[name])},
        averages=averages,
    )


class Evictions:
    """Evicts ids that occurred rarely or not for a long time from growing tables."""

    def __init__(
        self, features: Sequence[FeatureConfig], tables: Sequence[TableConfig], mesh: Mesh
    ):
        """Prepare eviction.

        Args:
          features: the features of events.
          tables: the settings of their tables.
          mesh: the devices.
        """
        specs = table_specs(features, tables)
        by_name = {table.name: table for table in tables}
        growing = [by_name[name] for name, spec in specs.items() if spec.grows]
        self._tables = {
            table.name: table
            for table in growing
            if table.evict_after_steps is not None or table.evict_below > 0
        }
        self._evict = {name: _evict(table, mesh) for name, table in self._tables.items()}

    def before(self, step: int, state: TrainState) -> TrainState:
        """Return the state for `step`, after the evictions that are due.

        Args:
          step: the next step.
          state: the state so far; maps that change are donated.
        """
        for name, table in self._tables.items():
            if step > 1 and (step - 1) % table.evict_every == 0:
                maps = state.maps | {name: self._evict[name](state.maps[name], state.step)}
                state = state._replace(maps=maps)
        return state


def _evict(table: TableConfig, mesh: Mesh) -> Callable[[id_map.IdMap, jax.Array], id_map.IdMap]:
    """Return a function of a table's map and the number of steps done; the map is donated."""

    def on_device(of_table: id_map.IdMap, step: jax.Array) -> id_map.IdMap:
        return id_map.evicted(of_table, step, table.evict_after_steps, table.evict_below)

    spec = PartitionSpec(DATA_AXIS)
    mapped = jax.shard_map(on_device, mesh=mesh, in_specs=(spec, PartitionSpec()), out_specs=spec)
    return jax.jit(mapped, donate_argnums=0)
