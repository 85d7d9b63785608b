"""Files of stores, as `StorePath` reads and writes them: S3, Google Cloud Storage, a double of HDFS."""

import gc
import json
import os
import subprocess
import sys
import tempfile
import threading
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import stores

from s2s_jax.errors import MachineError, UserError
from s2s_jax.runs.metrics_file import MetricsFile, read_lines
from s2s_jax.storage import lock
from s2s_jax.writing import append_text, replacing
from s2s_serve.storage import file_systems, scratch
from s2s_serve.storage.address import StorePath, place_of


@pytest.fixture(params=["s3", "gs", "hdfs"])
def top(request, tmp_path, monkeypatch) -> StorePath:
    """An empty directory of a store."""
    if request.param == "s3":
        request.getfixturevalue("proxy")
        return place_of(f"s3://{stores.BUCKET}/{tmp_path.name}")
    if request.param == "gs":
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", request.getfixturevalue("emulator"))
        return place_of(f"gs://{stores.BUCKET}/{tmp_path.name}")
    (tmp_path / "hdfs").mkdir()
    stores.use_double_of_hdfs(tmp_path / "hdfs", monkeypatch)
    return place_of("hdfs://node:8020/user/runs")


def test_files_are_written_listed_and_removed(top):
    assert not top.exists()
    assert list(top.iterdir()) == []
    (top / "b.txt").write_text("é")
    (top / "a/c.bin").write_bytes(b"")
    (top / "b.txt").write_text("newer")
    assert (top / "b.txt").read_text() == "newer"
    assert (top / "a/c.bin").read_bytes() == b""
    assert list(top.iterdir()) == [top / "a", top / "b.txt"]
    assert list(top.glob("*.txt")) == [top / "b.txt"]
    assert (top.is_dir(), top.is_file(), (top / "b.txt").is_file()) == (True, False, True)
    assert (top / "a/c.bin").parent.parent == top
    assert (top / "b.txt").with_name("d.json") == top / "d.json"
    (top / "b.txt").unlink()
    with pytest.raises(FileNotFoundError):
        (top / "b.txt").read_text()
    with pytest.raises(FileNotFoundError):
        (top / "b.txt").unlink()
    (top / "b.txt").unlink(missing_ok=True)
    file_systems.remove_below(top / "a")
    file_systems.remove_below(top / "never")
    assert file_systems.files_below(top) in ([], None)


def test_a_directory_is_copied_there_and_back(top, tmp_path):
    large = os.urandom(2**24 + 5)
    files = {
        "x/one": b"1",
        "x/y/large": large,
        "none": b"",
        "x/a.json.gz": b"zipped",
        "b.zst": b"b",
    }
    for name, data in files.items():
        (tmp_path / "from" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "from" / name).write_bytes(data)
    there = [(tmp_path / "from" / name, top / name) for name in files]
    file_systems.copy_all(there, to_store=True)
    back = [(tmp_path / "to" / name, top / name) for name in files]
    file_systems.copy_all(back, to_store=False)
    assert {name: (tmp_path / "to" / name).read_bytes() for name in files} == files


def test_a_file_is_replaced_whole_or_not_at_all(top):
    (top / "config.json").write_text("old")
    with pytest.raises(KeyError), replacing(top / "config.json") as unfinished:  # noqa: PT012
        unfinished.write_text("half")
        raise KeyError
    assert (top / "config.json").read_text() == "old"
    with replacing(top / "config.json") as unfinished:
        unfinished.write_text("new")
    assert (top / "config.json").read_text() == "new"
    append_text(top / "skipped.jsonl", "a\n")
    append_text(top / "skipped.jsonl", "b\n")
    assert (top / "skipped.jsonl").read_text() == "a\nb\n"


