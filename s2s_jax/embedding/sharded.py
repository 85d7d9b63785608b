"""All tables of a job on a mesh: lookup of a batch, embeddings, and the way back for gradients.

Each device finds the unique rows of its own part of the batch, fetches them from their owners
(`exchange.fetch`) and embeds its part with them. The model is differentiated with respect to these rows,
and `exchange.reduce` brings the gradients to the owners. On one device nothing travels.

Shapes: A microbatches, B rows of one, L positions, K ids of a bag, U unique rows of a device's part,
n devices, D table width.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh, PartitionSpec

from s2s_jax.config import FeatureConfig
from s2s_jax.embedding import exchange, lookup
from s2s_jax.embedding.tables import table_specs

Arrays = dict[str, jax.Array]


class Found(NamedTuple):
    """What a batch found in the tables; every leaf is sharded over the devices.

    Attributes:
      rows: f32 `[n * U, D]` of each table, the unique rows of each device's part of the batch.
      places: int32 `[A, B, L, K]` of each feature: where its ids are in the rows of their device.
      asked: what each device wanted of each table.
    """

    rows: Arrays
    places: Arrays
    asked: dict[str, exchange.Asked]


class ShardedTables:
    """The tables that some features read, sharded by rows over a mesh of one axis.

    Attributes:
      specs: the tables by name.
    """

    def __init__(self, features: Sequence[FeatureConfig], mesh: Mesh):
        self.specs = table_specs(features)
        self._features = {feature.name: feature for feature in features}
        self._mesh = mesh
        (self._axis,) = mesh.axis_names
        # Specs of arrays sharded by their first axis, and of those with microbatches before it.
        self._first = PartitionSpec(self._axis)
        self._second = PartitionSpec(None, self._axis)

    def look_up(self, tables: Mapping[str, jax.Array], ids: Mapping[str, jax.Array]) -> Found:
        """The rows that a batch needs.

        Args:
          tables: `[R, D]` by name.
          ids: int32 `[A, B, L, K]` buckets of each feature, negative where there is none.
        """

        def on_device(tables: Arrays, ids: Arrays) -> Found:
            asked, places = {}, {}
            for name, spec in self.specs.items():
                unique = lookup.deduplicate(spec, ids)
                asked[name] = exchange.ask(unique.rows_U, spec.rows, self._mesh.size)
                places |= unique.places
            return Found(exchange.fetch(tables, asked, self._axis), places, asked)

        return jax.shard_map(
            on_device,
            mesh=self._mesh,
            in_specs=(self._first, self._second),
            out_specs=Found(self._first, self._second, self._first),  # pyright: ignore[reportArgumentType]
        )(dict(tables), dict(ids))

    def embed(
        self, rows: Arrays, places: Mapping[str, jax.Array], ids: Mapping[str, jax.Array]
    ) -> Arrays:
        """Embeddings `[B, L, D]` of each feature for one microbatch.

        Args:
          rows: see `Found`; the result can be differentiated with respect to them.
          places: `[B, L, K]`, see `Found`.
          ids: `[B, L, K]`, negative where there is none.
        """

        def on_device(rows: Arrays, places: Arrays, ids: Arrays) -> Arrays:
            return {
                name: lookup.combine(
                    rows[feature.table_name], places[name], ids[name] >= 0, feature.combiner
                )
                for name, feature in self._features.items()
            }

        spec = self._first
        return jax.shard_map(on_device, mesh=self._mesh, in_specs=spec, out_specs=spec)(
            rows, dict(places), dict(ids)
        )

    def reduce(
        self, asked: dict[str, exchange.Asked], gradients: Arrays, visit: exchange.Visit, carry: Any
    ) -> Any:
        """Gives `visit` the gradients of all rows, summed, where the rows live: see `exchange.reduce`.

        Args:
          asked: see `Found`.
          gradients: of the rows that were found.
          visit: `(carry, windows) -> carry`, on each device.
          carry: tables and arrays beside them, sharded by their first axis.
        """
        local_rows = {name: spec.rows // self._mesh.size for name, spec in self.specs.items()}

        def on_device(asked: Any, gradients: Arrays, carry: Any) -> Any:
            return exchange.reduce(gradients, asked, local_rows, visit, carry, self._axis)

        spec = self._first
        return jax.shard_map(on_device, mesh=self._mesh, in_specs=spec, out_specs=spec)(
            asked, gradients, carry
        )
