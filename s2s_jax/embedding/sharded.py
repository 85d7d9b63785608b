"""All tables of a job on a mesh: from the ids of a batch to embeddings, and back for gradients.

Each device looks up the unique rows of its own part of the batch, and embeds its part with them. The
model is differentiated with respect to these rows, and `exchange.reduce` sends the gradients to the
owners. On one device, nothing is sent. All files of this package use these words:

  find: determine the row of an id. For a bucket it is known; a growing table has a map.
  claim: find, after giving rows to new ids.
  ask: let the device that owns an id find or claim its row.
  fetch: get rows from the devices that own them.
  look up: find and fetch.
  admit: claim and fetch, as in training.

Shapes: A microbatches, B rows of a microbatch, L positions, K ids of a bag, U unique rows of a device's
part, n devices, R rows and D width of a table.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from s2s_jax.config import FeatureConfig, TableConfig
from s2s_jax.embedding import exchange, id_map, lookup
from s2s_jax.embedding.claiming import Policy
from s2s_jax.embedding.growing_table import FoundRows, GrowingTable, Rows
from s2s_jax.embedding.lookup import Arrays, UniqueRows
from s2s_jax.embedding.tables import table_specs
from s2s_serve.encoding.feature import NO_ID

Maps = dict[str, id_map.IdMap]

_Carry = TypeVar("_Carry")


class Found(NamedTuple):
    """The rows that a batch found in the tables; every leaf is sharded over the devices.

    Attributes:
      rows: f32 `[n * U, D]` of each table, the unique rows of each device's part of the batch.
      places: int32 `[A, B, L, K]` of each feature: indices of its ids in the rows of their device.
      needed: the rows that each device needed of each table.
      unknown: bool `[n * U]` of each growing table: whether an entry of `rows` is a substitute for an id
        without a row.
    """

    rows: Arrays
    places: Arrays
    needed: dict[str, exchange.Needed]
    unknown: Arrays


class Stored(NamedTuple):
    """The contents of the tables of a job.

    Attributes:
      values: f32 `[R, D]` by table.
      moments: moments of the optimizer, `[R, 2 D]` by table.
      maps: maps of growing tables.
      averages: averages of rows, `[R, D + 1]` by table; None if there are none.
    """

    values: Arrays
    moments: Arrays
    maps: Maps
    averages: Arrays | None = None


class ShardedTables:
    """The tables of some features, with rows sharded over a mesh with one axis.

    Attributes:
      specs: the tables by name.
    """

    def __init__(
        self,
        features: Sequence[FeatureConfig],
        tables: Sequence[TableConfig],
        mesh: Mesh,
        capacities: Mapping[str, int] | None = None,
        seed: int = 0,
    ):
        """Prepares look-ups.

        Args:
          features: the features, which determine the tables.
          tables: settings of each table.
          mesh: the devices.
          capacities: rows of growing tables; None: initial capacities.
          seed: seed of the initial rows of growing tables.
        """
        self.specs = table_specs(features, tables, capacities)
        self._settings = {table.name: table for table in tables}
        self._features = {feature.name: feature for feature in features}
        self._mesh = mesh
        (self._axis,) = mesh.axis_names
        self._growing = {
            name: GrowingTable(spec, self.policy(name), seed, self._axis, mesh.size)
            for name, spec in self.specs.items()
            if spec.grows
        }
        # Specs of arrays that are sharded along their first axis, or along the second, after
        # microbatches.
        self._first = PartitionSpec(self._axis)
        self._second = PartitionSpec(None, self._axis)
        self._found_specs = Found._make((self._first, self._second, self._first, self._first))

    def policy(self, name: str) -> Policy:
        """The policy for new ids of a growing table."""
        settings = self._settings[name]
        at_most = settings.max_capacity
        full = at_most is not None and self.specs[name].rows >= at_most
        return Policy(settings.admit_after, full and settings.on_full == "evict")

    def empty_maps(self) -> Maps:
        """Maps without ids for all growing tables."""
        return {
            name: id_map.empty_map(spec.rows, self.policy(name).admit_after)
            for name, spec in self.specs.items()
            if spec.grows
        }

    def look_up(self, values: Arrays, maps: Maps, ids: Mapping[str, jax.Array]) -> Found:
        """The rows that a batch needs; zeros for ids without a row (see `with_default_rows`).

        Args:
          values: `[R, D]` by table.
          maps: maps of growing tables.
          ids: int32 `[A, B, L, K]` buckets of each feature or, if its table grows, words
            `[A, B, L, K, 2]`; `NO_ID`, in both words, for missing ids.
        """

        def on_device(values: Arrays, maps: Maps, ids: Arrays) -> Found:
            return self._fetch(values, self._find(maps, ids), initial=False)

        return jax.shard_map(
            on_device,
            mesh=self._mesh,
            in_specs=(self._first, self._first, self._second),
            out_specs=self._found_specs,
        )(dict(values), dict(maps), dict(ids))

    def admit(
        self, stored: Stored, ids: Mapping[str, jax.Array], step: jax.Array
    ) -> tuple[Stored, Found]:
        """The rows that a batch needs in training; new ids of growing tables first get rows.

        Ids may get no row because they are not admitted yet or find no free slot. Then they have their
        initial value, and their updates are lost; or zeros, if their table has a default row.

        Args:
          stored: the tables; everything of growing tables may change.
          ids: see `look_up`.
          step: int32, this step.
        """

        def on_device(stored: Stored, ids: Arrays, step: jax.Array) -> tuple[Stored, Found]:
            stored, found = self._claim(stored, ids, step)
            return stored, self._fetch(stored.values, found, initial=True)

        return jax.shard_map(
            on_device,
            mesh=self._mesh,
            in_specs=(self._first, self._second, PartitionSpec()),
            out_specs=(self._first, self._found_specs),
        )(stored, dict(ids), step)

    def _find(self, maps: Maps, ids: Arrays) -> dict[str, UniqueRows | FoundRows]:
        """The unique rows of each table on one device."""
        found: dict[str, UniqueRows | FoundRows] = {}
        for name, spec in self.specs.items():
            if spec.grows:
                table = self._growing[name]
                unique = table.unique_keys(ids)
                found[name] = table.found_rows(unique, table.find(unique, maps[name]), ids)
            else:
                found[name] = lookup.deduplicate(spec, ids)
        return found

    def _claim(
        self, stored: Stored, ids: Arrays, step: jax.Array
    ) -> tuple[Stored, dict[str, UniqueRows | FoundRows]]:
        """The same as `_find`, but new ids of growing tables first get rows."""
        values, moments, maps = dict(stored.values), dict(stored.moments), dict(stored.maps)
        averages = None if stored.averages is None else dict(stored.averages)
        found: dict[str, UniqueRows | FoundRows] = {}
        for name, spec in self.specs.items():
            if spec.grows:
                table = self._growing[name]
                unique = table.unique_keys(ids)
                of_rows = None if averages is None else averages[name]
                rows = Rows(values[name], moments[name], of_rows)
                maps[name], rows, row_U = table.claim(unique, maps[name], rows, step)
                values[name], moments[name] = rows.values_RD, rows.moments_RM
                if averages is not None and rows.averages_RA is not None:
                    averages[name] = rows.averages_RA
                found[name] = table.found_rows(unique, row_U, ids)
            else:
                found[name] = lookup.deduplicate(spec, ids)
        return Stored(values, moments, maps, averages), found

    def _fetch(
        self, values: Arrays, found: Mapping[str, UniqueRows | FoundRows], initial: bool
    ) -> Found:
        """Rows of all tables; for unknown ids, zeros or (without a default row) initial values."""
        needed = {
            name: exchange.by_owner(each.rows_U, self.specs[name].rows, self._mesh.size)
            for name, each in found.items()
        }
        rows = exchange.fetch(values, needed, self._axis)
        places, unknown = {}, {}
        for name, each in found.items():
            places |= each.places
            if not isinstance(each, FoundRows):
                continue
            unknown[name] = each.unknown_U
            if initial and not self.specs[name].default_row:
                rows[name] = _with_initial(self._growing[name], each, rows[name])
        return Found(rows, places, needed, unknown)

    def embed(
        self, rows: Arrays, places: Mapping[str, jax.Array], ids: Mapping[str, jax.Array]
    ) -> Arrays:
        """Embeddings `[B, L, D]` of the features of `ids` for one microbatch.

        Args:
          rows: see `Found`; the result can be differentiated with respect to them.
          places: `[B, L, K]`, see `Found`.
          ids: ids of the microbatch, see `look_up`.
        """

        def on_device(rows: Arrays, places: Arrays, ids: Arrays) -> Arrays:
            embeddings = {}
            for name in ids:
                feature = self._features[name]
                embeddings[name] = lookup.combine(
                    rows[feature.table_name], places[name], present(feature, ids), feature.combiner
                )
            return embeddings

        spec = self._first
        return jax.shard_map(on_device, mesh=self._mesh, in_specs=spec, out_specs=spec)(
            rows, dict(places), dict(ids)
        )

    def without_row(self, found: Found, name: str) -> jax.Array:
        """bool `[A, B, L, K]`: whether a feature with a growing table has an id without a row."""

        def on_device(unknown_U: jax.Array, places: jax.Array) -> jax.Array:
            return unknown_U[places]

        return jax.shard_map(
            on_device,
            mesh=self._mesh,
            in_specs=(self._first, self._second),
            out_specs=self._second,
        )(found.unknown[self._features[name].table_name], found.places[name])

    def reduce(
        self,
        needed: dict[str, exchange.Needed],
        gradients: Arrays,
        visit: exchange.Visit[_Carry],
        carry: _Carry,
    ) -> _Carry:
        """Calls `visit` with the summed gradients of all rows, on their owners: see `exchange.reduce`.

        Args:
          needed: see `Found`.
          gradients: gradients of the rows that were found.
          visit: `(carry, {table: RowGradients}) -> carry`, on each device.
          carry: tables and arrays that belong to them, sharded along their first axis.
        """
        local_rows = {name: spec.rows // self._mesh.size for name, spec in self.specs.items()}

        def on_device(
            needed: dict[str, exchange.Needed], gradients: Arrays, carry: _Carry
        ) -> _Carry:
            return exchange.reduce(gradients, needed, local_rows, visit, carry, self._axis)

        spec = self._first
        return jax.shard_map(on_device, mesh=self._mesh, in_specs=spec, out_specs=spec)(
            needed, gradients, carry
        )


def _with_initial(table: GrowingTable, found: FoundRows, rows_UD: jax.Array) -> jax.Array:
    """The rows, with initial values for ids without a row."""

    def with_initial(rows_UD: jax.Array) -> jax.Array:
        return jnp.where(found.unknown_U[:, None], table.initial_rows(found.keys_U2), rows_UD)

    return jax.lax.cond(found.unknown_U.any(), with_initial, lambda rows_UD: rows_UD, rows_UD)


def with_default_rows(rows: Arrays, unknown: Arrays, defaults: Arrays) -> Arrays:
    """The rows, with the table's default row for each id without a row.

    Gradients of the result go to the default rows for these ids, and to `rows` for the others.

    Args:
      rows: see `Found`.
      unknown: see `Found`.
      defaults: f32 `[D]` of each table that has a default row.
    """
    filled = {
        name: jnp.where(unknown[name][:, None], default_D[None], rows[name])
        for name, default_D in defaults.items()
    }
    return rows | filled


def present(feature: FeatureConfig, ids: Mapping[str, jax.Array]) -> jax.Array:
    """bool `[…, K]`: whether a place of a feature has an id."""
    mine = ids[feature.name]
    return (mine != NO_ID).any(axis=-1) if feature.grows else mine >= 0
