"""Training end to end: the contents of a run directory, and how a run stops and continues."""

import dataclasses
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pyarrow.orc
import pytest
import small
from jobs_of import (
    assert_same_run,
    checkpoints_of,
    job,
    learned,
    lines,
    one_device,
    saved_state,
    wait_for_line,
)
from places import HELPERS, REPO

from s2s_jax.cli.exit import run_command
from s2s_jax.cluster.mesh import make_mesh
from s2s_jax.config import Config, Linear, Pack
from s2s_jax.errors import EXIT_STOPPED, NotFiniteError, UserError
from s2s_jax.jobs.train import train
from s2s_jax.runs.run_dir import locked

USERS = 90


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    directory = tmp_path_factory.mktemp("log")
    small.write_log(directory, USERS)
    return directory


def test_a_run_packs_as_many_users_as_fill_a_batch(tmp_path, log):
    config = job(log, tmp_path / "run", train_steps=2)
    config = dataclasses.replace(
        config,
        io=dataclasses.replace(config.io, sequences=Pack(windows=2)),
        model=dataclasses.replace(config.model, num_layers=1),
    )
    assert not train(config, one_device())
    columns = [pyarrow.orc.read_table(path)["item_id"] for path in sorted(log.glob("*.orc"))]
    mean = np.mean([len(row) for column in columns for row in column.to_pylist()])
    packing = int(0.85 * 8 * small.SEQ_LEN / mean)
    assert 1 < packing < 8  # Not the rows of a batch.
    checkpoints = checkpoints_of(config)
    assert checkpoints.progress(2)["reader"]["row"] == 2 * packing
    checkpoints.close()


@pytest.fixture(scope="module")
def straight(log, tmp_path_factory):
    config = job(log, tmp_path_factory.mktemp("straight"))
    assert not train(config, one_device())
    return config


def test_the_run_directory(straight, log):
    run_dir = Path(straight.train.output_dir)
    assert json.loads((run_dir / "config.json").read_text()) == json.loads(straight.to_json())
    assert sorted(int(p.name) for p in (run_dir / "checkpoints").iterdir()) == [10, 20, 30, 40]
    written = lines(run_dir)
    assert [line["step"] for line in written] == list(range(5, 41, 5))
    names = ["step", "loss", "hit_rate", "grad_norm", "examples_per_sec", "tokens_per_sec"]
    assert list(written[0]) == [*names, "step_ms", "input_wait_ms"]
    assert all(isinstance(value, int | float) for line in written for value in line.values())
    assert written[-1]["loss"] < written[0]["loss"] - 0.5
    assert written[-1]["hit_rate"] > written[0]["hit_rate"]


def test_same_seed_same_run(straight, log, tmp_path):
    again = job(log, tmp_path)
    assert not train(again, one_device())
    assert_same_run(straight, again)


def test_interrupted_and_continued_equals_straight(straight, log, tmp_path, capsys):
    assert not train(job(log, tmp_path, train_steps=17), one_device())
    config = job(log, tmp_path)
    assert not train(config, one_device())
    assert "continuing from the checkpoint of step 17" in capsys.readouterr().err
    assert_same_run(straight, config)


RUNNER = """
import pickle, sys, jax
import small
from s2s_jax.cli.exit import run_command
from s2s_jax.cli.commands.train import run
from s2s_jax.training.growth import GrowthPlan
from s2s_jax.cluster.mesh import make_mesh
config = pickle.load(open(sys.argv[1], "rb"))
run_command(lambda _: run(config, make_mesh(jax.devices()[:1])))
"""


