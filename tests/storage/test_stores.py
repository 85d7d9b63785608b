"""Logs in stores: found, read and trained on like those on a disk, from a real S3 server."""

import contextlib
import dataclasses
import errno
import json
import os
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pyarrow as pa
import pyarrow.orc
import pytest
import small
import stores
from jobs_of import job, learned

from s2s_jax.cluster.mesh import make_mesh
from s2s_jax.config import Config
from s2s_jax.config.settings import Logs
from s2s_jax.data.batching.reader import Reader
from s2s_jax.data.logs import orc, source
from s2s_jax.data.logs.files import find, split_names
from s2s_jax.data.logs.index import may_skip
from s2s_jax.errors import MachineError, UserError
from s2s_jax.jobs.checkpoint import from_torch, to_torch
from s2s_jax.jobs.train import train
from s2s_jax.runs.checkpoints.files import complete_steps
from s2s_jax.storage import lock
from s2s_serve.storage import file_systems
from s2s_serve.storage.address import StorePath, place_of


def write(path: Path, columns: dict, stripe_rows: int = 1000, compression: str = "zstd") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table(columns)
    # A stripe ends with each write.
    with pyarrow.orc.ORCWriter(
        str(path), compression=compression, stripe_size=1, batch_size=2**20
    ) as writer:
        for begin in range(0, len(table), stripe_rows):
            writer.write(table.slice(begin, stripe_rows))


def some_columns(rows: int, seed: int, names: int = 3) -> dict:
    rng = np.random.default_rng(seed)
    lists = [rng.integers(0, 10**9, rng.integers(0, 30)).tolist() for _ in range(rows)]
    return {f"column_{n}": lists for n in range(names)}


def test_files_are_found_as_on_a_disk(tmp_path, server, proxy):
    names = ["a/part-1.orc", "a/part-0.orc", "b.orc", "_temporary/x.orc", ".hidden.orc", "_SUCCESS"]
    for name in (*names, "a/notes.txt", "empty.orc"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"" if name == "empty.orc" else b"ORC")
    stores.upload(server, tmp_path, "found")
    here, there = find([str(tmp_path)]), find([f"s3://{stores.BUCKET}/found/"])

    def below(paths, top: str) -> list[str]:
        return [str(path).removeprefix(top) for path in paths]

    top, bucket = str(tmp_path), f"s3://{stores.BUCKET}/found"
    assert below(there.files, bucket) == below(here.files, top)
    assert len(there.files) == 4
    assert below(there.empty, bucket) == below(here.empty, top) == ["/empty.orc"]
    # A name that does not end in .orc is only looked into on a disk.
    assert set(below(there.left_out, bucket)) <= set(below(here.left_out, top))
    assert find([f"{bucket}/b.orc"]).files == [place_of(f"{bucket}/b.orc")]
    assert split_names(f"{bucket}/a,{top}/b.orc") == [f"{bucket}/a", f"{top}/b.orc"]
    with pytest.raises(UserError, match="does not exist"):
        find([f"{bucket}/none"])
    with pytest.raises(UserError, match="named twice"):
        find([bucket, f"{bucket}/b.orc"])


@pytest.mark.parametrize("compression", ["zstd", "uncompressed", "snappy"])
@pytest.mark.parametrize("columns", [1, 9])
def test_stripes_are_those_of_a_disk(tmp_path, server, proxy, compression, columns):
    write(tmp_path / "log" / "a.orc", some_columns(3000, columns, columns), compression=compression)
    key = f"stripes-{compression}-{columns}"
    stores.upload(server, tmp_path / "log", key)
    here = orc.read_footer(tmp_path / "log" / "a.orc")
    there = orc.read_footer(place_of(f"s3://{stores.BUCKET}/{key}/a.orc"))
    same = ("size", "schema", "stripe_rows", "positions", "fingerprint", "sample", "stripe_ranges")
    for name in same:
        assert getattr(here, name) == getattr(there, name), name
    assert there.version
    assert len(here.stripe_rows) > 1
    wanted = [f"column_{n}" for n in range(0, columns, 4)]
    for stripe in range(len(here.stripe_rows)):
        read = orc.read_stripe(there, stripe, wanted)
        assert read.equals(orc.read_stripe(here, stripe, wanted))


