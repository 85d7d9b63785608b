"""Writes given rows into a table: rows for ids that are known before training starts.

The rows travel to their owners like gradients do, so this works for any table on any number of devices.

Shapes: B ids, n devices, U unique ids of a device's part, K = 1 id of a place, D width of the table.
"""

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from s2s_jax.config import FeatureConfig
from s2s_jax.embedding.exchange import RowGradients
from s2s_jax.embedding.lookup import Arrays, write_rows
from s2s_jax.embedding.sharded import ShardedTables, Stored


def with_given_rows(
    tables: ShardedTables,
    mesh: Mesh,
    feature: FeatureConfig,
    stored: Stored,
    ids: jax.Array,
    given_BD: jax.Array,
) -> Stored:
    """Return the tables after giving some ids their rows; new ids of growing tables first get a row.

    An id that gets no row, because its buckets are full, is left out.

    Args:
      tables: the tables; `feature` is their only one.
      mesh: the devices.
      feature: the feature of the ids.
      stored: the table of the feature.
      ids: int32 `[1, B, 1, K]` or `[1, B, 1, K, 2]`, see `ShardedTables.look_up`; an id may occur only
        once, and two ids may not have the same bucket.
      given_BD: f32, the rows; zeros for missing ids.
    """
    step = jnp.zeros((), jnp.int32)
    stored, found = tables.admit(stored, {feature.name: ids}, step)
    table = feature.table_name
    (axis,) = mesh.axis_names

    def in_order_of_rows(place: jax.Array, given_BD: jax.Array, rows_UD: jax.Array) -> jax.Array:
        return jnp.zeros_like(rows_UD).at[place.reshape(-1)].add(given_BD)

    first, second = PartitionSpec(axis), PartitionSpec(None, axis)
    given_UD = jax.shard_map(
        in_order_of_rows, mesh=mesh, in_specs=(second, first, first), out_specs=first
    )(found.places[feature.name], given_BD, found.rows[table])

    def write(values: Arrays, summed: dict[str, RowGradients]) -> Arrays:
        rows_G, sums_GD = summed[table]
        return values | {table: write_rows(values[table], rows_G, sums_GD)}

    values = tables.reduce(found.needed, {table: given_UD}, write, stored.values)
    return stored._replace(values=values)
