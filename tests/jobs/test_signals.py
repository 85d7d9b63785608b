"""SIGTERM and SIGINT at any time: handled at once, nothing is lost, and nothing happens twice."""

import dataclasses
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
import pytest
import small
from jobs_of import job, lines, one_device, saved_state
from places import HELPERS, REPO

from s2s_jax.cli.commands.train import run
from s2s_jax.config import LastEvents
from s2s_jax.data.batching.reader import Reader
from s2s_jax.data.items import item_counts
from s2s_jax.errors import EXIT_STOPPED, Stopped, UserError
from s2s_jax.ranking import evaluation
from s2s_jax.ranking.candidates import Candidates
from s2s_jax.runs.checkpoints.store import Checkpoints
from s2s_jax.runs.writer import Writer
from s2s_jax.signals import StopSignals
from s2s_jax.training import growth

STEPS = 16


def send(number=signal.SIGTERM):
    """Sends the signal, as a scheduler does."""
    os.kill(os.getpid(), number)


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    directory = tmp_path_factory.mktemp("log")
    small.write_log(directory, 90)
    return directory


def make_job(log, run_dir, **changes):
    """Tables grow, and validation events are ranked; saves only for that and at the end."""
    config = job(log, run_dir, train_steps=STEPS, log_steps=4, save_steps=1000, **changes)
    return dataclasses.replace(
        small.growing(config),
        loss=dataclasses.replace(config.loss, negatives="mixed", num_negatives=8),
        eval=dataclasses.replace(
            config.eval, split=LastEvents(events=1), every_steps=6, batch_size=16
        ),
    )


@pytest.fixture(scope="module")
def straight(log, tmp_path_factory):
    config = make_job(log, tmp_path_factory.mktemp("straight") / "run")
    assert run(config, one_device()) == 0
    return config


def evaluations(config):
    found = [x for x in lines(Path(config.train.output_dir)) if "eval/mrr" in x]
    return {x["step"]: x["eval/mrr"] for x in found}


def losses(config):
    found = lines(Path(config.train.output_dir))
    return [(x["step"], x["loss"]) for x in found if "loss" in x]


def continued_equals(straight, config):
    """Continues to the end, and compares results and metrics with a run that never stopped."""
    assert run(config, one_device()) == 0
    run_dir, other = Path(config.train.output_dir), Path(straight.train.output_dir)
    assert [x["step"] for x in lines(run_dir)] == [x["step"] for x in lines(other)]
    assert losses(config) == losses(straight)
    assert evaluations(config) == evaluations(straight)
    assert sorted(evaluations(config)) == [6, 12, 16]
    (state, progress), (state_2, progress_2) = saved_state(config, 16), saved_state(straight, 16)
    jax.tree.map(np.testing.assert_array_equal, state, state_2)
    assert progress == progress_2


def calls(monkeypatch, of, name, number, before=True):
    """Makes call `number` of a function send the signal."""
    function, count = getattr(of, name), [0]

    def wrapped(*arguments, **more):
        count[0] += 1
        if count[0] == number and before:
            send()
        result = function(*arguments, **more)
        if count[0] == number and not before:
            send()
        return result

    monkeypatch.setattr(of, name, wrapped)


def newest(config):
    directory = Path(config.train.output_dir) / "checkpoints"
    return max((int(path.name) for path in directory.iterdir()), default=None)


@pytest.mark.slow
def test_stopped_while_evaluating(straight, log, tmp_path, monkeypatch, capsys):
    """The step was saved before; the evaluation is abandoned, and repeated when the run continues."""
    config = make_job(log, tmp_path / "run")
    with monkeypatch.context() as patched:
        calls(patched, Candidates, "ranks_by_weight", 8)
        assert run(config, one_device()) == EXIT_STOPPED
    assert "stopped by SIGTERM; start the same command again" in capsys.readouterr().err
    assert newest(config) == 12
    assert sorted(evaluations(config)) == [6]
    # The best so far is known from metrics.jsonl, and the last saved step is not evaluated yet.
    continued_equals(straight, config)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("of", "name", "number", "step"),
    [
        (item_counts, "_count_stripe", 1, None),
        (Reader, "__next__", 1, None),
        (Reader, "__next__", 9, 8),
        (Checkpoints, "save", 1, 6),
        (Checkpoints, "restore", 1, 6),
        (Writer, "write", 1, 5),
    ],
)
def test_stopped_at_any_moment(straight, log, tmp_path, monkeypatch, of, name, number, step):
    config = make_job(log, tmp_path / "run")
    if name == "restore":
        with monkeypatch.context() as patched:
            calls(patched, Checkpoints, "save", 1)
            assert run(config, one_device()) == EXIT_STOPPED
    with monkeypatch.context() as patched:
        calls(patched, of, name, number)
        assert run(config, one_device()) == EXIT_STOPPED
    assert newest(config) == step
    continued_equals(straight, config)


