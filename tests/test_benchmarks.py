"""Checks that benchmarks for GPUs run."""

import os
import re
import subprocess
import sys

import pytest
from places import REPO


@pytest.mark.slow
def test_a_step_falls_apart_into_shares():
    """With a tiny model; a growing table would take too long to compile."""
    sizes = {
        "io.batch_size": 2,
        "model.seq_len": 16,
        "model.num_layers": 1,
        "features.0.hash_bucket_size": 512,
        "features.3.hash_bucket_size": 512,
    }
    command = [sys.executable, "benchmarks/breakdown.py", "--config", "configs/quickstart.py"]
    command += ["--steps", "1", "--rounds", "1"]
    command += [text for key, value in sizes.items() for text in (f"--{key}", str(value))]
    # Compiles quickly instead of well.
    environment = {
        "PYTHONPATH": str(REPO),
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
    }
    done = subprocess.run(
        command,
        cwd=REPO,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = re.findall(r"^  (.{20}) +([\d.]+) ms +([\d.]+)%$", done.stdout, re.MULTILINE)
    shares = {name.strip(): float(share) for name, _, share in lines}
    parts = ["tables", "attention, blocked", "dense rest", "loss"]
    parts += ["optimizer, dense", "optimizer, tables"]
    assert list(shares) == [*parts, "sum of parts", "whole step"]
    assert shares["whole step"] == 100
    assert all(share > 0 for share in shares.values())
    # Each is rounded to a tenth.
    assert abs(sum(shares[name] for name in parts) - shares["sum of parts"]) < 0.5
    assert 0 < float(re.search(r"MFU ([\d.]+) of the ceiling", done.stdout).group(1)) < 1.5


def test_the_script_for_gpus_is_bash():
    subprocess.run(["bash", "-n", "benchmarks/gpu.sh"], cwd=REPO, check=True)
