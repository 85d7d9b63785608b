"""Small jobs, and the contents of their runs."""

import dataclasses
import json
import time
from pathlib import Path

import jax
import numpy as np
import small

from s2s_jax.cluster.mesh import make_mesh
from s2s_jax.config import Config
from s2s_jax.runs.checkpoints.store import Checkpoints
from s2s_jax.training.growth import GrowthPlan
from s2s_jax.training.step.functions import make_step_functions
from s2s_jax.training.step.settings import StepSettings
from s2s_serve.storage.address import Place


def job(log: Path, run_dir: Path, **train_changes) -> Config:
    config = small.config()
    settings = {
        "train_steps": 40,
        "log_steps": 5,
        "save_steps": 10,
        "output_dir": str(run_dir),
        "tensorboard": False,
    }
    return dataclasses.replace(
        config,
        io=dataclasses.replace(config.io, data_paths=str(log), batch_size=8, shuffle_rows=32),
        model=dataclasses.replace(config.model, dropout=0.2),
        train=dataclasses.replace(config.train, **settings | train_changes),
    )


def one_device():
    return make_mesh(jax.devices()[:1])


def lines(run_dir: Place) -> list[dict]:
    return [json.loads(text) for text in (run_dir / "metrics.jsonl").read_text().splitlines()]


def learned(run_dir: Place) -> list[tuple]:
    """The metrics of each line that must not depend on interruptions of the run."""
    return [(x["step"], x["loss"], x["hit_rate"], x["grad_norm"]) for x in lines(run_dir)]


def checkpoints_of(config: Config, read_only: bool = False) -> Checkpoints:
    settings = config.train
    return Checkpoints(Path(settings.output_dir), settings.max_to_keep, read_only)


def saved_state(config: Config, step: int):
    checkpoints = checkpoints_of(config)
    progress = checkpoints.progress(step)
    plan = GrowthPlan(config.features, config.tables)
    plan.set_state(progress["growth"])
    functions = make_step_functions(StepSettings.of(config), one_device(), plan.capacities_now())
    state = checkpoints.restore(step, functions.abstract)
    checkpoints.close()
    return jax.device_get(state), progress


def assert_same_run(config: Config, other: Config, step: int = 40):
    assert learned(Path(config.train.output_dir)) == learned(Path(other.train.output_dir))
    (state, progress), (state_2, progress_2) = saved_state(config, step), saved_state(other, step)
    jax.tree.map(np.testing.assert_array_equal, state, state_2)
    assert progress == progress_2


def wait_for_line(run_dir: Path, step: int):
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if (run_dir / "metrics.jsonl").exists() and f'"step": {step},' in (
            run_dir / "metrics.jsonl"
        ).read_text():
            return
        time.sleep(0.01)
    raise AssertionError(f"no line for step {step}")
