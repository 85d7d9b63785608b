"""Which features share which table, and how a table's rows are laid out, sharded and initialised.

Shapes: S segments, R rows of a table (padding included), D its width.

The layout does not know how many devices there are. A table is cut into S segments; bucket b lives
in segment b mod S at place b div S, so that small ids, which are often the popular ones, spread over
all segments. Device d of n owns the contiguous segments [d S/n, (d+1) S/n), which is what a
`NamedSharding` over axis 0 does, and a checkpoint restores on any device count that divides S.
"""

import dataclasses
import zlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from s2s_jax.config import FeatureConfig

# Also the largest number of devices, which must divide it.
NUM_SEGMENTS = 256


@dataclasses.dataclass(frozen=True)
class TableSpec:
    """A hash-bucket table.

    Attributes:
      name: its name in checkpoints, the features' `shard_name`.
      buckets: ids it can tell apart.
      emb_dim: D.
      init_std: standard deviation of its initial values.
      features: names of the features that read it.
    """

    name: str
    buckets: int
    emb_dim: int
    init_std: float
    features: tuple[str, ...]

    @property
    def segment_rows(self) -> int:
        """Rows of a segment."""
        return -(-self.buckets // NUM_SEGMENTS)

    @property
    def rows(self) -> int:
        """R, rows of the table: its buckets rounded up to whole segments."""
        return NUM_SEGMENTS * self.segment_rows


def table_specs(features: Sequence[FeatureConfig]) -> dict[str, TableSpec]:
    """The tables that `features` read, by name, in order of first use."""
    specs: dict[str, TableSpec] = {}
    for feature in features:
        name = feature.table_name
        earlier = specs[name].features if name in specs else ()
        specs[name] = TableSpec(
            name=name,
            buckets=feature.hash_bucket_size,
            emb_dim=feature.emb_dim,
            init_std=feature.init_std,
            features=(*earlier, feature.name),
        )
    return specs


def rows_of_buckets(spec: TableSpec, buckets: jax.Array) -> jax.Array:
    """Where buckets live in the table.

    Args:
      spec: the table.
      buckets: int32 of any shape; negative marks a place without an id.

    Returns:
      int32 rows; `spec.rows`, one past the end, where there is no id.
    """
    rows = buckets % NUM_SEGMENTS * spec.segment_rows + buckets // NUM_SEGMENTS
    return jnp.where(buckets >= 0, rows, spec.rows)


def init_table(spec: TableSpec, key: jax.Array) -> jax.Array:
    """Initial values, f32 `[R, D]`: normal with `init_std`, truncated at two standard deviations.

    A value depends on the key, the table's name and its place alone, so that under `jit` with sharded
    outputs each device makes its own shard and nothing else.
    """
    key = jax.random.fold_in(key, zlib.crc32(spec.name.encode()))
    unit_RD = jax.random.truncated_normal(key, -2.0, 2.0, (spec.rows, spec.emb_dim), jnp.float32)
    return unit_RD * spec.init_std