@pytest.mark.parametrize(
    ("size", "stop"), [(5, KeyboardInterrupt), (5, OSError), (2**23, KeyboardInterrupt)]
)
def test_an_interrupted_upload_leaves_the_old_file(top, size, stop):
    (top / "weights.bin").write_bytes(b"old")

    def blocks():
        yield b"n" * size
        yield b"n" * size
        raise stop

    with pytest.raises((stop, MachineError)):
        file_systems._write(top / "weights.bin", blocks())
    gc.collect()
    assert (top / "weights.bin").read_bytes() == b"old"
    assert [path.name for path in top.iterdir()] == ["weights.bin"]


class LosingSystem:
    """A store that forgets the last megabyte of a file."""

    def __init__(self, disk):
        self.disk = disk

    def __getattr__(self, name):
        return getattr(self.disk, name)

    def open_output_stream(self, path, compression):
        file = self.disk.open_output_stream(path, compression)

        class Stream:
            written = 0

            def write(self, data):
                self.written += len(data)
                file.write(data)

            def close(self):
                file.close()
                os.truncate(os.path.join(place, path.lstrip("/")), self.written - 2**20)

        place = self.disk.base_path
        return Stream()


@pytest.mark.parametrize("address", ["s3://logs/weights.bin", "hdfs://node/weights.bin"])
def test_what_arrived_is_compared_with_what_was_sent(address, tmp_path, monkeypatch):
    (tmp_path / "logs").mkdir()
    stores.use_double_of_hdfs(tmp_path, monkeypatch)
    losing = LosingSystem(file_systems._connected("", ""))
    monkeypatch.setattr(file_systems, "_connected", lambda scheme, authority: losing)
    expected = f"9,437,184 bytes were sent, but it has {2**23:,}"
    with pytest.raises(MachineError, match=expected):
        place_of(address).write_bytes(b"n" * (2**23 + 2**20))


def test_a_stop_while_hdfs_replaces_a_file_loses_nothing(tmp_path, monkeypatch):
    stores.use_double_of_hdfs(tmp_path, monkeypatch)
    disk = file_systems._connected("", "")
    path = place_of("hdfs://node/run/.lock")
    for stopped in ("delete_file", "move"):
        path.write_text("old")

        class Stopping:
            armed = True

            def __getattr__(self, name):
                def stop(*args):
                    getattr(disk, name)(*args)
                    if name == stopped and self.armed:  # noqa: B023
                        self.armed = False
                        raise KeyboardInterrupt

                return stop if name in ("delete_file", "move") else getattr(disk, name)

        double = Stopping()
        with monkeypatch.context() as patch:
            patch.setattr(file_systems, "_connected", lambda *_: double)  # noqa: B023
            with pytest.raises(KeyboardInterrupt):
                path.write_text("new")
        assert path.read_text() == "new"
        assert [each.name for each in path.parent.iterdir()] == [".lock"]


def test_a_store_that_stays_away_is_named_and_no_secret_is(proxy, monkeypatch):
    monkeypatch.setattr(file_systems, "_ATTEMPTS", 2)
    proxy.failing, proxy.kinds = 1.0, ("503", "cut")
    path = place_of(f"s3://{stores.BUCKET}/away/a.txt")
    for work, verb in (
        (path.read_text, "give"),
        (lambda: path.write_text("x"), "take"),
        (path.exists, "give"),
        (lambda: path.unlink(missing_ok=True), "remove"),
    ):
        with pytest.raises(MachineError, match=rf"{path}: the store does not {verb} it") as caught:
            work()
        assert "\n" not in str(caught.value)
    told = file_systems.unreachable("s3://b", OSError(f"key {stores.KEY}, {stores.SECRET}"))
    assert stores.KEY not in str(told)
    assert stores.SECRET not in str(told)