def start(config: Config, tmp_path: Path) -> subprocess.Popen:
    """Starts the job in a separate process, slowed down so that it can be stopped in the middle."""
    (tmp_path / "config.pickle").write_bytes(pickle.dumps(config))
    slow = "import s2s_jax.jobs.train as t, time\nnext_ = t.Reader.__next__\n"
    slow += "t.Reader.__next__ = lambda self: (time.sleep(0.05), next_(self))[1]\n"
    return subprocess.Popen(
        [sys.executable, "-c", slow + RUNNER, str(tmp_path / "config.pickle")],
        env=os.environ | {"PYTHONPATH": str(HELPERS)},
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_a_stop_signal_saves_and_the_run_continues(straight, log, tmp_path, number):
    run_dir = tmp_path / "run"
    config = job(log, run_dir)
    process = start(config, tmp_path)
    wait_for_line(run_dir, 15)
    process.send_signal(number)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == EXIT_STOPPED, said
    assert "start the same command again" in said
    assert "Traceback" not in said
    saved = max(int(p.name) for p in (run_dir / "checkpoints").iterdir())
    assert 10 < saved < 40
    assert not train(config, one_device())
    assert_same_run(straight, config)


def test_two_runs_do_not_share_a_directory(log, tmp_path):
    with locked(tmp_path), pytest.raises(UserError, match="another process is training in"):
        train(job(log, tmp_path), one_device())
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be used"):
        train(job(log, tmp_path / "file"), one_device())


def test_a_killed_run_continues_from_its_newest_checkpoint(straight, log, tmp_path):
    run_dir = tmp_path / "run"
    config = job(log, run_dir)
    process = start(config, tmp_path)
    wait_for_line(run_dir, 25)
    process.kill()
    process.communicate(timeout=60)
    with (run_dir / "metrics.jsonl").open("a") as file:
        # Invalid lines, and a partial one, as after a kill during a write.
        file.write('3\n{"x": 1}\n\n{"step": 30, "lo')
    assert not train(config, one_device())
    assert_same_run(straight, config)


def test_an_unfinished_checkpoint_is_not_used(log, tmp_path, capsys):
    assert not train(job(log, tmp_path, train_steps=10), one_device())
    checkpoints = tmp_path / "checkpoints"
    unfinished = checkpoints / "20.orbax-checkpoint-tmp-1"
    shutil.copytree(checkpoints / "10", unfinished)
    assert not train(job(log, tmp_path, train_steps=12), one_device())
    assert not unfinished.exists()
    assert "continuing from the checkpoint of step 10" in capsys.readouterr().err


def test_a_damaged_checkpoint_is_refused_in_one_sentence(log, tmp_path):
    assert not train(job(log, tmp_path, train_steps=10), one_device())
    shutil.rmtree(tmp_path / "checkpoints" / "10" / "state")
    with pytest.raises(UserError, match="checkpoints/10: is damaged") as caught:
        train(job(log, tmp_path, train_steps=12), one_device())
    assert "\n" not in str(caught.value)


def test_a_finished_run_has_nothing_to_do(straight, log, capsys):
    before = lines(Path(straight.train.output_dir))
    assert not train(straight, one_device())
    assert lines(Path(straight.train.output_dir)) == before


def test_only_the_newest_checkpoints_are_kept(log, tmp_path):
    train(job(log, tmp_path, train_steps=12, save_steps=2, max_to_keep=3), one_device())
    assert sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir()) == [8, 10, 12]


def test_a_loss_that_is_not_finite_stops_and_saves_nothing_more(log, tmp_path):
    config = job(log, tmp_path, save_steps=1, max_to_keep=50)
    config = dataclasses.replace(config, lr=dataclasses.replace(config.lr, dense_lr=1e37))
    with pytest.raises(NotFiniteError, match=r"step \d+: loss"):
        train(config, one_device())
    newest = max(int(p.name) for p in (tmp_path / "checkpoints").iterdir())
    written = lines(tmp_path) if (tmp_path / "metrics.jsonl").exists() else []
    assert all(np.isfinite(line["loss"]) for line in written)
    assert newest < 40
    with pytest.raises(NotFiniteError, match=f"the newest checkpoint is {newest}"):
        train(config, one_device())


def test_bad_data_in_mid_run_loses_nothing(log, tmp_path):
    """Steps before the bad stripe are saved; after a repair, the run continues as usual."""
    bad = tmp_path / "log"
    shutil.copytree(log, bad)
    config = job(bad, tmp_path / "run", train_epoch=1, train_steps=None)
    config = dataclasses.replace(config, io=dataclasses.replace(config.io, shuffle=False))
    whole = (bad / "part-1.orc").read_bytes()
    (bad / "part-1.orc").write_bytes(whole[:3] + b"\xff" * 300 + whole[303:])
    with pytest.raises(UserError, match=r"part-1.orc: stripe 0") as caught:
        train(config, one_device())
    assert "\n" not in str(caught.value)
    (saved,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert 1 <= int(saved.name) <= USERS // 8
    (bad / "part-1.orc").write_bytes(whole)
    assert not train(config, one_device())
    other = dataclasses.replace(
        config, train=dataclasses.replace(config.train, output_dir=str(tmp_path / "other"))
    )
    assert not train(other, one_device())
    assert_same_run(config, other, step=-(-USERS // 8))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: dataclasses.replace(c, model=dataclasses.replace(c.model, hidden_size=32)),
         ["model.hidden_size", "16", "32", "train.output_dir"]),
        (lambda c: dataclasses.replace(c, model=dataclasses.replace(c.model, input_norm=True)),
         ["model.input_norm", "False", "True"]),
        (lambda c: dataclasses.replace(
            c, features=(dataclasses.replace(c.features[0], hash_type="murmur"), *c.features[1:])),
         ["features.0.hash_type", "murmur"]),
        (lambda c: dataclasses.replace(
            c, features=c.features[:2], loss=dataclasses.replace(c.loss, target_features=None)),
         ["features.2.name", "tags", "nothing"]),
        (lambda c: dataclasses.replace(
            c, loss=dataclasses.replace(c.loss, target_features=("item_id",))),
         ["loss.target_features", "tags"]),
        (lambda c: dataclasses.replace(c, loss=dataclasses.replace(c.loss, similarity="dot")),
         ["loss.similarity", "cosine", "dot"]),
        (lambda c: dataclasses.replace(
            c, loss=dataclasses.replace(c.loss, log_q="stream")),
         ["loss.log_q", "none or catalogue", "stream", "train.output_dir"]),
        (lambda c: dataclasses.replace(c, io=dataclasses.replace(c.io, seed=1)),
         ["io.seed", "42", "now 1"]),
        (lambda c: dataclasses.replace(c, io=dataclasses.replace(c.io, shards=3)),
         ["io.shards", "16", "now 3"]),
    ],
)  # fmt: skip
def test_changes_that_do_not_fit_the_run_are_refused_by_name(straight, change, words):
    config = change(straight)
    with pytest.raises(UserError) as caught:
        train(config, one_device())
    for word in words:
        assert word in str(caught.value)