def test_a_stripe_takes_few_requests(tmp_path, server, proxy):
    """ORC's reader alone would ask for 128 KB at a time."""
    noise = np.random.default_rng(0).integers(0, 2**62, 400_000)
    lists = pa.ListArray.from_arrays(np.arange(0, 400_001, 100, np.int32), pa.array(noise))
    write(tmp_path / "log" / "a.orc", {"item_id": lists}, 10_000)
    stores.upload(server, tmp_path / "log", "large")
    file = orc.read_footer(place_of(f"s3://{stores.BUCKET}/large/a.orc"))
    assert file.size > 2**21
    before = proxy.requests
    assert orc.read_stripe(file, 0, ["item_id"]).num_rows == file.rows
    assert proxy.requests - before == 3


def test_a_file_that_changes_or_disappears_is_noticed(tmp_path, server, proxy):
    path = tmp_path / "log" / "a.orc"
    write(path, some_columns(50, 1))
    stores.upload(server, path.parent, "changing")
    file = orc.read_footer(place_of(f"s3://{stores.BUCKET}/changing/a.orc"))
    write(path, some_columns(50, 2))
    stores.upload(server, path.parent, "changing")
    with pytest.raises(MachineError, match="has changed since its footer was read"):
        orc.read_stripe(file, 0, ["column_0"])
    stores.file_system(server).delete_file(f"{stores.BUCKET}/changing/a.orc")
    with pytest.raises(MachineError, match="was removed"):
        orc.read_stripe(file, 0, ["column_0"])


@pytest.mark.parametrize("compression", ["uncompressed", "zstd"])
def test_a_file_that_changes_while_a_stripe_is_read_is_not_skipped(
    tmp_path, server, proxy, monkeypatch, compression
):
    """Its bytes may be those of another file, which may look like a stripe, or like a damaged one."""
    path, key = tmp_path / "log" / "a.orc", f"racing-{compression}"
    write(path, {"item_id": [[n, n + 1] for n in range(100, 150)]}, compression=compression)
    stores.upload(server, path.parent, key)
    file = orc.read_footer(place_of(f"s3://{stores.BUCKET}/{key}/a.orc"))
    write(path, {"item_id": [[n + 7, n] for n in range(100, 150)]}, compression=compression)

    def replaced_before(*args):
        stores.upload(server, path.parent, key)
        return fetch(*args)

    fetch = source.fetch
    monkeypatch.setattr(source, "fetch", replaced_before)
    with pytest.raises(MachineError, match="has changed since its footer was read") as caught:
        orc.read_stripe(file, 0, ["item_id"])
    skipping = Logs(paths=str(file.path.parent), skip_unreadable=True, threads=0)
    assert not may_skip(caught.value, skipping)


def test_a_store_that_does_not_answer_is_no_fault_of_its_files(
    tmp_path, server, proxy, monkeypatch
):
    """So nothing is skipped, whatever `io.on_error` says."""
    monkeypatch.setattr(file_systems, "_ATTEMPTS", 2)
    write(tmp_path / "log" / "a.orc", some_columns(50, 1))
    stores.upload(server, tmp_path / "log", "away")
    file = orc.read_footer(place_of(f"s3://{stores.BUCKET}/away/a.orc"))
    proxy.failing, proxy.kinds = 1.0, ("503", "cut")
    for work in (
        lambda: orc.read_stripe(file, 0, ["column_0"]),
        lambda: orc.read_footer(file.path),
        lambda: find([f"s3://{stores.BUCKET}/away"]),
    ):
        with pytest.raises(MachineError, match=r"s3://logs/away.*credentials") as caught:
            work()
        assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def log(tmp_path_factory, server):
    """A log on a disk and in the store."""
    directory = tmp_path_factory.mktemp("log")
    small.write_log(directory, 90)
    stores.upload(server, directory, "train")
    return directory


