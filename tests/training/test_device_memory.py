"""The peak of the memory of devices in the metrics."""

from types import SimpleNamespace
from typing import Any

import jax
import numpy as np

from s2s_jax.cluster.mesh import make_mesh, peak_memory
from s2s_jax.training.meters import Meters


def a_line(memory) -> dict[str, float]:
    meters = Meters(memory=memory)
    names = ("loss", "hit_rate", "grad_norm", "examples", "tokens")
    meters.add(dict.fromkeys(names, 1.0), input_wait=0.0)
    return meters.take_line(1)


def test_lines_have_the_peak_if_devices_report_it():
    assert a_line(lambda: 2_500_000)["device_memory_mb"] == 2.5
    assert "device_memory_mb" not in a_line(lambda: None)


def test_the_peak_is_that_of_the_fullest_device():
    def device(used) -> Any:
        stats = None if used is None else {"peak_bytes_in_use": used, "bytes_in_use": 1}
        return SimpleNamespace(memory_stats=lambda: stats)

    def mesh(*used) -> Any:
        return SimpleNamespace(local_devices=np.array([device(one) for one in used]))

    assert peak_memory(mesh(3, 7, 5)) == 7
    assert peak_memory(mesh(None, None)) is None
    # The CPUs of this machine do not report it.
    assert peak_memory(make_mesh(jax.devices()[:2])) is None
