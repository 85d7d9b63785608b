"""The settings of the allocator, if the C library refuses some of them."""

import ctypes
from types import SimpleNamespace

import pyarrow as pa
import pytest

from s2s_jax.data.batching import memory


@pytest.mark.parametrize(("largest", "accepted"), [(2**30, [2**30]), (2**25, [2**25]), (0, [])])
def test_the_largest_threshold_that_is_accepted(largest, accepted, monkeypatch):
    settings, pools = [], []

    def mallopt(parameter: int, value: int) -> int:
        ok = parameter != memory._M_MMAP_THRESHOLD or value <= largest
        if ok:
            settings.append((parameter, value))
        return int(ok)

    monkeypatch.setattr(memory.sys, "platform", "linux")
    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace(mallopt=mallopt))
    monkeypatch.setattr(pa, "set_memory_pool", pools.append)
    memory.keep_freed_memory.__wrapped__()
    assert [
        value for parameter, value in settings if parameter == memory._M_MMAP_THRESHOLD
    ] == accepted
    # If it is refused, Arrow's own allocator is better.
    assert len(pools) == len(accepted)