def test_a_run_is_the_same_from_a_store_that_fails_now_and_then(
    log, server, proxy, tmp_path, capfd, monkeypatch
):
    """It begins on a disk, and continues from the store; another one is in the store altogether.

    Nothing tells the credentials.
    """
    monkeypatch.setattr(lock, "_SETTLED", 0)
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    mesh = make_mesh(jax.devices()[:1])
    steps = {"train_steps": 12, "log_steps": 1, "save_steps": 6}
    straight = job(log, tmp_path / "straight", **steps)
    train(straight, mesh)
    proxy.failing, proxy.delay = 0.2, 0.01
    address = f"s3://{stores.BUCKET}/train"
    train(job(log, tmp_path / "moved", **steps | {"train_steps": 6}), mesh)
    train(job(address, tmp_path / "moved", **steps), mesh)
    # Saving takes many requests, and each that fails waits for a second or more.
    proxy.failing, proxy.delay = 0.03, 0
    run = f"s3://{stores.BUCKET}/run"
    train(job(address, run, **steps | {"train_steps": 7, "tensorboard": True}), mesh)
    saved = stores.contents(server, "run/checkpoints")
    assert {key.split("/")[2] for key in saved} == {"6", "7"}
    # What an interrupted save leaves is no checkpoint, and is removed.
    for key, data in saved.items():
        if key.startswith("run/checkpoints/6/") and "_CHECKPOINT_METADATA" not in key:
            place_of(f"s3://{stores.BUCKET}/{key.replace('/6/', '/9/', 1)}").write_bytes(data)
    train(job(address, run, **steps), mesh)
    assert proxy.faults > 3
    assert learned(tmp_path / "moved") == learned(tmp_path / "straight")
    assert learned(place_of(run)) == learned(tmp_path / "straight")
    in_store = stores.contents(server, "run")
    steps_there = {key.split("/")[2] for key in in_store if key.startswith("run/checkpoints/")}
    assert steps_there == {"6", "7", "12"}
    assert complete_steps(place_of(run)) == [6, 7, 12]
    assert any("tfevents" in key for key in in_store)
    assert "run/.lock" not in in_store
    told = "".join(capfd.readouterr())
    for secret in (stores.KEY, stores.SECRET):
        assert secret not in told
        for directory, _, names in os.walk(tmp_path):
            for name in names:
                assert secret.encode() not in (Path(directory) / name).read_bytes()
        assert all(secret.encode() not in data for data in in_store.values())
    config = json.loads(in_store["run/config.json"])
    assert (config["io"]["data_paths"], config["train"]["output_dir"]) == (address, run)
    assert not (tmp_path / "s3:").exists()
    assert list((tmp_path / "tmp").iterdir()) == []


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("s3://b/k/x.orc", StorePath("s3", "b", "k/x.orc")),
        ("S3://b", StorePath("s3", "b", "")),
        ("hdfs://node:8020/logs/", StorePath("hdfs", "node:8020", "logs")),
        ("hdfs:///logs", StorePath("hdfs", "", "logs")),
        ("file:///a%20b/c", Path("/a b/c")),
        ("s3/b", Path("s3/b")),
    ],
)
def test_places(text, place):
    assert place_of(text) == place


def test_a_file_of_another_machine_is_refused():
    for text in ("file://data/log", "file://node:80/log"):
        with pytest.raises(UserError, match=f"{text}: expected file:// and a path"):
            place_of(text)
    assert place_of("file://localhost/data/log") == Path("/data/log")


