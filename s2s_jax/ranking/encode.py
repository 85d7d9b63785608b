"""Computes the vectors of users and of items with a trained state.

Shapes: U users, I items, B items that are encoded together, K ids of a bag, E width.
"""

from collections.abc import Iterator

import jax
import numpy as np
from jax.sharding import Mesh

from s2s_jax.cluster.mesh import batch_sharded
from s2s_jax.config.settings import Items
from s2s_jax.data.batching.histories import Histories
from s2s_jax.data.items.catalogue import Catalogue
from s2s_jax.training.step.functions import StepFunctions
from s2s_jax.training.step.inference import Users
from s2s_jax.training.step.state import TrainState
from s2s_serve.encoding.feature import NO_ID

# Number of items that one device encodes at a time.
_DEVICE_ITEMS = 4096


def user_vectors(
    functions: StepFunctions, state: TrainState, batch: Histories, mesh: Mesh
) -> Users:
    """Return a vector for each user, to compare with items, and the number of unknown events."""
    arrays = {name: _spread(x, mesh) for name, x in batch.arrays.items()}
    return functions.user_vectors(state, arrays)


def item_vectors(
    functions: StepFunctions, state: TrainState, catalogue: Catalogue, items: Items, mesh: Mesh
) -> np.ndarray:
    """Return f32 `[I, E]`: a vector for each item of the catalogue, to compare with users."""
    vectors_IE = None
    begin, total = 0, len(catalogue.item)
    for ids in item_ids(catalogue, items, mesh):
        part_BE = np.asarray(functions.item_vectors(state, ids))
        if vectors_IE is None:
            # Filled part by part, so that memory holds only one copy of the vectors.
            vectors_IE = np.empty((total, part_BE.shape[1]), np.float32)
        vectors_IE[begin : begin + len(part_BE)] = part_BE[: total - begin]
        begin += len(part_BE)
    assert vectors_IE is not None, "a catalogue has items"
    return vectors_IE


def item_ids(catalogue: Catalogue, items: Items, mesh: Mesh) -> Iterator[dict[str, jax.Array]]:
    """Yields the ids of B items at a time, by feature: `[1, B, 1, K]`, or `[1, B, 1, K, 2]`.

    Features that items do not show have no ids.
    """
    chunk = _DEVICE_ITEMS * mesh.size
    for begin in range(0, len(catalogue.item), chunk):
        ids = {}
        for feature in items.features:
            shape = (chunk, 1, feature.bag_size, *([2] if feature.grows else []))
            padded = np.full(shape, NO_ID, np.int32)
            if feature.name in items.shown:
                part = catalogue.ids[feature.name][begin : begin + chunk]
                padded[: len(part), 0] = part
            ids[feature.name] = _spread(padded, mesh)
        yield ids


def _spread(x: np.ndarray, mesh: Mesh) -> jax.Array:
    """Return one microbatch `[1, …]` sharded over the devices; every host must have all of `x`."""
    return jax.make_array_from_callback(
        (1, *x.shape), batch_sharded(mesh), lambda index: x[None][index]
    )
