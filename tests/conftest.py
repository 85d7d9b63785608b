"""Eight simulated CPU devices for all tests; must run before JAX starts."""

import importlib.metadata
import os
import signal
import tempfile

import hypothesis
import pytest

os.environ["JAX_PLATFORMS"] = "cpu"
# Implicit changes of the rank of an array are errors, because they are usually mistakes.
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
# Tests compile a lot and compute little: without LLVM's optimizations and XLA's fusion emitters,
# compiling takes a quarter of the time. The last of two equal flags counts, so this tests the programs
# that users run: XLA_FLAGS="--xla_backend_optimization_level=3 --xla_cpu_use_fusion_emitters=true"
_FLAGS = [
    "--xla_force_host_platform_device_count=8",
    "--xla_backend_optimization_level=0",
    "--xla_cpu_parallel_codegen_split_count=1",
]
if importlib.metadata.version("jaxlib").startswith(
    "0.10."
):  # Later versions have no other emitters.
    _FLAGS.append("--xla_cpu_use_fusion_emitters=false")
os.environ["XLA_FLAGS"] = " ".join([*_FLAGS, os.environ.get("XLA_FLAGS", "")])
# Many tests build the same step: it is compiled once per session, for all workers and child processes.
# Only for one device: XLA:CPU must not load cached programs for several (see `cluster.mesh`).
_CACHE = tempfile.TemporaryDirectory(prefix="s2s_jax_tests_")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", _CACHE.name)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"

# The time of one example means nothing on a machine that is busy with other tests.
hypothesis.settings.register_profile("s2s_jax", deadline=None)
hypothesis.settings.load_profile("s2s_jax")


@pytest.fixture(autouse=True)
def _cache_for_one_device():
    """Meshes of several devices turn the compilation cache off for the rest of the process."""
    yield
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    if not jax.config.jax_enable_compilation_cache:
        jax.config.update("jax_enable_compilation_cache", True)
        compilation_cache.reset_cache()


@pytest.fixture(autouse=True)
def _handlers_stay():
    """Commands that are tested in this process handle signals, which would end other tests."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        if signal.getsignal(number) is not handler:
            signal.signal(number, handler)


@pytest.fixture(autouse=True)
def _no_dry_runs(monkeypatch):
    """Trying the export at the start of every run would take a minute in all."""
    monkeypatch.setattr("s2s_jax.jobs.train.problem_of_export", lambda settings, dense: None)


def _load_for_one_device_only() -> None:
    """A test may compile for several devices after another test turned the cache on again."""
    from jax._src import compiler

    read = compiler._cache_read

    def read_for_one(name, key, options, backend, devices, *more):
        return (
            (None, None) if len(devices) > 1 else read(name, key, options, backend, devices, *more)
        )

    compiler._cache_read = read_for_one


_load_for_one_device_only()
