"""The mesh of devices, and where each array of a run lives on it."""

import os
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from s2s_jax.embedding.tables import NUM_SEGMENTS
from s2s_jax.errors import UserError

# The one axis: batches are split along it, and tables by rows.
DATA_AXIS = "data"

# Where fsdp cuts an array of the dense part, by its path in the tree; the first pattern that is found
# wins. Layers are stacked along a first axis that the scan over them walks along, so they are cut along
# the second: each step of the scan then gathers the weights of one layer.
_FSDP_RULES = (
    (r"/layers/", PartitionSpec(None, DATA_AXIS)),
    (r"/kernel$", PartitionSpec(DATA_AXIS)),
    (r"", PartitionSpec()),
)


def make_mesh(devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of `devices`, by default all.

    Raises:
      UserError: there are none of the platform that is asked for, or their number does not divide the
        segments of a table.
    """
    devices = all_devices() if devices is None else devices
    if NUM_SEGMENTS % len(devices):
        raise UserError(
            f"{len(devices)} devices: expected a power of two up to {NUM_SEGMENTS}, so that every "
            f"device owns as many table segments; start with fewer or more devices"
        )
    if len(devices) > 1 and devices[0].platform == "cpu":
        _compile_anew()
    return Mesh(np.asarray(devices), (DATA_AXIS,), axis_types=(AxisType.Auto,))


def _compile_anew() -> None:
    """Keeps JAX from loading what was compiled before, if JAX_COMPILATION_CACHE_DIR asks for it.

    Programs for several CPU devices that XLA loads from there have lost the order of their collectives
    (seen with jaxlib 0.10.2). Exchanges that do not depend on each other then run at the same time and
    take each other's data: gradients come out wrong, or the process aborts.
    """
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()


def all_devices() -> Sequence[Any]:
    """The devices of all processes.

    Raises:
      UserError: there are none of the platform that is asked for.
    """
    try:
        return jax.devices()
    # JAX asserts where its plugin for GPUs is not installed.
    except (RuntimeError, AssertionError) as error:
        asked = os.environ.get("JAX_PLATFORMS")
        reason = (str(error).splitlines() or ["JAX has no plugin for it"])[0]
        reason = reason.split(" (set JAX_PLATFORMS")[0].rstrip(".")
        if asked:
            reason = f"JAX_PLATFORMS={asked}: expected a platform that this machine has ({reason})"
        raise UserError(
            f"{reason}; set JAX_PLATFORMS=cpu to use the CPU, or install jax and a driver for this "
            f"machine's devices"
        ) from error


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds all: the dense part."""
    return NamedSharding(mesh, PartitionSpec())


def fsdp_sharded(path: str, shape: Sequence[int], mesh: Mesh) -> NamedSharding:
    """How fsdp shards an array of the dense part; on every device where that does not divide it.

    Args:
      path: names on the way to it, such as "dense/transformer/layers/ffn/up/kernel".
      shape: its shape.
      mesh: the devices.
    """
    spec = next(spec for pattern, spec in _FSDP_RULES if re.search(pattern, path))
    divides = all(
        axis is None or size % mesh.shape[axis] == 0
        for axis, size in zip(spec, shape, strict=False)
    )
    return NamedSharding(mesh, spec if divides else PartitionSpec())


def row_sharded(mesh: Mesh) -> NamedSharding:
    """Each device holds a contiguous share of the rows: tables and their moments."""
    return NamedSharding(mesh, PartitionSpec(DATA_AXIS))


def batch_sharded(mesh: Mesh) -> NamedSharding:
    """Each device holds its rows of each accumulated microbatch: axes (microbatch, row, …)."""
    return NamedSharding(mesh, PartitionSpec(None, DATA_AXIS))
