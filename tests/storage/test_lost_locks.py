"""Locks in a store: of commands that lost them, which write nothing that counts, and of stopped ones."""

import contextlib
import json
import os
import subprocess
import sys
import textwrap
import threading
from types import SimpleNamespace

import jax.numpy as jnp
import orbax.checkpoint as ocp
import pyarrow as pa
import pytest
import stores
from places import REPO

from s2s_jax.cluster import ending
from s2s_jax.errors import EXIT_STOPPED, UserError
from s2s_jax.exporting import version_dir
from s2s_jax.ranking.part_directory import PartDirectory, Share
from s2s_jax.ranking.parts import Parts
from s2s_jax.runs.checkpoints.in_store import StoreManager
from s2s_jax.storage import lock
from s2s_serve.storage import file_systems
from s2s_serve.storage.address import place_of

ROW = pa.table({"x": [1]})


@pytest.fixture
def top(proxy, request, monkeypatch):
    """A directory for each test, in which a lock is free at once."""
    monkeypatch.setattr(lock, "_SETTLED", 0.01)
    return place_of(f"s3://{stores.BUCKET}/lost/{request.node.name}")


def take_over(path):
    """Does what another command does after 90 s without a write."""
    owner = json.loads(path.read_text())
    path.write_text(json.dumps(owner | {"token": "of another", "place": "elsewhere"}))


def names_in(directory):
    return sorted(path.name for path in directory.iterdir())


def test_one_file_of_recommendations(top):
    with contextlib.closing(Parts(top / "recs.parquet", {})) as parts:
        parts.write(0, ROW, {"users": 1})
        take_over(top / "recs.parquet.parts" / ".lock")
        with pytest.raises(UserError, match=r"another process is writing .*it took over"):
            parts.write(1, ROW, {"users": 1})
        with pytest.raises(UserError, match=r"another process is writing .*it took over"):
            parts.join()
    assert names_in(top / "recs.parquet.parts") == [".lock", "00000000.parquet", "made_for.json"]
    assert not (top / "recs.parquet").exists()


def test_a_directory_of_recommendations(top):
    with contextlib.closing(PartDirectory(top, {}, [1, 1], Share(0, 1))) as parts:
        parts.write(0, ROW, {"users": 1})
        parts.write(1, ROW, {"users": 1})
        take_over(top / "_lock-0-of-1")
        (top / "part-000001.parquet").unlink()
        with pytest.raises(UserError, match=r"another process is host 0 of 1.*it took over"):
            parts.write(1, ROW, {"users": 1})
        assert parts.join() is None
        (top / "part-000001.parquet").write_bytes((top / "part-000000.parquet").read_bytes())
        with pytest.raises(UserError, match=r"another process is host 0 of 1.*it took over"):
            parts.join()
    assert not (top / "_SUCCESS").exists()


@pytest.mark.parametrize("when", ["copy_all", "upload"])
def test_an_export(top, monkeypatch, when):
    manifest = SimpleNamespace(version=1, to_json=lambda: "{}")
    work = getattr(file_systems, when)

    def slow(*given, **named):
        work(*given, **named)
        if when == "copy_all" or given[0].name == "manifest.json":
            take_over(top / "versions/.lock")

    monkeypatch.setattr(file_systems, when, slow)
    taken_over = r"another command writes a version in .*it took over"
    with version_dir.new_version(top) as new:
        (new.path / "items.parquet").write_bytes(b"items")
        with pytest.raises(UserError, match=taken_over):
            version_dir.finish(top, new, manifest)
    complete = ["items.parquet"] if when == "copy_all" else ["items.parquet", "manifest.json"]
    assert names_in(top / "versions/1") == complete
    assert not (top / "current.json").exists()


def test_a_checkpoint(top, monkeypatch):
    copy_all = file_systems.copy_all

    def slow(*given, **named):
        copy_all(*given, **named)
        take_over(top / ".lock")

    monkeypatch.setattr(file_systems, "copy_all", slow)
    with lock.held(top / ".lock", "in use") as held:
        manager = StoreManager(top, set, held.check)
        state = ocp.args.StandardSave({"weights": jnp.ones(3)})
        manager.save(3, ocp.args.Composite(state=state, progress=ocp.args.JsonSave({})))
        with pytest.raises(UserError, match="in use; it took over"):
            manager.wait_until_finished()
        manager.close()
    assert "state" in names_in(top / "checkpoints/3")
    assert "_CHECKPOINT_METADATA" not in names_in(top / "checkpoints/3")


def test_a_stopped_command_leaves_no_lock(top, server):
    """A signal abandons the thread that has the lock, as in `recommend` and `export`."""
    program = f"""
        import os, signal, time
        from s2s_jax import signals
        from s2s_jax.cli.exit import run_command
        from s2s_jax.errors import EXIT_STOPPED, Stopped
        from s2s_jax.storage import lock
        from s2s_serve.storage.address import place_of

        lock._SETTLED = 0.01

        def work():
            path = place_of("{top}/.lock")
            with lock.held(path, "in use"):
                print(path.is_file(), flush=True)
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(60)

        def main(argv):
            with signals.StopSignals() as stop:
                try:
                    with stop.at_once():
                        stop.unless_stopped(work)
                except Stopped:
                    return EXIT_STOPPED

        run_command(main)
    """
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        env=os.environ | {"PYTHONPATH": str(REPO)} | stores.environment(server),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (ended.returncode, ended.stdout) == (EXIT_STOPPED, "True\n"), ended.stderr
    assert not (top / ".lock").exists()


def test_a_process_that_ends_the_others_of_its_job_leaves_no_lock(top, monkeypatch):
    monkeypatch.setattr(ending, "_ending", threading.Event())
    monkeypatch.setattr(ending, "_count", lambda: 2)
    monkeypatch.setattr(ending, "_notify_others", lambda: None)
    left = []

    def at_the_end(code):
        left.append((top / ".lock").exists())
        raise SystemExit(code)

    monkeypatch.setattr(os, "_exit", at_the_end)
    with (
        pytest.raises(SystemExit, match="2"),
        lock.held(top / ".lock", "in use"),
        ending.ending_together(),
    ):
        raise UserError("a mistake")
    assert left == [False]