@pytest.mark.slow
def test_stopped_while_a_table_grows(straight, log, tmp_path, monkeypatch):
    first = make_job(log, tmp_path / "run")
    first = dataclasses.replace(first, train=dataclasses.replace(first.train, train_steps=3))
    assert run(first, one_device()) == 0
    config = dataclasses.replace(make_job(log, tmp_path / "run"), features=straight.features)
    config = dataclasses.replace(config, tables=straight.tables)
    config = small.with_table(config, "item_id", capacity=8192)
    with monkeypatch.context() as patched:
        calls(patched, growth, "doubled", 1)
        assert run(config, one_device()) == EXIT_STOPPED
    assert newest(config) == 4
    assert run(config, one_device()) == 0
    assert losses(config) == losses(straight)


@pytest.mark.parametrize("step", [0, pytest.param(6, marks=pytest.mark.slow)])
def test_stopped_while_compiling(straight, log, tmp_path, monkeypatch, step, capsys):
    """Python would handle it only after compiling, which may take longer than the grace period."""
    config = make_job(log, tmp_path / "run")
    end = threading.Event()
    compile_ = jax.stages.Lowered.compile

    def slow(self, *arguments, **more):
        if threading.current_thread() is not threading.main_thread():
            send()
            end.wait(60)
        return compile_(self, *arguments, **more)

    with monkeypatch.context() as patched:
        if step == 6:
            calls(patched, Checkpoints, "save", 1)
            assert run(config, one_device()) == EXIT_STOPPED
        patched.setattr(jax.stages.Lowered, "compile", slow)
        begun = time.monotonic()
        assert run(config, one_device()) == EXIT_STOPPED
        assert time.monotonic() - begun < 30
        end.set()
    assert "start the same command again" in capsys.readouterr().err
    assert newest(config) == (step or None)


def test_a_step_is_saved_before_an_evaluation_that_fails(log, tmp_path, monkeypatch):
    config = make_job(log, tmp_path / "run")

    def broken(*_):
        raise UserError("a stripe")

    with monkeypatch.context() as patched:
        patched.setattr(evaluation.Evaluator, "evaluate", broken)
        with pytest.raises(UserError, match="a stripe"):
            run(config, one_device())
    assert newest(config) == 6


def test_the_best_checkpoint_is_kept(log, tmp_path, monkeypatch):
    """Keeps the best and one other checkpoint; the results of evaluations are made up."""
    config = make_job(log, tmp_path / "run", max_to_keep=1)
    eval_ = dataclasses.replace(config.eval, every_steps=2, metric="mrr")
    config = dataclasses.replace(config, eval=eval_)
    values = {2: 0.1, 4: 0.3, 6: 0.2, 8: 0.3, 10: 0.1, 12: 0.2, 14: 0.1, 16: 0.2}
    steps = iter(values)

    def made_up(*_):
        found = {"eval/mrr": values[next(steps)], "eval/users": 9.0}
        kept = {int(path.name) for path in directory.iterdir() if path.name.isdecimal()}
        seen.append(kept)
        return evaluation.Evaluation(found, {})

    seen: list[set[int]] = []
    directory = tmp_path / "run" / "checkpoints"
    monkeypatch.setattr(evaluation.Evaluator, "evaluate", made_up)
    assert run(config, one_device()) == 0
    assert {int(path.name) for path in directory.iterdir()} == {4, 16}
    # While a step is evaluated, the best earlier one still exists.
    assert all(4 in kept for kept in seen[2:])


def test_signals_are_only_recorded_outside_at_once():
    with StopSignals() as stop:
        with stop.at_once():
            pass
        send(signal.SIGINT)
        assert stop.requested == "SIGINT"
        assert stop.unless_stopped(threading.Event().wait) is None
        with pytest.raises(Stopped), stop.at_once():
            raise AssertionError("not reached")


def test_a_signal_in_at_once_ends_a_wait():
    timer = threading.Timer(0.1, send)
    with StopSignals() as stop, pytest.raises(Stopped, match="SIGTERM"), stop.at_once():
        timer.run()


def test_errors_of_another_thread_are_raised_by_the_call():
    def work():
        raise UserError("a sentence")

    with StopSignals() as stop, pytest.raises(UserError, match="a sentence"):
        stop.unless_stopped(work)


def test_trains_outside_the_main_thread(log, tmp_path, capsys):
    config = job(log, tmp_path, train_steps=2)
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(run, config, one_device()).result() == 0
    assert "signals are not handled" in capsys.readouterr().err


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_the_process(second):
    program = """
import os, signal, time
from s2s_jax.signals import StopSignals
with StopSignals():
    os.kill(os.getpid(), signal.SIGTERM)
    print("first", flush=True)
    time.sleep(60)
"""
    with subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"PYTHONPATH": str(REPO)},
        text=True,
    ) as process:
        assert process.stdout.readline() == "first\n"
        process.send_signal(second)
        assert process.wait(30) == -second


@pytest.mark.parametrize("command", ["train", "evaluate", "recommend"])
def test_commands_answer_while_they_are_still_importing(command, tmp_path):
    """A module that is imported late reports when its import begins."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "class Tell:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'jax':\n"
        "            print('importing', flush=True)\n"
        "            import time; time.sleep(30)\n"
        "sys.meta_path.insert(0, Tell())\n"
    )
    with subprocess.Popen(
        [sys.executable, "-m", f"s2s_jax.{command}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": f"{tmp_path}:{REPO}"},
        text=True,
    ) as process:
        assert process.stdout.readline() == "importing\n"
        process.send_signal(signal.SIGTERM)
        output = process.communicate(timeout=30)[1]
    assert process.returncode == EXIT_STOPPED, output
    assert output == "stopped by SIGTERM before anything was done; start again\n"


COMMAND = """
import os, pickle, signal, sys, threading
import s2s_jax.cli.commands.{command} as command
from s2s_jax.cli.exit import run_command
from s2s_jax.ranking import candidates
config = pickle.load(open(sys.argv.pop(1), "rb"))
parse = command.parse_with_config
command.parse_with_config = lambda *arguments: (parse(*arguments)[0], config)
ranks = candidates.{name}
def interrupted(*arguments, **more):
    os.kill(os.getpid(), signal.SIGTERM)
    threading.Event().wait(20)
    return ranks(*arguments, **more)
candidates.{name} = interrupted
run_command(command.main)
"""


@pytest.mark.parametrize(
    ("command", "name"),
    [
        ("evaluate", "ranks_by_weight"),
        pytest.param("recommend", "top_k_by_weight", marks=pytest.mark.slow),
    ],
)
def test_evaluate_and_recommend_end_at_once(straight, log, tmp_path, command, name):
    (tmp_path / "config.pickle").write_bytes(pickle.dumps(straight))
    program = COMMAND.format(command=command, name=name)
    out = tmp_path / "out.parquet"
    arguments = {
        "evaluate": ["--out", str(out), "--split", "validation"],
        "recommend": ["--input", str(log), "--output", str(out)],
    }[command]
    config = ["--config", str(REPO / "configs" / "quickstart.py")]
    begun = time.monotonic()
    ended = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "config.pickle"), *config, *arguments],
        env=os.environ | {"PYTHONPATH": f"{HELPERS}:{REPO}"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ended.returncode == EXIT_STOPPED, ended.stderr
    assert "stopped by SIGTERM" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert not out.exists()
    assert time.monotonic() - begun < 100
