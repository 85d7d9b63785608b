"""Computes the vectors of users and of items with a trained state.

Shapes: N users of several batches, U users of a batch, I items, B users or items that are encoded
together, K ids of a bag, E width.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from s2s_jax.cluster.mesh import batch_sharded, row_sharded
from s2s_jax.config.settings import Items
from s2s_jax.data.batching import encoding_shapes
from s2s_jax.data.batching.encoding_shapes import Shapes
from s2s_jax.data.batching.histories import Histories
from s2s_jax.data.items.catalogue import Catalogue
from s2s_jax.training.step.functions import StepFunctions
from s2s_jax.training.step.state import TrainState
from s2s_serve.encoding import blocks
from s2s_serve.encoding.feature import NO_ID

# Number of items that one device encodes at a time.
_DEVICE_ITEMS = 4096
# Number of positions that one device encodes at a time. More leave the caches of a CPU, and fewer do not
# keep a GPU busy.
_CPU_POSITIONS, _GPU_POSITIONS = 2**11, 2**15


class Encoded(NamedTuple):
    """The users of a batch, encoded.

    Attributes:
      users_UE: f32, a vector for each user, to compare with items; zeros for padding and for users who
        were not wanted.
      unknown_U: int32, number of events shown to the model whose item has no row in its table.
    """

    users_UE: np.ndarray
    unknown_U: np.ndarray


class UserEncoder:
    """Encodes users with a trained state, those with histories of about the same length together."""

    def __init__(self, functions: StepFunctions, state: TrainState, shapes: Shapes, mesh: Mesh):
        """Prepares encoding.

        Args:
          functions: the functions of the model.
          state: the state on the devices.
          shapes: the shapes in which histories are encoded, see `shapes_for`.
          mesh: the devices.
        """
        self._functions, self._state, self._mesh = functions, state, mesh
        self.shapes = shapes

    def encode(self, batches: Sequence[Histories], least_events: int = 1) -> list[Encoded]:
        """Return the vectors of the users of some batches.

        Args:
          batches: batches that are encoded together, such as those of `encoding_shapes.stretches`.
          least_events: users with shorter histories are not wanted.
        """
        newest = blocks.concatenate([batch.newest for batch in batches])
        wanted_N = np.concatenate(
            [batch.events_U[: batch.users] >= max(least_events, 1) for batch in batches]
        )
        running = []
        for same in encoding_shapes.by_length(newest, wanted_N, self.shapes):
            ids_MC, length_B = (_rows(x, self._mesh) for x in (same.ids_MC, same.length_B))
            users = self._functions.user_vectors(self._state, ids_MC, length_B, same.seq_len)
            # Not awaited here, so that the next histories are padded while these are encoded.
            running.append((same.chosen, users))
        begins = blocks.starts(np.array([len(batch.events_U) for batch in batches]))
        place_N = np.concatenate(
            [begin + np.arange(batch.users) for begin, batch in zip(begins, batches, strict=False)]
        )
        width = running[0][1].vectors_BE.shape[1] if running else 0
        users_UE = np.zeros((begins[-1], width), np.float32)
        unknown_U = np.zeros(begins[-1], np.int32)
        for chosen, (vectors_BE, unknown_B) in running:
            users_UE[place_N[chosen]] = np.asarray(vectors_BE)[: len(chosen)]
            unknown_U[place_N[chosen]] = np.asarray(unknown_B)[: len(chosen)]
        ends = itertools.pairwise(begins)
        return [Encoded(users_UE[begin:end], unknown_U[begin:end]) for begin, end in ends]


def shapes_for(seq_len: int, batch_users: int, mesh: Mesh) -> Shapes:
    """Return the shapes in which histories are encoded.

    Args:
      seq_len: `model.seq_len`.
      batch_users: `eval.batch_size`; no device encodes more positions than those of so many histories of
        `seq_len` events.
      mesh: the devices.
    """
    most = _CPU_POSITIONS if mesh.devices.flat[0].platform == "cpu" else _GPU_POSITIONS
    lengths = encoding_shapes.lengths(seq_len)
    return Shapes(lengths, max(min(most, batch_users * seq_len), seq_len), mesh.size)


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
            ids[feature.name] = _microbatch(padded, mesh)
        yield ids


def _microbatch(x: np.ndarray, mesh: Mesh) -> jax.Array:
    """Return one microbatch `[1, …]` sharded over the devices; every host must have all of `x`."""
    return jax.make_array_from_callback(
        (1, *x.shape), batch_sharded(mesh), lambda index: x[None][index]
    )


def _rows(x: np.ndarray, mesh: Mesh) -> jax.Array:
    """Return an array whose rows are sharded over the devices; every host must have all of `x`."""
    return jax.make_array_from_callback(x.shape, row_sharded(mesh), lambda index: x[index])
