"""All tables of a job on a mesh: lookup of a batch, embeddings, and the way back for gradients.

Each device finds the unique rows of its own part of the batch (where a table grows, by asking the owners
of its ids), fetches them (`exchange.fetch`) and embeds its part with them. The model is differentiated
with respect to these rows, and `exchange.reduce` brings the gradients to the owners. On one device
nothing travels.

Shapes: A microbatches, B rows of one, L positions, K ids of a bag, U unique rows of a device's part,
V ids that an owner is asked for, n devices, R rows and D width of a table.
"""

import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from s2s_jax.config import FeatureConfig, TableConfig
from s2s_jax.embedding import exchange, id_keys, id_map, lookup
from s2s_jax.embedding.lookup import Arrays
from s2s_jax.embedding.tables import NUM_SEGMENTS, TableSpec, table_specs

Maps = dict[str, id_map.IdMap]

_Carry = TypeVar("_Carry")


class Found(NamedTuple):
    """What a batch found in the tables; every leaf is sharded over the devices.

    Attributes:
      rows: f32 `[n * U, D]` of each table, the unique rows of each device's part of the batch.
      places: int32 `[A, B, L, K]` of each feature: where its ids are in the rows of their device.
      asked: what each device wanted of each table.
      unknown: bool `[n * U]` of each growing table: which of the rows are of ids that have none, and so
        stand-ins.
    """

    rows: Arrays
    places: Arrays
    asked: dict[str, exchange.Asked]
    unknown: Arrays


class Stored(NamedTuple):
    """What the tables of a job consist of.

    Attributes:
      values: f32 `[R, D]` by table.
      moments: of the optimizer, `[R, 2 D]` by table.
      maps: of the tables that grow.
    """

    values: Arrays
    moments: Arrays
    maps: Maps


class _Wanted(NamedTuple):
    """The unique rows of one table on one device.

    Attributes:
      rows_U: see `exchange.Asked`.
      places: see `Found`.
      keys_U2: of a growing table, the keys of the rows' ids.
      unknown_U: bool, which of them have no row.
    """

    rows_U: jax.Array
    places: Arrays
    keys_U2: jax.Array
    unknown_U: jax.Array


