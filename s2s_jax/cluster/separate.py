"""Processes of a job that share work but compute apart, each on its own devices."""

import os

import jax

from s2s_jax.cluster.place import Place, find_place


def take_place() -> Place | None:
    """Restricts this process to its own GPUs, if it is one of several of a job.

    Call it before JAX uses a device. It reads the same environment variables as `joining.join`, but does
    not connect the processes.

    Returns:
      The place of this process; None if it is the only one.

    Raises:
      UserError: the variables are incomplete or wrong.
    """
    place = find_place(os.environ)
    if place is None:
        return None
    own = os.environ.get("JAX_LOCAL_DEVICE_IDS")
    if own is None and place.devices is not None:
        own = ",".join(map(str, place.devices))
    if own is not None:
        # As `jax.distributed.initialize` does.
        jax.config.update("jax_cuda_visible_devices", own)
        jax.config.update("jax_rocm_visible_devices", own)
    return place
