"""The mesh of devices, and where each array of a run lives on it."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from s2s_jax.embedding.tables import NUM_SEGMENTS
from s2s_jax.errors import UserError

# The one axis: batches are split along it, and tables by rows.
DATA_AXIS = "data"


def make_mesh(devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of `devices`, by default all.

    Raises:
      UserError: their number does not divide the segments of a table.
    """
    devices = jax.devices() if devices is None else devices
    if NUM_SEGMENTS % len(devices):
        raise UserError(
            f"{len(devices)} devices: expected a power of two up to {NUM_SEGMENTS}, so that every "
            f"device owns as many table segments; start with fewer or more devices"
        )
    return Mesh(np.asarray(devices), (DATA_AXIS,), axis_types=(AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds all: the dense part."""
    return NamedSharding(mesh, PartitionSpec())


def row_sharded(mesh: Mesh) -> NamedSharding:
    """Each device holds a contiguous share of the rows: tables and their moments."""
    return NamedSharding(mesh, PartitionSpec(DATA_AXIS))


def batch_sharded(mesh: Mesh) -> NamedSharding:
    """Each device holds its rows of each accumulated microbatch: axes (microbatch, row, …)."""
    return NamedSharding(mesh, PartitionSpec(None, DATA_AXIS))
