"""Tables: which features share one, and how its rows are laid out, sharded and initialised.

Shapes: S segments, R rows of a table (including padding), D width of a table.

The layout does not depend on the number of devices. A table is cut into S segments; bucket b is in
segment b mod S at place b div S, so that small ids, which are often the popular ones, are spread over
all segments. Device d of n owns the contiguous segments [d S/n, (d+1) S/n), as with a `NamedSharding`
over axis 0, and a checkpoint can be restored on any number of devices that divides S.
"""

import dataclasses
import math
import zlib
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp

from s2s_jax.config import FeatureConfig, TableConfig
from s2s_serve.encoding.table_layout import NUM_SEGMENTS as NUM_SEGMENTS
from s2s_serve.encoding.table_layout import row_of_bucket

# Rows of a bucket of a growing table (see `id_map`): the smallest size with which tables can be filled
# to 0.85 without loss, given two choices.
SLOTS = 16


@dataclasses.dataclass(frozen=True)
class TableSpec:
    """A bucket table, or a growing table.

    Attributes:
      name: name of the table in checkpoints.
      buckets: number of buckets; for a growing table, its current number of rows.
      emb_dim: D.
      init_std: standard deviation of initial values.
      features: names of the features that use the table.
      grows: whether each id has its own row, found with an `id_map.IdMap`.
      default_row: whether one trained row represents all ids without a row.
    """

    name: str
    buckets: int
    emb_dim: int
    init_std: float
    features: tuple[str, ...]
    grows: bool = False
    default_row: bool = False

    @property
    def segment_rows(self) -> int:
        """Number of rows of a segment."""
        return -(-self.buckets // NUM_SEGMENTS)

    @property
    def rows(self) -> int:
        """R, number of rows of the table: its buckets, rounded up to whole segments."""
        return NUM_SEGMENTS * self.segment_rows


def table_specs(
    features: Sequence[FeatureConfig],
    tables: Sequence[TableConfig],
    capacities: Mapping[str, int] | None = None,
) -> dict[str, TableSpec]:
    """The tables of `features`, by name, in the order of their first use.

    Args:
      features: the features.
      tables: settings of each table.
      capacities: rows of each growing table; None: initial capacities.
    """
    specs: dict[str, TableSpec] = {}
    settings = {table.name: table for table in tables}
    for feature in features:
        name = feature.table_name
        earlier = specs[name].features if name in specs else ()
        rows, table = feature.hash_bucket_size, settings[name]
        if feature.grows:
            rows = usable_capacity(table.capacity) if capacities is None else capacities[name]
        specs[name] = TableSpec(
            name=name,
            buckets=rows,
            emb_dim=feature.emb_dim,
            init_std=table.init_std,
            features=(*earlier, feature.name),
            grows=feature.grows,
            default_row=table.unknown == "default_row",
        )
    return specs


def usable_capacity(rows: int) -> int:
    """The smallest capacity of a growing table with at least `rows` rows: a power of two buckets.

    Examples:
      >>> usable_capacity(1), usable_capacity(5000)
      (4096, 8192)
    """
    buckets = math.ceil(rows / (NUM_SEGMENTS * SLOTS))
    return NUM_SEGMENTS * SLOTS * 2 ** (buckets - 1).bit_length()


def rows_of_buckets(spec: TableSpec, buckets: jax.Array) -> jax.Array:
    """The rows of buckets in the table.

    Args:
      spec: the table.
      buckets: int32 of any shape; negative for no id.

    Returns:
      int32 rows; `spec.rows`, one past the end, for no id.

    Examples:
      >>> spec = TableSpec("item_id", buckets=300, emb_dim=8, init_std=0.1, features=("item_id",))
      >>> rows_of_buckets(spec, jnp.array([0, 1, 256, -1])).tolist()  # segments have 2 rows
      [0, 2, 1, 512]
    """
    return jnp.where(buckets >= 0, row_of_bucket(buckets, spec.segment_rows), spec.rows)


def init_table(spec: TableSpec, key: jax.Array) -> jax.Array:
    """Initial values, f32 `[R, D]`: normal with `init_std`, truncated at two standard deviations.

    A value only depends on the key, the table's name and its place, so that under `jit` with sharded
    outputs each device only makes its own shard. Rows of growing tables are zero until an id gets them.
    """
    if spec.grows:
        return jnp.zeros((spec.rows, spec.emb_dim))
    key = jax.random.fold_in(key, zlib.crc32(spec.name.encode()))
    unit_RD = jax.random.truncated_normal(key, -2.0, 2.0, (spec.rows, spec.emb_dim), jnp.float32)
    return unit_RD * spec.init_std
