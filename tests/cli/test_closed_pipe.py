"""A reader that closes stdout early (`s2s COMMAND | head -1`) loses no file that the command writes."""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import pyarrow as pa
import pytest
import small
from logs import write_log
from places import REPO

from s2s_jax.cli import main as front
from s2s_jax.cluster.mesh import make_mesh
from s2s_jax.config import EvalConfig, FeatureConfig, LastEvents
from s2s_jax.jobs.train import train


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A directory with a log, a run, and its config file."""
    directory = tmp_path_factory.mktemp("trained")
    types = {"user_id": pa.int64(), "item_id": pa.list_(pa.int64())}
    rows = [{"user_id": n, "item_id": [n % 20, n % 7, 5]} for n in range(40)]
    write_log(directory / "log" / "0.orc", rows, types)
    base = small.config()
    config = dataclasses.replace(
        base,
        io=dataclasses.replace(base.io, data_paths=str(directory / "log"), batch_size=8),
        features=(FeatureConfig(name="item_id", emb_dim=8, hash_bucket_size=30),),
        tables=(),
        model=dataclasses.replace(base.model, num_layers=1),
        loss=dataclasses.replace(base.loss, target_features=("item_id",)),
        train=dataclasses.replace(base.train, output_dir=str(directory / "run"), tensorboard=False),
        eval=EvalConfig(split=LastEvents(events=1), batch_size=16),
    )
    assert not train(config, make_mesh(jax.devices()[:1]))
    (directory / "config.py").write_text(
        "from pathlib import Path\nfrom s2s_jax.config import load_json\n\n\n"
        f"def get_config():\n"
        f"    return load_json(Path({str(directory / 'run' / 'config.json')!r}))\n"
    )
    return directory


@contextlib.contextmanager
def closed_stdout(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Makes stdout a pipe that nobody reads, which fails at the first line."""
    reading, writing = os.pipe()
    os.close(reading)
    stdout = os.fdopen(writing, "w", buffering=1)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stdout)
        yield
    with contextlib.suppress(BrokenPipeError):
        stdout.close()


def words_of(command: str, directory: Path, output: Path) -> list[str]:
    config = ["--config", str(directory / "config.py")]
    log, run = str(directory / "log"), str(directory / "run")
    first = {
        "evaluate": config,
        "recommend": [*config, "--input", log, "--top_k", "3"],
        "report": [run, "--users", "1"],
        "catalogue": config,
        "convert": [log],
        "synthesize": ["--users", "10", "--items", "80", "--files", "1"],
    }[command]
    return [command, *first, "--output", str(output)]


@pytest.mark.parametrize(
    "command",
    [
        pytest.param("evaluate", marks=pytest.mark.slow),
        "recommend",
        "report",
        "catalogue",
        "convert",
        "synthesize",
    ],
)
def test_the_file_is_there(command, trained, tmp_path, monkeypatch):
    # Recommendations are a directory unless their name says that they are a file.
    output = tmp_path / ("output.parquet" if command == "recommend" else "output")
    with closed_stdout(monkeypatch), pytest.raises(BrokenPipeError):
        front.main(words_of(command, trained, output))
    files = sorted(output.iterdir()) if output.is_dir() else [output]
    assert all(path.stat().st_size > 100 for path in files)
    assert files
    if command == "evaluate":
        assert "eval/hr@10" in json.loads(output.read_text())["metrics"]


def test_an_evaluation_that_cannot_be_saved_is_printed(trained, tmp_path, capsys):
    (tmp_path / "a_file").touch()
    with pytest.raises(Exception, match="cannot be written"):
        front.main(words_of("evaluate", trained, tmp_path / "a_file" / "output"))
    assert "hr@10" in capsys.readouterr().out


def test_tables_end_quietly_with_the_code_of_a_closed_pipe(trained):
    with subprocess.Popen(
        [sys.executable, "-m", "s2s_jax", "inspect", str(trained / "log")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(REPO)},
    ) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(timeout=60) == 128 + signal.SIGPIPE
