"""The vectors of users and of items, as a state makes them.

Shapes: U users, I items, B items that are encoded together, K ids of a bag, E width.
"""

from collections.abc import Iterator

import jax
import numpy as np
from jax.sharding import Mesh

from s2s_jax.cluster.mesh import batch_sharded
from s2s_jax.config import Config
from s2s_jax.config.features import NO_ID
from s2s_jax.data.batching.histories import Histories
from s2s_jax.data.items.catalogue import Catalogue
from s2s_jax.training.step.functions import StepFunctions
from s2s_jax.training.step.inference import Users
from s2s_jax.training.step.state import TrainState

# Items that are encoded together by one device.
_ITEMS = 4096


def user_vectors(
    functions: StepFunctions, state: TrainState, batch: Histories, mesh: Mesh
) -> Users:
    """What each user will do next, as items are compared with it, and how many events are unknown."""
    arrays = {name: _spread(x, mesh) for name, x in batch.arrays.items()}
    return functions.user_vectors(state, arrays)


def item_vectors(
    functions: StepFunctions, state: TrainState, catalogue: Catalogue, config: Config, mesh: Mesh
) -> np.ndarray:
    """f32 `[I, E]`: the items of a catalogue as users are compared with them."""
    vectors_IE = None
    begin, items = 0, len(catalogue.item)
    for ids in item_ids(catalogue, config, mesh):
        part_BE = np.asarray(functions.item_vectors(state, ids))
        if vectors_IE is None:
            # Filled part by part, so that vectors are held once.
            vectors_IE = np.empty((items, part_BE.shape[1]), np.float32)
        vectors_IE[begin : begin + len(part_BE)] = part_BE[: items - begin]
        begin += len(part_BE)
    assert vectors_IE is not None, "a catalogue has items"
    return vectors_IE


def item_ids(catalogue: Catalogue, config: Config, mesh: Mesh) -> Iterator[dict[str, jax.Array]]:
    """What items show: `[1, B, 1, K]` (or `[1, B, 1, K, 2]`) of each feature, B items at a time."""
    chunk = _ITEMS * mesh.size
    for begin in range(0, len(catalogue.item), chunk):
        ids = {}
        for feature in config.features:
            shape = (chunk, 1, feature.bag_size, *([2] if feature.grows else []))
            padded = np.full(shape, NO_ID, np.int32)
            if feature.name in config.target_features:
                part = catalogue.ids[feature.name][begin : begin + chunk]
                padded[: len(part), 0] = part
            ids[feature.name] = _spread(padded, mesh)
        yield ids


def _spread(x: np.ndarray, mesh: Mesh) -> jax.Array:
    """One microbatch `[1, …]` over the devices; on several hosts all hosts hold all of it."""
    return jax.make_array_from_callback(
        (1, *x.shape), batch_sharded(mesh), lambda index: x[None][index]
    )