def test_other_files_are_refused(straight, tmp_path):
    small.write_log(tmp_path, USERS, seed=5)
    config = dataclasses.replace(
        straight, io=dataclasses.replace(straight.io, data_paths=str(tmp_path))
    )
    with pytest.raises(UserError, match=r"io.data_paths: .* other files"):
        train(config, one_device())


@pytest.mark.slow
def test_a_decay_without_an_end_ends_with_the_run(log, tmp_path):
    def run(name, decay_steps, **changes):
        config = job(log, tmp_path / name, log_steps=1, **changes)
        lr = dataclasses.replace(config.lr, decay=Linear(steps=decay_steps))
        config = dataclasses.replace(config, lr=lr)
        assert not train(config, one_device())
        return config

    # Two epochs; the run continues in the second one.
    steps = -(-USERS // 8)
    config = run("epochs", None, train_steps=None, train_epoch=2)
    run("known", 2 * steps, train_steps=2 * steps - 3)
    run("known", None, train_steps=None, train_epoch=2)
    assert learned(tmp_path / "epochs") == learned(tmp_path / "known")
    (_, found), (_, other) = (
        saved_state(dataclasses.replace(config, train=dataclasses.replace(
            config.train, output_dir=str(tmp_path / name))), 2 * steps)
        for name in ("epochs", "known")
    )  # fmt: skip
    assert found == other


def test_learning_rates_may_change_even_in_runs_older_than_a_key(straight, log, tmp_path):
    shutil.copytree(straight.train.output_dir, tmp_path / "run")
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    del saved["model"]["input_norm"]
    (tmp_path / "run" / "config.json").write_text(json.dumps(saved))
    config = job(log, tmp_path / "run", train_steps=45)
    config = dataclasses.replace(config, lr=dataclasses.replace(config.lr, dense_lr=1e-4))
    assert not train(config, one_device())
    assert lines(tmp_path / "run")[-1]["step"] == 45


@pytest.mark.slow
@pytest.mark.parametrize("devices", [2, 8])
def test_a_run_continues_on_other_devices(straight, log, tmp_path, devices):
    """Saved on one device and continued on several: the same losses up to rounding (no dropout)."""

    def on(count, steps, run_dir):
        config = job(log, run_dir, train_steps=steps)
        io = dataclasses.replace(config.io, batch_size=8 // count)
        model = dataclasses.replace(config.model, dropout=0.0)
        config = dataclasses.replace(config, io=io, model=model)
        assert not train(config, make_mesh(jax.devices()[:count]))

    on(1, 20, tmp_path / "straight")
    on(1, 10, tmp_path / "moved")
    on(devices, 20, tmp_path / "moved")
    np.testing.assert_allclose(
        [x["loss"] for x in lines(tmp_path / "moved")],
        [x["loss"] for x in lines(tmp_path / "straight")],
        rtol=1e-4,
    )


def test_tensorboard_and_profile(log, tmp_path):
    train(job(log, tmp_path, train_steps=6, tensorboard=True, profile_steps=(2, 3)), one_device())
    assert list((tmp_path / "tensorboard").glob("events*"))
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


def test_a_profile_that_spans_the_end_of_a_run_is_written_and_restarted(log, tmp_path):
    def traces():
        return set((tmp_path / "profile").rglob("*.xplane.pb"))

    config = job(log, tmp_path, train_steps=3, profile_steps=(2, 5))
    assert not train(config, one_device())
    first = traces()
    assert len(first) == 1
    time.sleep(1.1)  # The name of a trace is the second in which it ends.
    config = job(log, tmp_path, train_steps=6, profile_steps=(2, 5))
    assert not train(config, one_device())
    assert len(traces()) == 2
    assert lines(tmp_path)[-1]["step"] == 5
    # The profiled steps are already done.
    assert not train(job(log, tmp_path, train_steps=7, profile_steps=(2, 5)), one_device())
    assert len(traces()) == 2


@pytest.mark.slow
def test_a_profile_that_cannot_begin_does_not_end_the_run(log, tmp_path, capsys):
    jax.profiler.start_trace(str(tmp_path / "another"))
    try:
        assert not train(job(log, tmp_path, train_steps=3, profile_steps=(1, 2)), one_device())
    finally:
        jax.profiler.stop_trace()
    assert capsys.readouterr().err.count("the profile cannot be written") == 1


def test_a_profile_of_a_run_that_fails_is_written(log, tmp_path):
    config = job(log, tmp_path, profile_steps=(2, 35))
    config = dataclasses.replace(config, lr=dataclasses.replace(config.lr, dense_lr=1e37))
    with pytest.raises(NotFiniteError):
        train(config, one_device())
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


def test_too_little_memory_is_explained(log, tmp_path, monkeypatch):
    def no_memory(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.")

    monkeypatch.setattr("s2s_jax.jobs.train._start_or_continue", no_memory)
    with pytest.raises(UserError, match=r"out of memory: .*hash_bucket_size"):
        train(job(log, tmp_path), one_device())


@pytest.mark.parametrize(
    ("error", "code"), [(UserError("a sentence"), 2), (NotFiniteError("a sentence"), 3)]
)
def test_exit_codes_of_errors(error, code, capsys):
    def main(_):
        raise error

    with pytest.raises(SystemExit) as caught:
        run_command(main)
    assert caught.value.code == code
    assert capsys.readouterr().err == "error: a sentence\n"


@pytest.mark.parametrize("words", ["print('much') or 0", "sys.exit(print('much'))"])
def test_a_closed_output_ends_a_command_silently(words):
    program = (
        f"import sys\nfrom s2s_jax.cli.exit import run_command\nrun_command(lambda _: {words})"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(HELPERS)},
    ) as command:
        command.stdout.close()
        assert command.stderr.read() == b""
        assert command.wait(timeout=60) == 128 + signal.SIGPIPE


def test_a_signal_after_the_end_of_a_command_does_not_change_its_code():
    """A slow exit: a module takes long to be torn down."""
    program = """
import os, sys, time
from s2s_jax.cli.exit import run_command
class Slow:
    def __del__(self, sleep=time.sleep, write=os.write):
        write(1, b"ending")
        sleep(1)
sys.modules["last"] = Slow()
run_command(lambda _: 0)
"""
    with subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(REPO)},
    ) as command:
        assert command.stdout.read(6) == b"ending"
        command.send_signal(signal.SIGTERM)
        assert command.wait(timeout=60) == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_command_with_a_sentence(tmp_path, number):
    """Unfinished work is also cleaned up, as after any error."""
    begun = tmp_path / "begun"
    program = f"""
import pathlib, tempfile, time
from s2s_jax.cli.exit import run_command
def main(_):
    with tempfile.TemporaryDirectory(dir={str(tmp_path)!r}):
        pathlib.Path({str(begun)!r}).touch()
        time.sleep(60)
run_command(main)
"""
    with subprocess.Popen(
        [sys.executable, "-c", program],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(REPO)},
    ) as command:
        while not begun.exists():
            time.sleep(0.01)
        command.send_signal(number)
        assert command.communicate(timeout=60)[1] == f"stopped by {number.name}; start again\n"
    assert command.returncode == EXIT_STOPPED
    assert list(tmp_path.iterdir()) == [begun]


def test_the_command_line(log, tmp_path):
    """The command: one sentence and exit code 2 for a mistake, otherwise a table at the end."""
    base = [sys.executable, "-m", "s2s_jax.train", "--config", "configs/quickstart.py"]

    def call(*arguments):
        return subprocess.run(
            base + list(arguments), cwd=REPO, capture_output=True, text=True, check=False
        )

    wrong = call("--model.nhaed", "4")
    assert wrong.returncode == 2
    assert wrong.stderr == "error: model.nhaed: no such key; did you mean model.nhead?\n"
    missing = call("--io.data_paths", str(tmp_path / "none"))
    assert missing.returncode == 2
    assert missing.stderr == f"error: io.data_paths: {tmp_path / 'none'} does not exist\n"