@pytest.mark.parametrize("read", [pq.read_table, pq.read_metadata])
def test_a_store_that_stays_away_while_arrow_reads_is_named(proxy, monkeypatch, tmp_path, read):
    monkeypatch.setattr(file_systems, "_ATTEMPTS", 2)
    proxy.kinds = ("503",)
    pq.write_table(pa.table({"x": list(range(99))}), tmp_path / "a.parquet")
    path = place_of(f"s3://{stores.BUCKET}/away/a.parquet")
    file_systems.upload(tmp_path / "a.parquet", path)
    with file_systems.opened(path) as source:
        assert read(source).num_rows == 99
    away = pytest.raises(MachineError, match=rf"{path}: the store does not give it .*503")
    with file_systems.opened(path) as source:
        proxy.failing = 1.0
        with away:
            read(source)
    with away, file_systems.opened(path):
        pass
    proxy.failing = 0.0
    with pytest.raises(FileNotFoundError), file_systems.opened(path.parent / "never"):
        pass
    # What Arrow cannot make sense of is no fault of the store.
    path.write_bytes(b"PAR1 and something else")
    with pytest.raises(pa.ArrowInvalid), file_systems.opened(path) as source:
        read(source)


def line(step: int, **values: float) -> dict[str, float]:
    return {"step": step, "loss": 1 / (step + 1)} | values


def test_lines_of_metrics_wait_and_are_never_lost(top, monkeypatch):
    """The rest is saved with the checkpoint, and written by the process that continues."""
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    file = MetricsFile(top, 0)
    for step in (1, 2):
        file.write(line(step))
    assert read_lines(top) == []
    assert file.unwritten == [line(1), line(2)]
    now[0] += 31
    file.write(line(3))
    assert read_lines(top) == [line(1), line(2), line(3)]
    file.write(line(4))
    file.write({"step": 4, "eval/hr@10": 0.5})
    assert file.unwritten == []
    file.write(line(5))
    file.write(line(6))
    # The process is killed here; the checkpoint of step 5 has its line.
    again = MetricsFile(top, 5, [line(5)])
    steps = [each["step"] for each in read_lines(top)]
    assert steps == [1, 2, 3, 4, 4, 5]
    again.write(line(6))
    again.close()
    assert [each["step"] for each in read_lines(top)] == [*steps, 6]


def test_a_lock_is_had_by_one_process_and_taken_over_when_that_is_gone(top, monkeypatch, capsys):
    monkeypatch.setattr(lock, "_BEAT", 0.05)
    monkeypatch.setattr(lock, "_STALE", 20)
    monkeypatch.setattr(lock, "_LOOK", 0.1)
    monkeypatch.setattr(lock, "_SETTLED", 0.01)
    monkeypatch.setattr(lock, "_REPLACED", 0.05)
    path = top / ".lock"
    with lock.held(path, "in use") as held:
        with held._asking:
            began = json.loads(path.read_text())
        with pytest.raises(UserError, match="in use"), lock.held(path, "in use"):
            pass
        with held._asking:
            assert json.loads(path.read_text())["token"] == began["token"]
        held.check()
        # Another process takes over, between two writes.
        other = began | {"token": "other", "host": "elsewhere", "place": "x"}
        with held._asking:
            path.write_text(json.dumps(other))
        held._thread.join(10)
        with pytest.raises(UserError, match="took over"):
            held.check()
    # Its file is left alone. Its owner does not write any more, so it is gone.
    assert json.loads(path.read_text())["token"] == "other"
    monkeypatch.setattr(lock, "_STALE", 0.6)
    begun = time.monotonic()
    with lock.held(path, "in use"):
        assert time.monotonic() - begun >= 0.6
    assert "elsewhere" in capsys.readouterr().err
    assert not path.exists()