class ShardedTables:
    """The tables that some features read, sharded by rows over a mesh of one axis.

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
        """Prepares lookups.

        Args:
          features: say which tables there are.
          tables: the settings of each of them.
          mesh: the devices.
          capacities: rows of growing tables; None: those they start with.
          seed: of the initial rows of growing tables.
        """
        self.specs = table_specs(features, tables, capacities)
        self._settings = {table.name: table for table in tables}
        self._features = {feature.name: feature for feature in features}
        self._mesh = mesh
        self._seed = seed
        (self._axis,) = mesh.axis_names
        # Specs of arrays sharded by their first axis, and of those with microbatches before it.
        self._first = PartitionSpec(self._axis)
        self._second = PartitionSpec(None, self._axis)
        specs: Any = (self._first, self._second, self._first, self._first)
        self._found_specs = Found(*specs)

    def policy(self, name: str) -> id_map.Policy:
        """What happens to new ids of a growing table."""
        settings = self._settings[name]
        at_most = settings.max_capacity
        full = at_most is not None and self.specs[name].rows >= at_most
        return id_map.Policy(settings.admit_after, full and settings.on_full == "evict")

    def empty_maps(self) -> Maps:
        """Maps without ids of all tables that grow."""
        return {
            name: id_map.empty_map(spec.rows, self.policy(name).admit_after)
            for name, spec in self.specs.items()
            if spec.grows
        }

    def look_up(self, values: Arrays, maps: Maps, ids: Mapping[str, jax.Array]) -> Found:
        """The rows that a batch needs; zeros for ids without a row (see `with_default_rows`).

        Args:
          values: `[R, D]` by table.
          maps: of the tables that grow.
          ids: int32 `[A, B, L, K]` buckets of each feature or, where its table grows, words
            `[A, B, L, K, 2]`; negative, both words -1, where there is none.
        """

        def on_device(values: Arrays, maps: Maps, ids: Arrays) -> Found:
            wanted = {}
            for name, spec in self.specs.items():
                wanted[name] = self._want(spec, ids, maps, None)[0]
            return self._fetch(values, wanted, initial=False)

        return jax.shard_map(
            on_device,
            mesh=self._mesh,
            in_specs=(self._first, self._first, self._second),
            out_specs=self._found_specs,
        )(dict(values), dict(maps), dict(ids))

    def admit(
        self, stored: Stored, ids: Mapping[str, jax.Array], step: jax.Array
    ) -> tuple[Stored, Found]:
        """The rows that a batch needs in training; new ids of growing tables get rows first.

        Ids that get none, because they are not admitted yet or find no free slot, have their initial
        value, and what they would learn is lost; or zeros, where their table has a default row.

        Args:
          stored: the tables; of those that grow, all may change.
          ids: see `look_up`.
          step: int32, this step.
        """

        def on_device(stored: Stored, ids: Arrays, step: jax.Array) -> tuple[Stored, Found]:
            values, moments, maps = dict(stored.values), dict(stored.moments), dict(stored.maps)
            wanted = {}
            for name, spec in self.specs.items():
                beside = (values[name], moments[name])
                wanted[name], changed = self._want(spec, ids, maps, (step, beside))
                if spec.grows:
                    maps[name], (values[name], moments[name]) = changed
            return Stored(values, moments, maps), self._fetch(values, wanted, initial=True)

        return jax.shard_map(
            on_device,
            mesh=self._mesh,
            in_specs=(self._first, self._second, PartitionSpec()),
            out_specs=(self._first, self._found_specs),
        )(stored, dict(ids), step)

    def _want(self, spec: TableSpec, ids: Arrays, maps: Maps, training: Any) -> tuple[_Wanted, Any]:
        """Unique rows of a table and, in training, its map and the arrays beside it afterwards."""
        if not spec.grows:
            unique = lookup.deduplicate(spec, ids)
            none = jnp.zeros((0, 2), jnp.uint32)
            return _Wanted(unique.rows_U, unique.places, none, jnp.zeros(0, bool)), None
        words_M2 = jnp.concatenate([ids[name].reshape(-1, 2) for name in spec.features])
        words_M2 = jax.lax.bitcast_convert_type(words_M2, jnp.uint32)
        keys_M2 = jnp.stack(id_keys.keys_of(words_M2[:, 0], words_M2[:, 1]), axis=1)
        unique = id_keys.unique_keys(keys_M2)
        carry, row_U = self._ask_for_rows(spec, unique, maps[spec.name], training)
        # By rows, as what is exchanged must be.
        number_U = jnp.arange(row_U.size, dtype=jnp.int32)
        rows_U, from_U = jax.lax.sort(
            (jnp.where(row_U >= 0, row_U, spec.rows + number_U), number_U), num_keys=1
        )
        place_U = jnp.zeros_like(number_U).at[from_U].set(number_U, unique_indices=True)
        place_M = place_U[unique.place_M]
        places, begin = {}, 0
        for name in spec.features:
            shape = ids[name].shape[:-1]
            size = int(np.prod(shape))
            places[name] = place_M[begin : begin + size].reshape(shape)
            begin += size
        keys_U2 = unique.keys_U2[from_U]
        unknown_U = (rows_U >= spec.rows) & id_keys.is_there(keys_U2)
        return _Wanted(rows_U, places, keys_U2, unknown_U), carry

    def _ask_for_rows(
        self, spec: TableSpec, unique: id_keys.UniqueKeys, of_table: id_map.IdMap, training: Any
    ) -> tuple[Any, jax.Array]:
        """Rows of unique keys, -1 where they have none; in training, the map and what is beside it."""
        devices = self._mesh.size
        device = jax.lax.axis_index(self._axis)
        segments = NUM_SEGMENTS // devices
        first_segment = device * segments

        def in_table(row_V: jax.Array) -> jax.Array:
            return jnp.where(row_V >= 0, row_V + device * (spec.rows // devices), -1)

        def find(of_table: id_map.IdMap, asked_V3: jax.Array) -> tuple[Any, jax.Array]:
            return of_table, in_table(id_map.find(of_table, asked_V3[:, :2], first_segment))

        def claim(carry: Any, asked_V3: jax.Array) -> tuple[Any, jax.Array]:
            of_table, beside, moved = carry
            keys_V2, count_V = asked_V3[:, :2], asked_V3[:, 2].astype(jnp.int32)
            number_V = jnp.arange(count_V.size, dtype=jnp.int32)
            asked = id_keys.UniqueKeys(keys_V2, count_V, number_V)
            if devices > 1:
                asked = id_keys.unique_keys(keys_V2, count_V)
            claimed = id_map.find_or_claim(
                of_table,
                asked,
                first_segment,
                training[0],
                self.policy(spec.name),
                beside,
                self._row_maker(spec),
            )
            carry = claimed.id_map, claimed.beside, moved + claimed.moved
            return carry, in_table(claimed.row_U[asked.place_M])

        there_U = id_keys.is_there(unique.keys_U2)
        segment_U = jnp.where(there_U, id_keys.segment_of(unique.keys_U2), NUM_SEGMENTS)
        bounds = jnp.arange(devices + 1, dtype=jnp.int32) * segments
        begins_n1 = jnp.searchsorted(segment_U, bounds).astype(jnp.int32)
        asked_U3 = jnp.concatenate(
            [unique.keys_U2, unique.count_U[:, None].astype(jnp.uint32)], axis=1
        )

        def ask(answer: Any, carry: Any) -> tuple[Any, jax.Array]:
            return exchange.query(asked_U3, begins_n1, id_keys.EMPTY, answer, carry, self._axis)

        if training is None:
            return ask(find, of_table)
        if self.policy(spec.name).evict and devices > 1:
            # New ids of one round must not take the rows of ids that are asked for in the next.
            def see(of_table: id_map.IdMap, asked_V3: jax.Array) -> tuple[Any, jax.Array]:
                of_table = id_map.seen(of_table, asked_V3[:, :2], first_segment, training[0])
                return of_table, jnp.full(len(asked_V3), -1, jnp.int32)

            of_table = jax.lax.cond(
                exchange.query_rounds(len(asked_U3), begins_n1, self._axis) > 1,
                lambda of_table: ask(see, of_table)[0],
                lambda of_table: of_table,
                of_table,
            )
        moved = jnp.zeros_like(of_table.rows_S[0])
        (of_table, beside, moved), row_U = ask(claim, (of_table, training[1], moved))
        # Rows that moved may have been found before they did.
        row_U = jax.lax.cond(
            jax.lax.psum(moved, self._axis) > 0,
            lambda: ask(find, of_table)[1],
            lambda: row_U,
        )
        return (of_table, beside), row_U

    def _row_maker(self, spec: TableSpec) -> Any:
        def make(beside: Any, rows_C: jax.Array, keys_C2: jax.Array) -> Any:
            values_RD, moments_R2D = beside
            new_CD = self._initial(spec, keys_C2)
            no_CM = jnp.zeros((rows_C.size, moments_R2D.shape[1]), moments_R2D.dtype)
            options: Any = {"mode": "drop", "unique_indices": True}
            return (
                values_RD.at[rows_C].set(new_CD, **options),
                moments_R2D.at[rows_C].set(no_CM, **options),
            )

        return make

    def _initial(self, spec: TableSpec, keys_C2: jax.Array) -> jax.Array:
        seed = zlib.crc32(f"{self._seed} {spec.name}".encode())
        return id_keys.initial_rows(seed, spec.init_std, keys_C2, spec.emb_dim)

    def _fetch(self, values: Arrays, wanted: dict[str, _Wanted], initial: bool) -> Found:
        """Rows of all tables; of unknown ids, zeros or (without a default row) initial values."""
        asked = {
            name: exchange.ask(w.rows_U, self.specs[name].rows, self._mesh.size)
            for name, w in wanted.items()
        }
        rows = exchange.fetch(values, asked, self._axis)
        places, unknown = {}, {}
        for name, (_, places_of, keys_U2, unknown_U) in wanted.items():
            places |= places_of
            spec = self.specs[name]
            if not spec.grows:
                continue
            unknown[name] = unknown_U
            if initial and not spec.default_row:

                def with_initial(
                    rows_UD: jax.Array, spec: TableSpec = spec, unknown_U=unknown_U, keys=keys_U2
                ) -> jax.Array:
                    return jnp.where(unknown_U[:, None], self._initial(spec, keys), rows_UD)

                rows[name] = jax.lax.cond(
                    unknown_U.any(), with_initial, lambda rows_UD: rows_UD, rows[name]
                )
        return Found(rows, places, asked, unknown)

    def embed(
        self, rows: Arrays, places: Mapping[str, jax.Array], ids: Mapping[str, jax.Array]
    ) -> Arrays:
        """Embeddings `[B, L, D]` of the features of `ids` for one microbatch.

        Args:
          rows: see `Found`; the result can be differentiated with respect to them.
          places: `[B, L, K]`, see `Found`.
          ids: of the microbatch, see `look_up`.
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
        """bool `[A, B, L, K]`: where a feature whose table grows has an id without a row."""

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
        asked: dict[str, exchange.Asked],
        gradients: Arrays,
        visit: exchange.Visit[_Carry],
        carry: _Carry,
    ) -> _Carry:
        """Gives `visit` the gradients of all rows, summed, where the rows live: see `exchange.reduce`.

        Args:
          asked: see `Found`.
          gradients: of the rows that were found.
          visit: `(carry, windows) -> carry`, on each device.
          carry: tables and arrays beside them, sharded by their first axis.
        """
        local_rows = {name: spec.rows // self._mesh.size for name, spec in self.specs.items()}

        def on_device(asked: dict[str, exchange.Asked], gradients: Arrays, carry: _Carry) -> _Carry:
            return exchange.reduce(gradients, asked, local_rows, visit, carry, self._axis)

        spec = self._first
        return jax.shard_map(on_device, mesh=self._mesh, in_specs=spec, out_specs=spec)(
            asked, gradients, carry
        )


def with_default_rows(rows: Arrays, unknown: Arrays, defaults: Arrays) -> Arrays:
    """Rows in which the default row of a table stands for each id that has none.

    A gradient of the result goes to the default rows from just these ids, and to `rows` from the others.

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
    """bool `[…, K]`: which places of a feature hold an id."""
    mine = ids[feature.name]
    return (mine != -1).any(axis=-1) if feature.grows else mine >= 0
