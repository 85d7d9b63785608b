"""`s2s init`: the whole command on a small log, and its mistakes."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import plans
import pyarrow as pa
import pytest
from logs import write_log
from places import REPO

from s2s_jax.cli import main as front
from s2s_jax.cluster.mesh import make_mesh
from s2s_jax.config import load
from s2s_jax.data.logs.synthesize import Settings as Synthesis
from s2s_jax.data.logs.synthesize import synthesize
from s2s_jax.errors import UserError
from s2s_jax.jobs.evaluate import evaluate
from s2s_jax.jobs.train import train
from s2s_jax.planning import first_config, rules, trial
from s2s_jax.planning.promise import Measured


@pytest.fixture
def tiny(monkeypatch):
    """Small models and short trials, on one device."""
    model = dataclasses.replace(rules.SHORT.model, hidden_size=16, num_layers=1, dim_feedforward=16)
    monkeypatch.setattr(rules, "SHORT", dataclasses.replace(rules.SHORT, model=model))
    monkeypatch.setitem(rules.POSITIONS, "cpu", 320)
    monkeypatch.setattr(rules, "ITEM_DIM", 16)
    monkeypatch.setattr(trial, "STEPS", 16)
    flags = os.environ["XLA_FLAGS"].split()
    monkeypatch.setenv("XLA_FLAGS", " ".join(f for f in flags if "device_count" not in f))
    monkeypatch.setenv("PYTHONPATH", str(REPO))


def synthetic_log(directory: Path) -> Path:
    synthesize(Synthesis(output=directory, users=300, items=200, mean_length=12, files=2))
    return directory


def mistake(*arguments: str) -> str:
    with pytest.raises(UserError) as caught:
        front.main(["init", *arguments])
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_oddities_of_the_log_are_told(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(trial, "run", told_enough)
    ints = pa.list_(pa.int64())
    newest_first = [{"item_id": [1, 2, 3, 4], "timestamp": [9, 8, 7, 6 - n]} for n in range(90)]
    write_log(tmp_path / "log.orc", newest_first, {"item_id": ints, "timestamp": ints})
    with pytest.raises(StopIteration):
        front.main(["init", str(tmp_path / "log.orc"), "--output", str(tmp_path / "mine.py")])
    assert "warning: events are stored newest first in 90 (100.0%)" in capsys.readouterr().err


def told_enough(*_: object) -> None:
    raise StopIteration


def test_a_first_configuration_trains_and_evaluates_as_it_is(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    log, file = synthetic_log(tmp_path / "log"), tmp_path / "mine.py"
    begun = time.monotonic()
    assert front.main(["init", "log", "--out", "mine.py", "--budget_minutes", "5"]) == 0
    whole = time.monotonic() - begun
    shown = capsys.readouterr().out
    assert shown.startswith("Training takes about ")
    assert "s2s train --config mine.py" in shown
    config = load(file)
    assert config.io.data_paths == str(log)
    assert config.train.output_dir == "runs/mine"
    # Nothing but the file is left.
    assert sorted(p.name for p in tmp_path.iterdir()) == ["log", "mine.py"]
    text = " ".join(file.read_text().split())
    promised = re.search(r"([\d.]+) (seconds|minutes) to start and to end", text)
    assert promised is not None
    # The trial did all of this, too.
    assert 1 < float(promised[1]) * {"seconds": 1, "minutes": 60}[promised[2]] <= whole
    # A run of two steps, which is evaluated once or twice, depending on the speed of the trial.
    mesh = make_mesh(jax.devices()[:1])
    short = dataclasses.replace(
        config,
        lr=dataclasses.replace(config.lr, warmup_steps=0),
        train=dataclasses.replace(config.train, train_steps=2, train_epoch=None),
    )
    train(short, mesh)
    said = re.search(r"([\d,]+) steps an epoch", capsys.readouterr().err)
    steps = re.search(r"for ([\d,]+) steps of [\d,]+ ms \(([\d.]+) epochs\)", text)
    assert said is not None
    assert steps is not None
    epochs = int(steps[1].replace(",", "")) / int(said[1])
    assert float(steps[2]) == pytest.approx(epochs, rel=0.01)
    lines = [json.loads(x) for x in Path("runs/mine/metrics.jsonl").read_text().splitlines()]
    assert any("eval/ndcg@10" in line for line in lines)
    assert evaluate(short, mesh=mesh).evaluation.metrics["eval/users"] > 100


def test_what_is_said_with_the_promise(tmp_path, monkeypatch, capsys):
    measured = Measured(
        around=30.0, steps=[1.0] * 60, evaluations=[9.0, 4.0], users=300, memory=10**9
    )
    monkeypatch.setattr(trial, "run", lambda plan, items: measured)
    monkeypatch.setattr(first_config, "this_machine", lambda: plans.CPU)
    monkeypatch.setattr(first_config, "is_busy", lambda: True)
    monkeypatch.chdir(tmp_path)
    log = str(synthetic_log(tmp_path / "log"))
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    (tmp_path / "runs" / "mine" / "config.json").touch()
    assert front.main(["init", log, "--output", "mine.py", "--budget_minutes", "3"]) == 0
    shown = capsys.readouterr().out
    # 180 seconds without 35 to start, compile and end, and without nearly 8 for the two evaluations that
    # fit into 8.6 seconds (a few rows are too short for them): 137, and so 130 steps, which are a
    # multiple of ten.
    assert load("mine.py").train.train_steps == 130
    assert "Training takes about 2.9 minutes" in shown
    assert "Other programs used the machine" in shown
    assert "There is a run in runs/mine" in shown


def test_a_failed_trial_is_reported_in_one_sentence(tiny, tmp_path):
    made = rules.plan(plans.log(paths=str(tmp_path / "gone")), plans.CPU, "runs/mine")
    with pytest.raises(
        UserError, match=r"^the trial failed: io\.data_paths: .*gone does not exist"
    ):
        trial.run(made, 100)


def test_a_signal_ends_the_trial(tmp_path):
    log, temporary = synthetic_log(tmp_path / "log"), tmp_path / "temporary"
    temporary.mkdir()
    command = [
        sys.executable,
        "-m",
        "s2s_jax",
        "init",
        str(log),
        "--output",
        str(tmp_path / "m.py"),
    ]
    environment = os.environ | {"PYTHONPATH": str(REPO), "TMPDIR": str(temporary)}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        while "trying" not in process.stderr.readline():
            pass
        try:
            # Its output is opened a moment before it starts.
            while not processes_of(temporary):
                time.sleep(0.01)
            assert len(processes_of(temporary)) == 1
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 75
        finally:
            process.kill()
    # The last process may still be ending.
    deadline = time.monotonic() + 20
    while processes_of(temporary) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert processes_of(temporary) == []
    assert list(temporary.iterdir()) == []
    assert not (tmp_path / "m.py").exists()


def processes_of(directory: Path) -> list[str]:
    """The processes with a path in the directory among their arguments."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if any(word.startswith(os.fsencode(directory / "s2s_init_")) for word in words):
            found.append(path.parent.name)
    return found


def test_mistakes_are_answered_in_one_sentence(tmp_path):
    log = str(write_log(tmp_path / "log.orc", [{"sku": [1, 2, 3, 4]}]))
    file = str(tmp_path / "mine.py")
    assert "--output: expected the name of a Python file" in mistake(log, "--output", "mine.toml")
    assert "--budget_minutes: expected more than 0, found 0" in mistake(
        log, "--output", file, "--budget_minutes", "0"
    )
    assert "does not exist" in mistake(str(tmp_path / "nothing"), "--output", file)
    assert "name the column of the items with --item_feature" in mistake(log, "--output", file)
    Path(file).write_text("mine")
    assert f"{file} exists" in mistake(log, "--output", file)
    assert Path(file).read_text() == "mine"
    # With --overwrite, the next mistake is found.
    assert "--item_feature" in mistake(log, "--output", file, "--overwrite")
