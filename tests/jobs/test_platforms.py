"""Missing platforms and impossible numbers of devices: one sentence."""

import os
import subprocess
import sys

import jax
import pytest
from places import REPO

from s2s_jax.cluster.mesh import make_mesh
from s2s_jax.errors import EXIT_USER_ERROR, UserError


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (AssertionError(), "no plugin"),
        (
            RuntimeError("Unable to initialize backend 'cuda': no driver (set JAX_PLATFORMS='')"),
            "no driver",
        ),
    ],
)
@pytest.mark.parametrize("asked", ["cuda", ""])
def test_a_missing_platform(error, words, asked, monkeypatch):
    def fail():
        raise error

    monkeypatch.setattr(jax, "devices", fail)
    monkeypatch.setenv("JAX_PLATFORMS", asked)
    with pytest.raises(UserError, match=words) as caught:
        make_mesh()
    assert ("JAX_PLATFORMS=cuda: " in str(caught.value)) == bool(asked)
    assert "set JAX_PLATFORMS=cpu" in str(caught.value)
    assert "(set JAX" not in str(caught.value)


@pytest.mark.parametrize("count", [3, 6, 257, 512])
def test_numbers_of_devices_that_cannot_share_tables(count):
    with pytest.raises(UserError, match=f"^{count} devices: expected a power of two up to 256"):
        make_mesh(jax.devices()[:1] * count)


@pytest.mark.parametrize("platform", ["cuda", pytest.param("nonsense", marks=pytest.mark.slow)])
def test_training_on_a_missing_platform_creates_nothing(platform, tmp_path):
    config = REPO / "configs/quickstart.py"
    done = subprocess.run(
        [sys.executable, "-m", "s2s_jax.train", "--config", config],
        cwd=tmp_path,
        env=os.environ | {"JAX_PLATFORMS": platform, "PYTHONPATH": str(REPO)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    if platform == "cuda" and "data_paths" in done.stderr:
        pytest.skip("this machine has a GPU")
    assert done.returncode == EXIT_USER_ERROR, done.stderr
    assert done.stderr.startswith(f"error: JAX_PLATFORMS={platform}: "), done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []
