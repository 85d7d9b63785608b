"""The example for Airflow, with stand-ins for Airflow's decorators, which run a task at once."""

import importlib.util
import json
import os
import random
import signal
import sys
import threading
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pyarrow.parquet as pq
import pytest
from places import REPO
from server_process import until

from s2s_jax.cli import main as cli

DAY = "2026-11-28"
# Part of a script: half a minute, in which signals are handled at once.
SLEEPS = "for i in {1..600}; do sleep 0.05; done"


class Fails(Exception):
    """Airflow's exception for a task that is not tried again."""


class Task:
    """A task that runs when it is called."""

    def __init__(self, function):
        self.function = function

    def override(self, task_id):
        return self

    def __call__(self, *words):
        self.function(*(word.replace("{{ ds }}", DAY) for word in words))
        return self

    def __rshift__(self, after):
        return after


def task(function=None, **options):
    return Task if function is None else Task(function)


@pytest.fixture
def example(monkeypatch, tmp_path):
    """Loads the example with a directory; `every_day()` at its end is called only if `runs`."""

    def load(runs=False):
        sdk = ModuleType("airflow.sdk")
        dag = lambda **options: lambda function: function if runs else lambda: None  # noqa: E731
        sdk.dag, sdk.task = dag, task
        exceptions = SimpleNamespace(AirflowFailException=Fails)
        monkeypatch.setitem(sys.modules, "airflow", ModuleType("airflow"))
        monkeypatch.setitem(sys.modules, "airflow.sdk", sdk)
        monkeypatch.setitem(sys.modules, "airflow.sdk.exceptions", exceptions)
        monkeypatch.setenv("SHOP", str(tmp_path))
        spec = importlib.util.spec_from_file_location(
            "every_day", REPO / "examples" / "every_day.py"
        )
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture
def command(monkeypatch, tmp_path):
    """Puts a script in the place of `s2s`."""

    def write(script):
        path = tmp_path / "bin" / "s2s"
        path.parent.mkdir()
        path.write_text(f"#!/bin/bash\ncd {tmp_path}\n{script}\n")
        path.chmod(0o755)
        monkeypatch.setenv("PATH", f"{path.parent}:{os.environ['PATH']}")

    return write


@pytest.fixture
def of_airflow():
    """Airflow's own handler of SIGTERM, which does nothing for a task that is a function."""

    def handler(*_):
        pass

    before = signal.signal(signal.SIGTERM, handler)
    yield handler
    signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize(
    ("code", "raised"), [(0, None), (75, RuntimeError), (-15, RuntimeError), (2, Fails), (3, Fails)]
)
def test_only_what_can_go_on_is_tried_again(example, command, code, raised):
    module = example()
    command(f"exit {code}" if code >= 0 else f"kill {code} $$")
    if raised is None:
        module.s2s("train")
    else:
        with pytest.raises(raised, match=f"s2s train ended with {code}"):
            module.s2s("train")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGALRM])
def test_a_command_saves_when_its_task_is_stopped(example, command, of_airflow, tmp_path, number):
    """Airflow sends SIGTERM, perhaps twice, and its timeout of a task raises an exception."""

    def times_out(*_):
        raise TimeoutError("Airflow's timeout")

    def stop():
        until((tmp_path / "started").exists, 10)
        os.kill(os.getpid(), number)
        until((tmp_path / "told").exists, 10)
        if number == signal.SIGTERM:
            os.kill(os.getpid(), number)

    command("trap 'touch told; sleep 0.3; touch saved; exit 75' TERM; touch started; " + SLEEPS)
    module = example()
    before = signal.signal(signal.SIGALRM, times_out)
    stopping = threading.Thread(target=stop)
    stopping.start()
    try:
        with pytest.raises((RuntimeError, TimeoutError), match="Airflow"):
            module.s2s("train")
    finally:
        stopping.join()
        signal.signal(signal.SIGALRM, before)
    assert (tmp_path / "saved").exists()
    assert signal.getsignal(signal.SIGTERM) is of_airflow


def test_a_command_that_does_not_stop_is_killed(
    example, command, of_airflow, tmp_path, monkeypatch
):
    def stop():
        until((tmp_path / "started").exists, 10)
        os.kill(os.getpid(), signal.SIGTERM)

    command("trap '' TERM; echo $$ >number; touch started; " + SLEEPS)
    module = example()
    monkeypatch.setattr(module, "SAVING", 0.2)
    stopping = threading.Thread(target=stop)
    stopping.start()
    with pytest.raises(RuntimeError, match="Airflow stops the task"):
        module.s2s("train")
    stopping.join()
    assert not (Path("/proc") / (tmp_path / "number").read_text().strip()).exists()


def test_a_worse_model_is_not_exported(example, tmp_path):
    module = example()

    def measured(model, counted=0.1):
        path = tmp_path / "measured.json"
        metrics = {"eval/ndcg@10": model, "eval/neighbours/ndcg@10": counted}
        path.write_text(json.dumps({"metrics": metrics}))
        return str(path)

    module.check(measured(0.2))
    with pytest.raises(Fails, match=r"0\.0900, and 0\.1000 by counting"):
        module.check(measured(0.09))
    module.remember(measured(0.2))
    module.check(measured(0.19))
    with pytest.raises(Fails, match=r"0\.1500, and was 0\.2000"):
        module.check(measured(0.15))


@pytest.mark.slow
def test_a_day(example, tmp_path, monkeypatch):
    """From events to recommendations and an export, with the real commands."""
    # Commands compile as they do for users: much of this test is computing.
    monkeypatch.delenv("XLA_FLAGS")
    drawn = random.Random(1)
    lines = ["user_id,item_id,timestamp"]
    for user in range(300):
        # Every user goes on in steps of one size, which a model sees and counting does not.
        item, step = drawn.randrange(50), drawn.choice((1, 7, 12))
        for number in range(drawn.randrange(8, 20)):
            lines.append(f"{user},{item},{1_700_000_000 + 7 * user + 100 * number}")
            item = (item + step) % 50
    (tmp_path / "events").mkdir()
    (tmp_path / "events" / "events.csv").write_text("\n".join(lines) + "\n")
    log = str(tmp_path / "first")
    assert (
        cli.main(["convert", f"{tmp_path}/events", "--output", log, "--features", "item_id"]) == 0
    )
    config = f"{tmp_path}/config.py"
    assert cli.main(["init", log, "--output", config, "--budget_minutes", "1"]) == 0
    monkeypatch.setenv("PATH", f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}")
    example(runs=True)
    assert pq.read_table(tmp_path / "recommendations" / DAY).num_rows == 300
    assert json.loads((tmp_path / "export" / "current.json").read_text()) == {"version": 1}
    assert (tmp_path / "exported.json").exists()
    # The day after.
    example(runs=True)
    assert json.loads((tmp_path / "export" / "current.json").read_text()) == {"version": 2}
