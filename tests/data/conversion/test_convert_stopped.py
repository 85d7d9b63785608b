"""Conversions that are stopped, killed or run out of space: nothing is lost or left behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from conversions import events, run, write_csv

from s2s_jax.data.conversion.convert import convert
from s2s_jax.data.conversion.settings import Settings
from s2s_jax.errors import UserError


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    """A source whose conversion takes seconds, most of them inside DuckDB."""
    path = tmp_path_factory.mktemp("large") / "a.parquet"
    rng = np.random.default_rng(0)
    count = 2_000_000
    ids = {name: rng.integers(0, 2**40, count) for name in ("user_id", "timestamp", "item_id")}
    pyarrow.parquet.write_table(pa.table(ids), path)
    return path


def start(source: Path, out: Path, *flags: str) -> subprocess.Popen:
    command = [
        sys.executable,
        "-m",
        "s2s_jax",
        "convert",
        str(source),
        "--out",
        str(out),
    ]
    return subprocess.Popen(
        [*command, "--features", "item_id", *flags], stderr=subprocess.PIPE, text=True
    )


def wait_for_sorting(process: subprocess.Popen, out: Path) -> None:
    while process.poll() is None and not list(out.glob(".sorting_*/*")):
        time.sleep(0.05)


@pytest.mark.parametrize(("number", "after"), [(signal.SIGTERM, 0.5), (signal.SIGINT, 0.0)])
def test_a_signal_leaves_nothing_behind(tmp_path, large, number, after):
    process = start(large, tmp_path / "log")
    wait_for_sorting(process, tmp_path / "log")
    time.sleep(after)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (75, f"stopped by {number.name}; start again\n")
    assert list(tmp_path.iterdir()) == []


def test_what_a_kill_leaves_is_removed_by_the_next_start(tmp_path, large):
    out, source = tmp_path / "log", write_csv(tmp_path / "a.csv", events(user_id=[1]))
    process = start(large, out)
    wait_for_sorting(process, out)
    with pytest.raises(UserError, match="another program is writing a log to"):
        convert(Settings(paths=(str(source),), output=out))
    assert list(out.glob(".sorting_*"))
    process.kill()
    process.communicate()
    (out / ".part-0.orc").touch()
    assert list(run(out, source)) == [1]


def test_what_a_kill_leaves_elsewhere_is_named(tmp_path, capsys):
    source = write_csv(tmp_path / "a.csv", events(user_id=[1]))
    (tmp_path / ".sorting_x").mkdir()
    run(tmp_path / "log", source, temp_dir=tmp_path)
    assert (
        f"{tmp_path}/.sorting_x belongs to a conversion that is running or was killed"
        in capsys.readouterr().err
    )


def test_a_signal_while_files_get_their_names(tmp_path, monkeypatch):
    source = write_csv(tmp_path / "a.csv", events(user_id=[1, 2, 3]))
    run(tmp_path / "log", source)
    rename = Path.rename

    def slow(path: Path, name: Path) -> Path:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.1)
        return rename(path, name)

    class Told(BaseException):
        pass

    def raise_it(*_: object) -> None:
        raise Told

    monkeypatch.setattr(Path, "rename", slow)
    before = signal.signal(signal.SIGTERM, raise_it)
    try:
        with pytest.raises(Told):
            run(tmp_path / "log", source, overwrite=True, events_per_file=3)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert [path.name for path in (tmp_path / "log").iterdir()] == ["part-0.orc"]


@pytest.fixture
def small_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)],
        check=False,
        capture_output=True,
    )
    if mounted.returncode:
        pytest.skip("only root can make a small disk")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("full", ["sorting", pytest.param("writing", marks=pytest.mark.slow)])
def test_a_full_disk_ends_in_a_sentence(tmp_path, large, small_disk, full):
    flags = ["--temp_dir", str(tmp_path)] if full == "writing" else []
    process = start(large, small_disk / "log", *flags)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 2, errors
    assert errors.startswith("error: ")
    assert errors.count("\n") == 1
    assert list(small_disk.iterdir()) == []
    assert list(tmp_path.iterdir()) == [small_disk]


@pytest.mark.parametrize("broken", [True, False])
def test_java_ends_although_its_answers_are_not_understood(broken):
    """A signal may leave the rest of an answer, which Spark's Python side takes for the next one."""
    start = pytest.importorskip("s2s_jax.data.conversion.spark.start", reason="PySpark is missing")
    calls = []
    java = SimpleNamespace(kill=lambda: calls.append("kill"), wait=lambda: calls.append("wait"))

    def stop():
        calls.append("stop")
        if broken:
            raise KeyError("p")

    context = SimpleNamespace(_gateway=SimpleNamespace(proc=java))
    start._end(SimpleNamespace(stop=stop, sparkContext=context))
    assert calls == (["stop", "kill", "wait"] if broken else ["stop"])

    def unpersist():
        raise KeyError("p")

    start.unpersist(SimpleNamespace(unpersist=unpersist))
