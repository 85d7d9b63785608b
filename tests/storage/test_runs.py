"""Runs that are in a store altogether; the commands are processes that write nothing else."""

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import urllib.request
from pathlib import Path

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import small
import stores
from jobs_of import job, lines
from places import HELPERS, REPO
from server_process import until

import s2s_serve
from s2s_jax.cluster.mesh import make_mesh
from s2s_jax.cluster.place import COORDINATOR, HOST, NUM_HOSTS
from s2s_jax.config import Config, LastEvents
from s2s_jax.errors import EXIT_DONE, EXIT_STOPPED, EXIT_USER_ERROR, UserError
from s2s_jax.jobs import recommend as recommending
from s2s_jax.jobs.evaluate import evaluate
from s2s_jax.jobs.train import train
from s2s_jax.library.run import Run
from s2s_jax.runs.checkpoints.files import complete_steps
from s2s_serve.storage import file_systems
from s2s_serve.storage.address import Place, place_of

pytestmark = pytest.mark.slow
TOP = f"s3://{stores.BUCKET}"
USERS, STEPS = 90, 20
# What the lock of a run says about a process of another machine.
KILLED = {
    "token": "a",
    "beat": 3,
    "host": "elsewhere",
    "process": 77,
    "place": "elsewhere b c",
    "started": "5",
}


def config_of(log: object, run_dir: object) -> Config:
    """With a growing table, held-out events and evaluations during training."""
    config = job(log, run_dir, train_steps=STEPS, log_steps=1, save_steps=6, tensorboard=True)
    changed = {"split": LastEvents(events=2), "every_steps": 10, "batch_size": 32}
    return dataclasses.replace(
        small.growing(config), eval=dataclasses.replace(config.eval, **changed)
    )


@pytest.fixture(scope="module")
def log(tmp_path_factory, server):
    """A log on a disk and in the store."""
    directory = tmp_path_factory.mktemp("log")
    small.write_log(directory, USERS)
    stores.upload(server, directory, "log")
    return directory


@pytest.fixture(scope="module")
def straight(log, tmp_path_factory) -> Path:
    """An uninterrupted run on a disk."""
    run_dir = tmp_path_factory.mktemp("straight") / "run"
    train(config_of(log, run_dir), make_mesh(jax.devices()[:1]))
    return run_dir


def learned(run_dir: Place) -> list[dict]:
    """What must not depend on interruptions, of all lines."""
    same = ("step", "loss", "hit_rate", "grad_norm")
    return [
        {name: x for name, x in line.items() if name in same or name.startswith("eval/")}
        for line in lines(run_dir)
    ]


