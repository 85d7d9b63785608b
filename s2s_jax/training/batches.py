"""Batches on the devices: how they get there, and how packed ids become padded ones.

Shapes: A microbatches, B rows of one, L positions, C columns of ids, K ids of a bag, S segments of rows
that lie on one device, M positions that a segment has room for.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from s2s_jax.config import Config
from s2s_jax.data.blocks import NO_ID
from s2s_jax.data.features import id_columns
from s2s_jax.training.mesh import batch_sharded

Batch = Mapping[str, jax.Array]


def put_batch(
    arrays: Mapping[str, np.ndarray], microbatches: int, mesh: Mesh
) -> dict[str, jax.Array]:
    """Splits a global batch `[A * B, …]` into microbatches `[A, B, …]` and lays it on the mesh."""
    assert all(array.dtype == np.int32 for array in arrays.values()), "device arrays are int32"
    return {
        name: jax.device_put(array.reshape(microbatches, -1, *array.shape[1:]), batch_sharded(mesh))
        for name, array in arrays.items()
    }


def unpack(config: Config, batch: Batch) -> dict[str, jax.Array]:
    """Pads what is packed, and takes features apart.

    Args:
      config: names the features and gives L.
      batch: int32 `length` `[…, B]` and either `ids` `[…, B, L, C]` or `values` `[…, S, M, C]`, see
        `data.blocks`.

    Returns:
      int32 `length` `[…, B]` and for each feature `ids/<name>` `[…, B, L, K]`, `NO_ID` where there is
      none.
    """
    ids = batch["ids"] if "ids" in batch else _pad(batch["values"], batch["length"], config)
    columns = id_columns(config.features)
    features = {f"ids/{name}": ids[..., places] for name, places in columns.items()}
    return {"length": batch["length"], **features}


def _pad(values: jax.Array, length: jax.Array, config: Config) -> jax.Array:
    *outer, segments, room, columns = values.shape
    seq_len = config.model.seq_len
    length = length.reshape(*outer, segments, -1)
    begins = jnp.cumsum(length, axis=-1) - length
    position = jnp.arange(seq_len)
    real = position < length[..., None]
    index = jnp.minimum(begins[..., None] + position, room - 1)
    flat = index.reshape(*outer, segments, -1, 1)
    ids = jnp.take_along_axis(values, flat, axis=-2).reshape(*index.shape, columns)
    padded = jnp.where(real[..., None], ids, NO_ID)
    return padded.reshape(*outer, -1, seq_len, columns)
