"""The mesh of devices, and the sharding of a run's arrays."""

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

# The only axis: batches and the rows of tables are split along it.
DATA_AXIS = "data"

# The dimension along which fsdp shards an array of the dense part, by its path in the tree; the first
# matching pattern wins. Layers are stacked along a first axis, over which they are scanned, so they are
# sharded along the second: each step of the scan then gathers the weights of one layer.
_FSDP_RULES = (
    (r"/layers/", PartitionSpec(None, DATA_AXIS)),
    (r"/kernel$", PartitionSpec(DATA_AXIS)),
    (r"", PartitionSpec()),
)


def make_mesh(devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of `devices`, by default all devices.

    Raises:
      UserError: the requested platform has no devices, or their number does not divide the number of
        segments of a table.
    """
    devices = all_devices() if devices is None else devices
    if NUM_SEGMENTS % len(devices):
        raise UserError(
            f"{len(devices)} devices: expected a power of two up to {NUM_SEGMENTS}, so that every "
            f"device owns equally many table segments; start with fewer or more devices"
        )
    if len(devices) > 1 and devices[0].platform == "cpu":
        _disable_compilation_cache()
    return Mesh(np.asarray(devices), (DATA_AXIS,), axis_types=(AxisType.Auto,))


def _disable_compilation_cache() -> None:
    """Turns off the compilation cache (JAX_COMPILATION_CACHE_DIR).

    Programs for several CPU devices that XLA loads from the cache lose the order of their collectives
    (seen with jaxlib 0.10.2). Independent exchanges then run at the same time and receive each other's
    data: gradients are wrong, or the process aborts.
    """
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()


def all_devices() -> Sequence[Any]:
    """The devices of all processes.

    Raises:
      UserError: the requested platform has no devices.
    """
    try:
        return jax.devices()
    # JAX raises AssertionError if its GPU plugin is not installed.
    except (RuntimeError, AssertionError) as error:
        platforms = os.environ.get("JAX_PLATFORMS")
        reason = (str(error).splitlines() or ["JAX has no plugin for it"])[0]
        reason = reason.split(" (set JAX_PLATFORMS")[0].rstrip(".")
        if platforms:
            reason = (
                f"JAX_PLATFORMS={platforms}: expected a platform that this machine has ({reason})"
            )
        raise UserError(
            f"{reason}; set JAX_PLATFORMS=cpu to use the CPU, or install jax and a driver for this "
            f"machine's devices"
        ) from error


def peak_memory(mesh: Mesh) -> int | None:
    """The most memory that a device of this process has used so far, in bytes; None on CPUs."""
    found = [device.memory_stats() for device in mesh.local_devices]
    used = [stats["peak_bytes_in_use"] for stats in found if stats and "peak_bytes_in_use" in stats]
    return max(used, default=None)


def replicated(mesh: Mesh) -> NamedSharding:
    """A sharding that gives every device the whole array, as for the dense part."""
    return NamedSharding(mesh, PartitionSpec())


def fsdp_sharded(path: str, shape: Sequence[int], mesh: Mesh) -> NamedSharding:
    """The sharding of an array of the dense part with fsdp; replicated if its size is not divisible.

    Args:
      path: the path of the array in the tree, such as "dense/transformer/layers/ffn/up/kernel".
      shape: the shape of the array.
      mesh: the devices.
    """
    spec = next(spec for pattern, spec in _FSDP_RULES if re.search(pattern, path))
    divides = all(
        axis is None or size % mesh.shape[axis] == 0
        for axis, size in zip(spec, shape, strict=False)
    )
    return NamedSharding(mesh, spec if divides else PartitionSpec())


def row_sharded(mesh: Mesh) -> NamedSharding:
    """A sharding that gives each device consecutive rows, as for tables and their moments."""
    return NamedSharding(mesh, PartitionSpec(DATA_AXIS))


def batch_sharded(mesh: Mesh) -> NamedSharding:
    """A sharding that gives each device its rows of each microbatch: axes (microbatch, row, …)."""
    return NamedSharding(mesh, PartitionSpec(None, DATA_AXIS))
