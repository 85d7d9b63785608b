"""Eight simulated CPU devices for all tests; must run before JAX starts."""

import os
import tempfile

import hypothesis

os.environ["JAX_PLATFORMS"] = "cpu"
# Tests compile much and compute little: without LLVM's optimizations, XLA's being the same, they take
# half the time. The last of two equal flags counts: XLA_FLAGS=--xla_backend_optimization_level=3 tests
# what users run.
os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 "
    + os.environ.get("XLA_FLAGS", "")
)
# Tests build the same step again and again: compile it once a session, for all workers and in child
# processes too.
_CACHE = tempfile.TemporaryDirectory(prefix="s2s_jax_tests_")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", _CACHE.name)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"

# How long one example takes says nothing on a machine that is busy with other tests.
hypothesis.settings.register_profile("s2s_jax", deadline=None)
hypothesis.settings.load_profile("s2s_jax")