@pytest.mark.parametrize("begins_at", [1, 2])
def test_a_lock_of_hdfs_that_is_away_for_a_moment_is_no_free_one(tmp_path, monkeypatch, begins_at):
    """Its owner writes it again just now: it has removed the old one, and moves the new one there."""
    stores.use_double_of_hdfs(tmp_path, monkeypatch)
    for name, seconds in (("_LOOK", 0.01), ("_SETTLED", 0.01), ("_REPLACED", 0.2)):
        monkeypatch.setattr(lock, name, seconds)
    path = place_of("hdfs://node/run/.lock")
    owner = {"token": "t", "beat": 3, "host": "h", "process": 1, "place": "x", "started": "1"}
    path.write_text(json.dumps(owner))
    read, reads = file_systems.read, []

    def reading(asked):
        reads.append(asked)
        if len(reads) == begins_at:
            (tmp_path / "run/.lock").unlink()
            again = (path, json.dumps(owner | {"beat": 4}).encode())
            threading.Timer(0.05, file_systems.write, again).start()
        return read(asked)

    monkeypatch.setattr(file_systems, "read", reading)
    later = (path, json.dumps(owner | {"beat": 5}).encode())
    beats = threading.Timer(0.4, file_systems.write, later)
    beats.start()
    with pytest.raises(UserError, match="in use"), lock.held(path, "in use"):
        pass
    beats.join()
    assert json.loads((tmp_path / "run/.lock").read_text())["token"] == "t"


def test_a_process_that_was_paused_finds_that_its_lock_is_lost_when_it_looks(top, monkeypatch):
    monkeypatch.setattr(lock, "_SETTLED", 0.01)
    path = top / ".lock"
    with lock.held(path, "in use") as held:
        held.check(fresh=True)
        began = json.loads(path.read_text())
        path.write_text(json.dumps(began | {"token": "other"}))
        held.check()
        with pytest.raises(UserError, match="took over"):
            held.check(fresh=True)
        with pytest.raises(UserError, match="took over"):
            held.check()
    assert json.loads(path.read_text())["token"] == "other"


def test_a_lock_of_an_ended_process_of_this_machine_is_free_at_once(top, monkeypatch):
    monkeypatch.setattr(lock, "_SETTLED", 0.01)
    ended = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    owner = {"token": "t", "beat": 3, "host": "h", "process": ended.pid, "place": lock._place()}
    owner["started"] = lock._started(ended.pid)
    assert not lock._is_gone(lock._Owner(**owner))
    ended.communicate(b"\n")
    (top / ".lock").write_text(json.dumps(owner))
    with lock.held(top / ".lock", "in use"):
        pass


def test_waiting_for_a_lock_ends_with_a_stop(top):
    owner = {"token": "t", "beat": 3, "host": "h", "process": 1, "place": "x", "started": "1"}
    (top / ".lock").write_text(json.dumps(owner))

    def stop() -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError), lock.held(top / ".lock", "in use", stop):
        pass
    assert json.loads((top / ".lock").read_text()) == owner


def test_temporary_directories_end_with_their_process(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    code = (
        "import os, tempfile\n"
        f"tempfile.tempdir = {str(tmp_path)!r}\n"
        "from s2s_serve.storage.scratch import Scratch\n"
        "made = Scratch()\n"
        "print(made.path, flush=True)\n"
        "os._exit(1)\n"
    )
    killed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert os.path.exists(killed.stdout.strip())
    here = scratch.Scratch()
    assert set(os.listdir(tmp_path)) == {here.path.name, f"{here.path.name}.lock"}
    assert scratch.Scratch().path != here.path
    # What a process left that was killed while it removed its directory.
    (tmp_path / f"{scratch._PREFIX}x.lock").touch()
    assert here.path != scratch.Scratch().path
    assert set(os.listdir(tmp_path)) == {here.path.name, f"{here.path.name}.lock"}
    del here
    assert os.listdir(tmp_path) == []


def test_many_threads_write_different_files(proxy):
    proxy.failing, proxy.kinds = 0.2, ("503", "cut")
    top = place_of(f"s3://{stores.BUCKET}/threads")
    threads = [threading.Thread(target=(top / f"{n}").write_text, args=(str(n),)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [path.read_text() for path in top.iterdir()] == [str(n) for n in range(8)]