def test_an_address_reads_back():
    for text in ("s3://b/k", "hdfs:///logs/a", "gs://b"):
        assert str(place_of(text)) == text


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["gs", "hdfs"])
def test_a_run_is_the_same_in_other_stores(scheme, log, tmp_path, monkeypatch):
    """Google Cloud Storage is an emulator, HDFS a directory of this machine."""
    monkeypatch.setattr(lock, "_SETTLED", 0)
    mesh = make_mesh(jax.devices()[:1])
    steps = {"train_steps": 12, "log_steps": 1, "save_steps": 6}
    train(job(log, tmp_path / "straight", **steps), mesh)
    with contextlib.ExitStack() as running:
        if scheme == "gs":
            endpoint = running.enter_context(stores.gcs_server(tmp_path))
            monkeypatch.setenv("STORAGE_EMULATOR_HOST", endpoint)
            file_systems._connected.cache_clear()
            running.callback(file_systems._connected.cache_clear)
        else:
            (tmp_path / "hdfs").mkdir()
            stores.use_double_of_hdfs(tmp_path / "hdfs", monkeypatch)
        top = place_of(f"{scheme}://{stores.BUCKET}")
        for path in log.glob("*.orc"):
            file_systems.upload(path, top / "log" / path.name)
        for last in (7, 12):
            changes = {"train_steps": last, "profile_steps": (2, 3)}
            train(job(top / "log", top / "run", **steps | changes), mesh)
        assert learned(top / "run") == learned(tmp_path / "straight")
        assert complete_steps(top / "run") == [6, 7, 12]
        assert not (top / "run/.lock").exists()
        assert any((top / "run/profile/plugins/profile").iterdir())
        _weights_go_to_pytorch_and_back(top, job(log, tmp_path / "straight", **steps))


def _weights_go_to_pytorch_and_back(top: StorePath, config: Config) -> None:
    for run_dir in (top / "run", Path(config.train.output_dir)):
        to_torch(run_dir, run_dir / "weights.safetensors", "12")
    weights = (top / "run/weights.safetensors").read_bytes()
    assert weights == (Path(config.train.output_dir) / "weights.safetensors").read_bytes()
    settings = dataclasses.replace(config.train, output_dir=str(top / "imported"))
    imported = dataclasses.replace(config, train=settings)
    from_torch(top / "run/weights.safetensors", imported)
    assert complete_steps(top / "imported") == [0]
    to_torch(top / "imported", top / "again.safetensors", "0")
    assert (top / "again.safetensors").read_bytes() == weights


@pytest.mark.slow
def test_a_run_that_another_process_took_over_writes_nothing_more(
    log, server, proxy, tmp_path, monkeypatch
):
    """The file of the lock shows it at the next beat."""
    monkeypatch.setattr(lock, "_SETTLED", 0)
    monkeypatch.setattr(lock, "_BEAT", 0.02)
    run = place_of(f"s3://{stores.BUCKET}/taken")
    next_ = Reader.__next__

    def slowly(self):
        if complete_steps(run):
            owner = json.loads((run / ".lock").read_text())
            (run / ".lock").write_text(json.dumps(owner | {"token": "another"}))
            time.sleep(0.5)
        return next_(self)

    monkeypatch.setattr(Reader, "__next__", slowly)
    config = job(log, run, train_steps=40, log_steps=1, save_steps=5)
    with pytest.raises(UserError, match=f"another process is training in {run}.*took over"):
        train(config, make_mesh(jax.devices()[:1]))
    assert max(complete_steps(run)) < 40
    before = stores.contents(server, "taken")
    time.sleep(0.5)
    assert stores.contents(server, "taken") == before
    assert json.loads(before["taken/.lock"])["token"] == "another"
    steps = [json.loads(text)["step"] for text in before["taken/metrics.jsonl"].splitlines()]
    assert max(steps) <= max(complete_steps(run))


@pytest.mark.slow
def test_a_full_disk_for_copies_is_named(log, server, proxy, tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "_SETTLED", 0)
    run = place_of(f"s3://{stores.BUCKET}/full")
    mesh = make_mesh(jax.devices()[:1])
    train(job(log, run, train_steps=5, save_steps=5), mesh)

    def full(source, copy):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(file_systems, "download", full)
        with pytest.raises(UserError, match=r"checkpoints/5: cannot be copied to .*TMPDIR"):
            train(job(log, run, train_steps=9, save_steps=5), mesh)
    save = ocp.AsyncCheckpointer.save

    def without_space(self, directory, **arguments):
        save(self, directory, **arguments)
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(ocp.AsyncCheckpointer, "save", without_space)
        with pytest.raises(UserError, match=r"step 9 cannot be written.*of step 5; .*TMPDIR"):
            train(job(log, run, train_steps=9, save_steps=9), mesh)
    assert complete_steps(run) == [5]
