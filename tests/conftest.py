"""Eight simulated CPU devices for all tests; must run before JAX starts."""

import importlib.metadata
import os
import tempfile

import hypothesis

os.environ["JAX_PLATFORMS"] = "cpu"
# Tests compile much and compute little: without LLVM's optimizations and XLA's fusion emitters, compiles
# take a quarter of the time. The last of two equal flags counts, so this tests what users run:
# XLA_FLAGS="--xla_backend_optimization_level=3 --xla_cpu_use_fusion_emitters=true"
_FLAGS = [
    "--xla_force_host_platform_device_count=8",
    "--xla_backend_optimization_level=0",
    "--xla_cpu_parallel_codegen_split_count=1",
]
if importlib.metadata.version("jaxlib").startswith("0.10."):  # Later ones have no others.
    _FLAGS.append("--xla_cpu_use_fusion_emitters=false")
os.environ["XLA_FLAGS"] = " ".join([*_FLAGS, os.environ.get("XLA_FLAGS", "")])
# Tests build the same step again and again: compile it once a session, for all workers and in child
# processes too.
_CACHE = tempfile.TemporaryDirectory(prefix="s2s_jax_tests_")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", _CACHE.name)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"

# How long one example takes says nothing on a machine that is busy with other tests.
hypothesis.settings.register_profile("s2s_jax", deadline=None)
hypothesis.settings.load_profile("s2s_jax")
