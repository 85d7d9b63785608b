"""Puts batches on the devices, and unpacks them there.

Shapes: A microbatches, B rows of a microbatch, L positions, C columns of ids, K ids of a bag, G groups
of rows (the rows of a group are on one device), M positions that fit into a group.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from s2s_jax.cluster.mesh import batch_sharded
from s2s_jax.model.positions import sequence_positions
from s2s_jax.training.step.settings import StepSettings
from s2s_serve.encoding.blocks import NO_ID, SKIPPED
from s2s_serve.encoding.features import id_columns, id_width

Batch = Mapping[str, jax.Array]

# The array that packing adds: for each position, the number of its sequence in the row.
SEQUENCE = "sequence"
# The array of `unpack` with the times of events, in seconds.
TIME = "time"
# Arrays added by `training.item_source` or, with `loss.log_q` stream, by `item_stream`.
ITEM_SHARE, NEGATIVES_SHARE, UNIFORM_SHARE = "item_share", "negatives_share", "uniform_share"
_OF_NEGATIVES = ("ids/negatives:", NEGATIVES_SHARE, UNIFORM_SHARE)
# Shares of events are sent as integers, in multiples of 1 / SHARE_UNIT.
SHARE_UNIT = 2**30


def put_batch(
    arrays: Mapping[str, np.ndarray], microbatches: int, mesh: Mesh
) -> dict[str, jax.Array]:
    """Put this process's rows of a global batch on its devices, as microbatches.

    Each device takes consecutive rows, and so does each microbatch on a device. So a process needs
    consecutive rows of the global batch.

    Args:
      arrays: int32 `[A * B, …]`, where B is the number of rows on this process's devices.
      microbatches: A.
      mesh: the devices of all processes.

    Returns:
      int32 `[A, B, …]`, where B counts the rows on all devices, and `stop` of `put_stop`.
    """
    assert all(array.dtype == np.int32 for array in arrays.values()), "device arrays are int32"
    devices = len(mesh.local_devices)

    def by_microbatch(array: np.ndarray) -> np.ndarray:
        by_device = array.reshape(devices, microbatches, -1, *array.shape[1:])
        return by_device.swapaxes(0, 1).reshape(microbatches, -1, *array.shape[1:])

    put = {name: _put(by_microbatch(array), mesh) for name, array in arrays.items()}
    return put | put_stop(False, mesh)


def put_stop(stop: bool, mesh: Mesh) -> dict[str, jax.Array]:
    """Return the flag that requests a stop; the metrics of the step show it to all processes.

    Args:
      stop: whether this process requests a stop.
      mesh: the devices of all processes.

    Returns:
      int32 `stop` `[1, devices]`.
    """
    return {"stop": _put(np.full((1, len(mesh.local_devices)), stop, np.int32), mesh)}


def ids_of(batch: Batch) -> dict[str, jax.Array]:
    """Return the ids of each feature in a batch from `unpack`."""
    return {key.removeprefix("ids/"): x for key, x in batch.items() if key.startswith("ids/")}


def _put(array: np.ndarray, mesh: Mesh) -> jax.Array:
    sharding = batch_sharded(mesh)
    if jax.process_count() == 1:
        return jax.device_put(array, sharding)
    # This transfer is intended, although JAX counts it as implicit.
    with jax.transfer_guard("allow"):
        return jax.make_array_from_process_local_data(sharding, array)


def unpack(settings: StepSettings, batch: Batch) -> dict[str, jax.Array]:
    """Pad the rows of flat batches, and split ids by feature.

    Args:
      settings: the settings of the step.
      batch: int32 `length` `[…, B]` and either `ids` `[…, B, L, C]` or `values` `[…, G, M, C]`, see
        `data.encoding.blocks` and `data.batching.packing`.

    Returns:
      int32 `length` `[…, B]`, with packing `sequence` `[…, B, L]`, and for each feature `ids/<name>`
      `[…, B, L, K]`, or `[…, B, L, K, 2]` if its table grows; `NO_ID` for missing ids. The ids of
      sampled negatives do not change. With `model.time_bias`, also `TIME` `[…, B, L]`. With
      `loss.log_q` catalogue, also f32 `ITEM_SHARE` `[…, B, L]` of all events, and `NEGATIVES_SHARE` as
      f32.
    """
    length, ids = jnp.maximum(batch["length"], 0), padded_ids(batch, settings.model.seq_len)
    columns = id_columns(settings.items.features)
    features = {}
    for feature in settings.items.features:
        of_feature = ids[..., columns[feature.name]]
        if feature.grows:
            of_feature = of_feature.reshape(*of_feature.shape[:-1], -1, feature.id_words)
        features[f"ids/{feature.name}"] = of_feature
    if settings.model.time_bias is not None:
        features[TIME] = ids[..., id_width(settings.items.features)]
    negatives = {name: x for name, x in batch.items() if name.startswith(_OF_NEGATIVES)}
    if settings.loss.catalogue_shares:
        # Padding, including the padding made here, counts as an item that occurred once.
        features[ITEM_SHARE] = jnp.maximum(ids[..., -1], 1) / SHARE_UNIT
    if NEGATIVES_SHARE in negatives:
        negatives[NEGATIVES_SHARE] = negatives[NEGATIVES_SHARE] / SHARE_UNIT
    sequences = {SEQUENCE: batch[SEQUENCE]} if SEQUENCE in batch else {}
    return {"length": length, **sequences, **features, **negatives}


def count_rows(batch: Batch) -> dict[str, jax.Array]:
    """Count the rows and positions of a batch, before `unpack`.

    Returns:
      int32 scalars: `examples` (rows of the log that have events), `skipped_rows` (rows that could not
      be read), `tokens` (positions with an event) and, with packing, `cut_positions` (positions that did
      not fit) and, as f32, `attended` (pairs of a position and a position that it sees).
    """
    length = batch["length"]
    counts = {"tokens": jnp.maximum(length, 0).sum()}
    if SEQUENCE not in batch:
        counts |= {"examples": (length > 0).sum(), "skipped_rows": (length == SKIPPED).sum()}
        return counts
    return counts | {
        "examples": batch["examples"].sum(),
        "skipped_rows": batch["skipped"].sum(),
        "cut_positions": batch["cut"].sum(),
        "attended": _attended(length, batch[SEQUENCE]),
    }


def _attended(length: jax.Array, sequence: jax.Array) -> jax.Array:
    seq_len = sequence.shape[-1]
    seen = sequence_positions(sequence.reshape(-1, seq_len)) + 1
    real = jnp.arange(seq_len)[None] < length.reshape(-1, 1)
    return jnp.where(real, seen, 0).sum(dtype=jnp.float32)


def padded_ids(batch: Batch, seq_len: int) -> jax.Array:
    """Return int32 `[…, B, L, C]`: the ids of all features; `NO_ID` where there is no id.

    Args:
      batch: see `unpack`.
      seq_len: L.
    """
    if "ids" in batch:
        return batch["ids"]
    values, length = batch["values"], jnp.maximum(batch["length"], 0)
    *outer, groups, room, columns = values.shape
    length = length.reshape(*outer, groups, -1)
    begins = jnp.cumsum(length, axis=-1) - length
    position = jnp.expand_dims(jnp.arange(seq_len), range(length.ndim))
    real = position < length[..., None]
    index = jnp.minimum(begins[..., None] + position, room - 1)
    flat = index.reshape(*outer, groups, -1, 1)
    ids = jnp.take_along_axis(values, flat, axis=-2).reshape(*index.shape, columns)
    padded = jnp.where(real[..., None], ids, NO_ID)
    return padded.reshape(*outer, -1, seq_len, columns)
