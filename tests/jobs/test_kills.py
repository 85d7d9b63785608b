"""Runs that are killed again and again give the same results as an uninterrupted run."""

import dataclasses
import json
import os
import pickle
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import small
from jobs_of import job, one_device, saved_state
from places import HELPERS, REPO

from s2s_jax.config import (
    Config,
    LastEvents,
)
from s2s_jax.errors import EXIT_DONE, EXIT_STOPPED
from s2s_jax.jobs.train import train

STEPS, TIMES = 200, 20
# Steps wait a little, so that most kills hit a step and not the start of the process.
RUNNER = """
from s2s_jax import signals
signals.handle_while_starting()
import pickle, sys, time
import jax
from s2s_jax.cli.exit import run_command
from s2s_jax.cli.commands.train import run
from s2s_jax.jobs.train import Reader
from s2s_jax.cluster.mesh import make_mesh
config = pickle.load(open(sys.argv[1], "rb"))
next_ = Reader.__next__
Reader.__next__ = lambda self: (time.sleep(0.02), next_(self))[1]
run_command(lambda _: run(config, make_mesh(jax.devices()[:1])))
"""


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    directory = tmp_path_factory.mktemp("log")
    small.write_log(directory, 90)
    return directory


def make_job(log: Path, run_dir: Path) -> Config:
    """Uses everything that must be reproduced: growing tables, held-out events, sampled negatives."""
    config = job(log, run_dir, train_steps=STEPS, log_steps=1, save_steps=7)
    return dataclasses.replace(
        small.growing(config),
        loss=dataclasses.replace(config.loss, negatives="mixed", num_negatives=8),
        eval=dataclasses.replace(
            config.eval, split=LastEvents(events=1), every_steps=20, batch_size=64
        ),
    )


@pytest.fixture(scope="module")
def straight(log, tmp_path_factory):
    config = make_job(log, tmp_path_factory.mktemp("straight") / "run")
    assert not train(config, one_device())
    return config


def start(config: Config, scratch: Path) -> subprocess.Popen:
    path = scratch / "config.pickle"
    path.write_bytes(pickle.dumps(config))
    return subprocess.Popen(
        [sys.executable, "-c", RUNNER, str(path)],
        env=os.environ | {"PYTHONPATH": f"{HELPERS}:{REPO}"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def lines_of(config: Config) -> list[str]:
    path = Path(config.train.output_dir) / "metrics.jsonl"
    return path.read_text().splitlines() if path.exists() else []


def file_of(config: Config) -> int | None:
    """Identifies the file metrics.jsonl, which each start replaces."""
    path = Path(config.train.output_dir) / "metrics.jsonl"
    return path.stat().st_ino if path.exists() else None


def last_step(config: Config) -> int:
    found = [int(step) for step in re.findall(r'"step": (\d+),', "".join(lines_of(config)))]
    return max(found, default=0)


def newest(config: Config) -> int:
    names = (path.name for path in (Path(config.train.output_dir) / "checkpoints").glob("*"))
    return max((int(name) for name in names if name.isdecimal()), default=0)


def written(config: Config) -> list[dict[str, float]]:
    """Lines of metrics.jsonl without speeds: each step once, each evaluation once."""
    lines = [json.loads(text) for text in lines_of(config)]
    return [{k: v for k, v in line.items() if not k.endswith(("_ms", "_sec"))} for line in lines]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_killed_at_random_moments(straight, log, tmp_path, number):
    config = make_job(log, tmp_path / "run")
    chance = random.Random(int(number))
    for _ in range(TIMES):
        before = file_of(config)
        target = newest(config) + chance.randrange(1, 20)
        process = start(config, tmp_path)
        if chance.random() < 0.2:
            # Anywhere between its first import and its first step.
            time.sleep(chance.uniform(0.5, 5))
        else:
            deadline = time.monotonic() + 120
            while process.poll() is None and (
                file_of(config) in (None, before) or last_step(config) < target
            ):
                assert time.monotonic() < deadline
                time.sleep(0.005)
            time.sleep(chance.random() * 0.05)
        process.send_signal(number)
        output = process.communicate(timeout=120)[1]
        if process.returncode == EXIT_DONE:
            break
        expected = EXIT_STOPPED if number == signal.SIGTERM else -signal.SIGKILL
        assert process.returncode == expected, output
        assert "Traceback" not in output, output
    process = start(config, tmp_path)
    output = process.communicate(timeout=300)[1]
    assert process.returncode == EXIT_DONE, output
    assert written(config) == written(straight)
    (state, progress), (state_2, progress_2) = (saved_state(c, STEPS) for c in (config, straight))
    jax.tree.map(np.testing.assert_array_equal, state, state_2)
    assert progress == progress_2
