"""Restrictions on JAX for meshes of several CPU devices."""

import jax
import jax.numpy as jnp
import pytest
from jax import monitoring

from s2s_jax.cluster.mesh import make_mesh, row_sharded


@pytest.mark.parametrize(("devices", "asks"), [(1, True), (2, False)])
def test_programs_for_several_cpu_devices_are_not_taken_from_the_cache(devices, asks):
    """Cached programs would run their collectives in any order (jaxlib 0.10.2)."""
    events = []
    monitoring.register_event_listener(lambda event, **_: events.append(event))
    mesh = make_mesh(jax.devices()[:devices])
    x = jax.device_put(jnp.arange(512.0), row_sharded(mesh))
    events.clear()
    jax.jit(lambda x: (x * devices).sum())(x).block_until_ready()
    assert ("/jax/compilation_cache/compile_requests_use_cache" in events) == asks
