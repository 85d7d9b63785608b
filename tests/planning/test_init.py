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
from s2s_jax.planning import rules, trial


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
    text = file.read_text()
    promised = re.search(r"(\d+)\s+seconds\s+to\s+start\s+and\s+to\s+end", text)
    assert promised is not None
    # The trial did all of this, too.
    assert 1 < int(promised[1]) <= whole
    # A run of two steps, each of them evaluated.
    mesh = make_mesh(jax.devices()[:1])
    short = dataclasses.replace(
        config,
        lr=dataclasses.replace(config.lr, warmup_steps=0),
        train=dataclasses.replace(config.train, train_steps=2, train_epoch=None),
    )
    train(short, mesh)
    assert (tmp_path / "runs/mine/config.json").exists()
    lines = [json.loads(x) for x in Path("runs/mine/metrics.jsonl").read_text().splitlines()]
    assert sum("eval/ndcg@10" in line for line in lines) == 2
    assert evaluate(short, mesh=mesh).evaluation.metrics["eval/users"] > 100


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
        while not list(temporary.glob("*/output.txt")):
            time.sleep(0.01)
        assert len(processes_of(temporary)) == 1
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 75
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
