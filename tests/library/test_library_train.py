"""`s2s_jax.train` trains as the command does, and leaves the process as it was."""

import dataclasses
import logging
import os
import signal
import sys
import threading
import time
from pathlib import Path

import jax
import pyarrow as pa
import pytest
import small
from jobs_of import assert_same_run, job, one_device

import s2s_jax as s2s
from s2s_jax.cli.commands.train import run
from s2s_jax.jobs import train as jobs
from s2s_jax.runs.checkpoints.store import Checkpoints
from s2s_jax.runs.run_dir import locked
from s2s_jax.signals import Stop
from s2s_jax.training.loop import Loop


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    directory = tmp_path_factory.mktemp("log")
    small.write_log(directory, 90)
    return directory


def one():
    return jax.devices()[:1]


def of_the_process():
    """State of the whole process that a library must not change."""
    loggers = [logging.getLogger(name) for name in ("", "absl", "asyncio", "jax", "orbax")]
    return {
        "signals": [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGPIPE)],
        "unraisable": sys.unraisablehook,
        "excepthooks": (sys.excepthook, threading.excepthook),
        "loggers": [(x.level, list(x.filters), list(x.handlers)) for x in loggers],
        "pool": pa.default_memory_pool().backend_name,
        "environment": dict(os.environ),
        "directory": Path.cwd(),
        "jax": dict(jax.config.values),
        "streams": (sys.stdout, sys.stderr),
        "not daemons": [t.name for t in threading.enumerate() if not t.daemon],
    }


def test_trains_as_the_command_does(log, tmp_path):
    config, same = job(log, tmp_path / "run"), job(log, tmp_path / "other")
    assert run(same, one_device()) == 0
    before = of_the_process()
    trained = s2s.train(config, devices=one())
    assert of_the_process() == before
    assert trained.config == config
    assert trained.steps[-1] == 40
    assert_same_run(config, same)
    # The lock is free, and a finished run stays finished.
    with locked(trained.directory):
        pass
    assert s2s.train(config, devices=one()).metrics() == trained.metrics()


def test_errors_are_raised_and_leave_nothing_behind(log, tmp_path):
    config = job(log, tmp_path / "run", train_steps=4, save_steps=2)
    before = of_the_process()
    wrong = dataclasses.replace(config, io=dataclasses.replace(config.io, batch_size=0))
    with pytest.raises(s2s.UserError, match=r"io\.batch_size: expected at least 1"):
        s2s.train(wrong)
    assert not (tmp_path / "run").exists()
    gone = dataclasses.replace(config, io=dataclasses.replace(config.io, data_paths="/nowhere"))
    with pytest.raises(s2s.UserError, match="/nowhere"):
        s2s.train(gone, devices=one())
    hot = dataclasses.replace(config, lr=dataclasses.replace(config.lr, dense_lr=1e38))
    with pytest.raises(s2s.NotFiniteError, match="expected finite"):
        s2s.train(hot, devices=one())
    s2s.train(config, devices=one())
    damaged = tmp_path / "run" / "checkpoints" / "4" / "state"
    for path in damaged.rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    more = dataclasses.replace(config, train=dataclasses.replace(config.train, train_steps=6))
    with pytest.raises(s2s.UserError, match="checkpoints/4"):
        s2s.train(more, devices=one())
    assert of_the_process() == before
    with pytest.raises(s2s.UserError, match="checkpoints/4"):
        s2s.Run(tmp_path / "run", devices=one()).encode([])
    # Orbax leaves an idle thread of a pool behind, which ends with the process.
    assert of_the_process() | {"not daemons": []} == before | {"not daemons": []}


def test_two_trainings_in_one_directory(log, tmp_path):
    config = job(log, tmp_path / "run", train_steps=2)
    with locked(tmp_path / "run"), pytest.raises(s2s.UserError, match="training in"):
        s2s.train(config, devices=one())


@pytest.fixture(scope="module")
def straight(log, tmp_path_factory):
    config = job(log, tmp_path_factory.mktemp("straight"), train_steps=20)
    assert s2s.train(config, devices=one()).steps[-1] == 20
    return config


@pytest.mark.parametrize(
    "when",
    [
        pytest.param("in a step", marks=pytest.mark.slow),
        "while it saves",
        "before the first step",
        "while the model is made",
    ],
)
def test_an_interrupt_saves_and_is_raised(straight, log, tmp_path, monkeypatch, when):
    config = job(log, tmp_path / "run", train_steps=20)
    of, name, number, step = {
        "in a step": (Loop, "_take_step", 7, 7),
        "while it saves": (Checkpoints, "save", 1, 10),
        "before the first step": (Loop, "run", 1, 0),
        "while the model is made": (jobs, "initial_items", 1, 0),
    }[when]
    function, calls = getattr(of, name), []
    stops = []

    def recorded_stop():
        stops.append(Stop())
        return stops[-1]

    def interrupting(*arguments, **more):
        calls.append(None)
        if len(calls) == number:
            # As Ctrl-C does. Python handles the signal in the main thread, a little later.
            os.kill(os.getpid(), signal.SIGINT)
            until = time.monotonic() + 60
            while stops[0].requested is None and time.monotonic() < until:
                time.sleep(0.001)
        return function(*arguments, **more)

    with monkeypatch.context() as patched:
        patched.setattr(of, name, interrupting)
        patched.setattr(sys.modules[s2s.train.__module__], "Stop", recorded_stop)
        with pytest.raises(KeyboardInterrupt):
            s2s.train(config, devices=one())
    began = (tmp_path / "run/config.json").exists()
    steps = s2s.Run(tmp_path / "run").steps if began else []
    # The step that was under way when the interrupt was seen is still taken.
    assert (steps or [0])[-1] in (step, step + 1)
    s2s.train(config, devices=one())
    assert_same_run(config, straight, 20)


def test_a_configuration_made_in_python(log, tmp_path):
    config = s2s.Config(
        io=s2s.IOConfig(data_paths=str(log), batch_size=8),
        features=(s2s.FeatureConfig(name="item_id", emb_dim=8, hash_bucket_size=300),),
        model=s2s.ModelConfig(seq_len=6, hidden_size=16, num_layers=1, nhead=2, dim_feedforward=16),
        loss=s2s.LossConfig(target_features=("item_id",)),
        train=s2s.TrainConfig(
            train_steps=2, log_steps=1, tensorboard=False, output_dir=str(tmp_path / "run")
        ),
    )
    assert s2s.train(config, devices=one()).metrics()["step"].to_pylist() == [1, 2]