class Machine:
    """Commands that find an empty directory, in which they may write nothing.

    Attributes:
      told: all that they printed.
    """

    def __init__(self, tmp_path: Path, endpoint: str):
        self.told = ""
        self._cwd, self._tmp, self._program = (tmp_path / n for n in ("cwd", "tmp", "program"))
        for directory in (self._cwd, self._tmp, self._program):
            directory.mkdir()
        self._cwd.chmod(0o555)
        # The configuration is part of the program. With PAUSE, steps take longer.
        self.config = self._program / "config.py"
        self.config.write_text(
            textwrap.dedent(
                f"""
                import os, sys, time
                sys.path.append({str(HELPERS)!r})
                sys.path.append({str(REPO / "tests/storage")!r})

                def get_config():
                    from s2s_jax.jobs import train
                    next_ = train.Reader.__next__
                    pause = float(os.environ["PAUSE"])
                    train.Reader.__next__ = lambda self: (time.sleep(pause), next_(self))[1]
                    from s2s_jax.storage import lock
                    # Longer than devices wait that never met, and shorter than 90 s.
                    lock._STALE = 45.0
                    from test_runs import config_of
                    return config_of("{TOP}/log", "{TOP}/run")
                """
            )
        )
        one = "--xla_force_host_platform_device_count=1"
        self._environment = os.environ | {
            "PYTHONPATH": str(REPO),
            "HOME": str(self._cwd),
            "TMPDIR": str(self._tmp),
            "XLA_FLAGS": os.environ["XLA_FLAGS"] + " " + one,
            "PYTHONDONTWRITEBYTECODE": "1",
            **stores.environment(endpoint),
        }

    def start(self, *words: object, pause: float = 0.0, place: dict[str, str] | None = None):
        return subprocess.Popen(
            [sys.executable, "-m", "s2s_jax", *map(str, words)],
            cwd=self._cwd,
            env=self._environment | {"PAUSE": str(pause)} | (place or {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *words: object, code: int = EXIT_DONE, pause: float = 0.0) -> str:
        """What a command printed; `code` is the exit code that it must have."""
        return self.end(self.start(*words, pause=pause), code)

    def end(self, process: subprocess.Popen, code: int) -> str:
        said, _ = process.communicate(timeout=200)
        self.told += said
        assert process.returncode == code, said
        assert "Traceback" not in said
        return said

    def wrote_nothing(self) -> bool:
        return not [*self._cwd.iterdir(), *self._tmp.iterdir()]


@pytest.fixture
def machine(tmp_path, proxy):
    return Machine(tmp_path, proxy.endpoint)


def stop_after_step(machine: Machine, step: int, number: signal.Signals, code: int) -> str:
    process = machine.start("train", "--config", machine.config, pause=0.3)
    said = ""
    assert process.stdout is not None
    for line in process.stdout:
        said += line
        if line.startswith(f"step {step}/"):
            break
    process.send_signal(number)
    return said + machine.end(process, code)


def test_everything_in_a_store(machine, proxy, server, straight, log, capfd):
    """A run is stopped, killed and continued while the store fails now and then, and then used."""
    proxy.failing, proxy.delay = 0.1, 0.005
    config = ["--config", machine.config]
    said = stop_after_step(machine, 4, signal.SIGTERM, EXIT_STOPPED)
    assert "start the same command again to continue" in said
    assert complete_steps(place_of(f"{TOP}/run"))[-1] in (4, 5, 6)
    stop_after_step(machine, 9, signal.SIGKILL, -signal.SIGKILL)
    said = machine.run("train", *config)
    assert "continuing from the checkpoint of step" in said
    run_dir = place_of(f"{TOP}/run")
    assert learned(run_dir) == learned(straight)
    assert machine.wrote_nothing()
    _evaluations_are_those_of_a_disk(machine, config, straight, log)
    _recommendations_are_those_of_a_disk(machine, config, straight, log)
    _an_export_answers(machine, config, straight, log)
    proxy.failing = proxy.delay = 0
    told = machine.told + "".join(capfd.readouterr())
    objects = stores.contents(server)
    assert "run/config.json" in objects
    for secret in (stores.KEY, stores.SECRET):
        assert secret not in told
        assert not [key for key, data in objects.items() if secret.encode() in data]
    assert machine.wrote_nothing()


def _evaluations_are_those_of_a_disk(machine: Machine, config: list, straight: Path, log: Path):
    machine.run("evaluate", *config)
    expected = evaluate(config_of(log, straight), mesh=make_mesh(jax.devices()[:1]))
    name = f"evaluation_test_{expected.step}.json"
    found = json.loads((place_of(f"{TOP}/run") / name).read_text())
    assert found["metrics"] == expected.evaluation.metrics
    said = machine.run("report", f"{TOP}/run")
    assert f"{TOP}/run/report.html" in said
    page = (place_of(f"{TOP}/run") / "report.html").read_text()
    assert "no users are shown" not in said
    assert name in page or f"step {expected.step}" in page
    machine.run("tables", f"{TOP}/run")
    run = Run(f"{TOP}/run", devices=jax.devices()[:1])
    local = Run(straight, data_paths=str(log), devices=jax.devices()[:1])
    assert run.steps == local.steps
    assert run.metrics()["loss"].equals(local.metrics()["loss"])
    history = {"item_id": [1, 2, 3], "behavior_id": [1, 1, 2], "tags": [[1], [2], [3]]}
    assert run.recommend([history], 5) == local.recommend([history], 5)


def _recommendations_are_those_of_a_disk(machine: Machine, config: list, straight: Path, log: Path):
    top = place_of(TOP)
    machine.run("catalogue", *config, "--output", top / "catalogue.parquet")
    recommend = ["recommend", *config, "--input", top / "log", "--top_k", 5]
    machine.run(*recommend, "--output", top / "recs.parquet")
    # Its items are without those of held-out events.
    machine.run(*recommend, "--output", top / "recs", "--catalogue", top / "catalogue.parquet")
    with file_systems.opened(top / "recs.parquet") as file:
        assert _answers(pq.read_table(file)).equals(_on_disk(straight, log, None))
    parts = []
    for path in (top / "recs").glob("part-*.parquet"):
        with file_systems.opened(path) as file:
            parts.append(_answers(pq.read_table(file)))
    expected = _on_disk(straight, log, f"{TOP}/catalogue.parquet")
    assert pa.concat_tables(parts).combine_chunks().equals(expected)
    assert len(expected) == USERS
    names = {path.name for path in (top / "recs").iterdir() if path.name[0] in "_."}
    assert names == {"_SUCCESS", "_manifest.json", "_made_for.json"}
    assert not list((top / "recs.parquet.parts").glob("*.parquet"))


def _answers(table: pa.Table) -> pa.Table:
    return table.select(["items", "scores"]).combine_chunks()


def _on_disk(straight: Path, log: Path, catalogue: str | None) -> pa.Table:
    local = straight.parent / "recs.parquet"
    request = recommending.Request(input=str(log), output=local, top_k=5, catalogue=catalogue)
    recommending.recommend(config_of(log, straight), request, make_mesh(jax.devices()[:1]))
    return _answers(pq.read_table(local))


def _an_export_answers(machine: Machine, config: list, straight: Path, log: Path):
    top = place_of(TOP)
    (top / "titles.csv").write_text("item,title\n" + "".join(f"{n},Item {n}\n" for n in range(300)))
    export = ["export", *config, "--output", top / "export"]
    said = machine.run(*export, "--titles", top / "titles.csv")
    assert f"{TOP}/export/versions/1" in said
    history = {"item_id": [1, 2, 3], "behavior_id": [1, 1, 2], "tags": [[1], [2], [3]]}
    model = s2s_serve.load(f"{TOP}/export")
    (answer,) = model.recommend([history], k=5)
    run = Run(straight, data_paths=str(log), devices=jax.devices()[:1])
    items, scores = run.recommend([history], 5)
    assert answer.items == items[0]
    np.testing.assert_allclose(answer.scores, scores[0], atol=1e-5)
    assert model.items["title"][0].as_py() == f"Item {model.items['item'][0]}"
    server = machine.start("serve", top / "export", "--port", 0, "--poll", 0.2)
    assert server.stdout is not None
    line = server.stdout.readline()
    assert f"version 1 of {TOP}/export answers at " in line, line
    url = line.split("answers at ")[1].strip()
    assert _asked(url, history) == {"version": 1, "items": items[0]}
    machine.run(*export, "--checkpoint", "newest")
    until(lambda: _asked(url, history)["version"] == 2, 60)
    server.send_signal(signal.SIGTERM)
    assert "version 2 answers now" in machine.end(server, EXIT_DONE)
    with pytest.raises(UserError, match=f"{TOP}/export/versions/7"):
        s2s_serve.load(f"{TOP}/export", version=7)


def _asked(url: str, history: dict) -> dict:
    body = json.dumps({"histories": [history], "k": 5}).encode()
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{url}/v1/recommend", body, headers)
    with urllib.request.urlopen(request, timeout=30) as answer:
        found = json.load(answer)
    return {"version": found["version"], "items": found["results"][0]["items"]}


def test_a_store_that_stays_away_ends_the_run_with_one_sentence(machine, proxy, straight):
    """What was saved before is continued."""
    process = machine.start(
        "train", "--config", machine.config, "--train.output_dir", f"{TOP}/away", pause=0.3
    )
    assert process.stdout is not None
    said = ""
    for line in process.stdout:
        said += line
        if line.startswith("step 8/"):
            break
    proxy.failing, proxy.kinds = 1.0, ("503", "cut")
    said += machine.end(process, EXIT_USER_ERROR)
    proxy.failing = 0
    (error,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert "s3://logs/away" in error or "s3://logs/log" in error
    assert complete_steps(place_of(f"{TOP}/away")) == [6]
    said = machine.run("train", "--config", machine.config, "--train.output_dir", f"{TOP}/away")
    assert "continuing from the checkpoint of step 6" in said
    assert learned(place_of(f"{TOP}/away")) == learned(straight)


def test_a_second_process_is_refused(machine):
    train = ["train", "--config", machine.config, "--train.output_dir", f"{TOP}/second"]
    first = machine.start(*train, pause=30)
    assert first.stdout is not None
    for line in first.stdout:
        if "steps into" in line:
            break
    said = machine.run(*train, code=EXIT_USER_ERROR)
    assert "another process is training in s3://logs/second" in said
    first.kill()
    first.communicate()


def test_two_processes_without_a_common_disk(tmp_path, proxy, straight):
    """Each writes its part of a checkpoint; two continue it after a kill, and then one."""
    machines = []
    for name in ("zero", "one"):
        (tmp_path / name).mkdir()
        machines.append(Machine(tmp_path / name, proxy.endpoint))
    run_dir = f"{TOP}/two"

    def run(number: int, *words: object) -> list[str]:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            coordinator = f"localhost:{free.getsockname()[1]}"
        started = [
            machine.start(
                *(words[0], "--config", machine.config, "--train.output_dir", run_dir),
                *("--io.batch_size", 8 // number, *words[1:]),
                place={COORDINATOR: coordinator, NUM_HOSTS: str(number), HOST: str(host)},
            )
            for host, machine in enumerate(machines[:number])
        ]
        return [
            machine.end(process, EXIT_DONE)
            for machine, process in zip(machines, started, strict=False)
        ]

    for step, number in ((6, 2), (12, 2), (STEPS, 1)):
        if step == 12:
            # Host 0 of before was killed, on another machine. Host 1 waits with the new one.
            (place_of(run_dir) / ".lock").write_text(json.dumps(KILLED))
        said = run(number, "train", "--train.train_steps", step)
        assert ("locked by process 77 of elsewhere" in said[0]) == (step == 12)
        assert ("continuing from" in said[0]) == (step > 6)
        assert complete_steps(place_of(run_dir))[-1] == step
    run(2, "evaluate", "--checkpoint", 12, "--output", f"{TOP}/two.json")
    of_two = json.loads(place_of(f"{TOP}/two.json").read_text())["metrics"]
    run(1, "evaluate", "--checkpoint", 12, "--output", f"{TOP}/one.json")
    of_one = json.loads(place_of(f"{TOP}/one.json").read_text())["metrics"]
    np.testing.assert_allclose(list(of_two.values()), list(of_one.values()), rtol=1e-5)
    files = [each.path for each in file_systems.files_below(place_of(f"{run_dir}/checkpoints/12"))]
    # The rows of a table that each process held.
    assert {"0.0", "1.0"} <= {path.name for path in files if path.parent.name[-7:] == "item_id"}
    assert {path.name for path in files if path.parent.name == "array_metadatas"} == {
        "process_0",
        "process_1",
    }
    # Runs that end at other steps are also evaluated at others.
    ours, theirs = (
        [(line["step"], line["loss"]) for line in lines(each) if "loss" in line]
        for each in (place_of(run_dir), straight)
    )
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)
    assert all(machine.wrote_nothing() for machine in machines)
