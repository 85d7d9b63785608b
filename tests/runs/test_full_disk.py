"""Full disks: real ones, of a few hundred kilobytes."""

import contextlib
import dataclasses
import json
import subprocess

import numpy as np
import of_config
import pyarrow as pa
import pytest
import small
from jobs_of import job, learned, lines, one_device

from s2s_jax.cli.exit import run_command
from s2s_jax.data.logs.index import Skipped
from s2s_jax.errors import EXIT_USER_ERROR, UserError
from s2s_jax.jobs import report
from s2s_jax.jobs.train import train
from s2s_jax.ranking.parts import Parts
from s2s_jax.runs import metrics_file
from s2s_jax.runs.skip_log import SkipLog
from s2s_jax.runs.writer import Writer
from s2s_jax.writing import replacing

USERS = 90


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    directory = tmp_path_factory.mktemp("log")
    small.write_log(directory, USERS)
    return directory


class Disk:
    """A separate file system."""

    def __init__(self, path):
        self.path = path

    def resize(self, size):
        command = ["mount", "-o", f"remount,size={size}", str(self.path)]
        subprocess.run(command, check=True, capture_output=True)

    def fill(self):
        """Fills all free space."""
        with contextlib.suppress(OSError), (self.path / "filler").open("ab", buffering=0) as file:
            while True:
                file.write(b"\0" * 4096)

    def free(self):
        (self.path / "filler").unlink()


@pytest.fixture
def disk(tmp_path):
    path = tmp_path / "disk"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(path)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("file systems cannot be mounted here")
    try:
        yield Disk(path)
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


def line(step, loss=1.0):
    return {"step": step, "loss": loss, "hit_rate": 0.5, "tokens_per_sec": 1.0}


def test_a_run_that_fills_the_disk_continues_from_its_last_complete_checkpoint(
    log, disk, tmp_path, capfd
):
    straight = job(log, tmp_path / "straight", train_steps=12, log_steps=1, save_steps=3)
    assert not train(straight, one_device())
    config = job(log, disk.path / "run", train_steps=12, log_steps=1, save_steps=3)
    disk.resize("300k")
    with pytest.raises(SystemExit) as caught:
        run_command(lambda _: train(config, one_device()))
    assert caught.value.code == EXIT_USER_ERROR
    errors = capfd.readouterr().err
    assert "cannot be written (No space left on device)" in errors
    assert "free space" in errors
    assert "Traceback" not in errors
    assert errors.count("error:") == 1
    whole = [int(path.name) for path in (disk.path / "run" / "checkpoints").iterdir()]
    assert 3 in whole
    disk.resize("8m")
    assert not train(config, one_device())
    assert f"continuing from the checkpoint of step {max(whole)}" in capfd.readouterr().err
    assert learned(disk.path / "run") == learned(tmp_path / "straight")


def write_until_full(writer):
    """Returns the step whose line could not be written."""
    step = 1
    full = r"metrics\.jsonl cannot be written \(No space left on device\)"
    with pytest.raises(UserError, match=full):  # noqa: PT012
        while step < 2000:
            step += 1
            writer.write(line(step))
    return step


def test_no_line_of_metrics_is_lost_or_torn(disk):
    run_dir = disk.path
    with Writer(run_dir, 0, 9, tensorboard=False) as writer:
        writer.write(line(1))
        disk.fill()
        step = write_until_full(writer)
        assert [x["step"] for x in writer.unwritten] == [step]
        assert [x["step"] for x in lines(run_dir)] == list(range(1, step))
        disk.free()
        writer.write(line(step + 1))
        assert writer.unwritten == []
    assert [x["step"] for x in lines(run_dir)] == list(range(1, step + 2))
    # Lines that were saved in a checkpoint are restored.
    with Writer(run_dir, step, 9, tensorboard=False, unwritten=[line(step)]):
        assert lines(run_dir) == [line(n) for n in range(1, step + 1)]


@pytest.mark.slow
def test_what_was_trained_is_saved_where_metrics_cannot_be_written(
    log, tmp_path, monkeypatch, capsys
):
    straight = job(log, tmp_path / "straight", train_steps=8, log_steps=1)
    assert not train(straight, one_device())
    config = job(log, tmp_path / "run", train_steps=8, log_steps=1)
    with monkeypatch.context() as patched:
        append = metrics_file._EndOnDisk.append

        def full(self, data):
            if b'"step": 5' in data:
                raise OSError(28, "No space left on device")
            append(self, data)

        patched.setattr(metrics_file._EndOnDisk, "append", full)
        with pytest.raises(UserError, match=r"metrics\.jsonl cannot be written"):
            train(config, one_device())
    assert [x["step"] for x in lines(tmp_path / "run")] == [1, 2, 3, 4]
    assert not train(config, one_device())
    assert "continuing from the checkpoint of step 6" in capsys.readouterr().err
    assert learned(tmp_path / "run") == learned(tmp_path / "straight")


def test_training_continues_without_tensorboard(disk, capsys):
    with Writer(disk.path, 0, 9, tensorboard=True) as writer:
        # Numbers take more space there than in metrics.jsonl, so its last block is full first.
        many = {f"n{number}": 0.5 for number in range(20)}
        writer.write(line(1) | many)
        disk.fill()
        for step in range(2, 10):
            writer.write(line(step) | many)
    errors = capsys.readouterr().err
    assert errors.count("TensorBoard's files cannot be written (No space left on device)") == 1
    assert len(lines(disk.path)) == step


def test_a_full_cache_makes_no_stripe_unreadable(log, disk, capsys):
    config = job(log, disk.path)
    io = dataclasses.replace(config.io, cache=str(disk.path / "cache"), on_error="skip_stripe")
    cached = dataclasses.replace(config, io=io)
    disk.resize("100k")

    def read(config):
        with contextlib.closing(of_config.reader(config, 8)) as reader:
            return [next(reader) for _ in range(reader.steps_per_epoch)]

    of_config.reader(cached, 8).close()
    disk.fill()
    for with_cache, without in zip(read(cached), read(config), strict=True):
        assert with_cache.skipped == ()
        assert with_cache.skipped_rows == 0
        for name, array in without.arrays.items():
            np.testing.assert_array_equal(with_cache.arrays[name], array)
    errors = capsys.readouterr().err
    assert errors.count("io.cache: ") == 1
    assert "No space left on device" in errors
    assert not list((disk.path / "cache").rglob("*.tmp"))


def test_other_files_end_in_a_sentence_and_leave_what_was_there(log, disk, tmp_path):
    (disk.path / "out").write_text("before")
    disk.fill()

    def evaluation():
        with replacing(disk.path / "out") as unfinished:
            unfinished.write_text("x" * 10_000)

    config = job(log, tmp_path)
    table = pa.table({"items": [[n] * 1000 for n in range(100)]})
    items = of_config.collect(config)
    for write in (
        evaluation,
        lambda: SkipLog(disk.path, [Skipped("a", 1, 2, "reason " * 1000)]),
        lambda: Parts(disk.path / "recs.parquet", {"a": "b" * 10_000}).write(0, table, {}),
        lambda: of_config.save(items, disk.path / "catalogue.parquet", config),
        lambda: report._write(disk.path / "report.html", "x" * 10_000),
    ):
        with pytest.raises(UserError, match=r"cannot be written.*No space left on device"):
            write()
    assert (disk.path / "out").read_text() == "before"
    names = {path.name for path in disk.path.iterdir()}
    assert not {name for name in names if "html" in name or "catalogue" in name}


@pytest.mark.parametrize("number", [28, 13, 30])
def test_errors_of_the_machine_are_explained_wherever_they_come_from(number, capsys):
    def main(_):
        raise OSError(number, "what the machine says", "/the/file")

    with pytest.raises(SystemExit) as caught:
        run_command(main)
    assert caught.value.code == EXIT_USER_ERROR
    assert capsys.readouterr().err.startswith("error: /the/file: what the machine says")


def test_metrics_of_a_run_whose_checkpoints_are_gone_are_kept(tmp_path, capsys):
    for number in (1, 2):
        with Writer(tmp_path, 0, 9, tensorboard=False) as writer:
            writer.write(line(number))
    assert "the old metrics.jsonl is now metrics.1.jsonl" in capsys.readouterr().err
    assert lines(tmp_path) == [line(2)]
    assert json.loads((tmp_path / "metrics.1.jsonl").read_text()) == line(1)
    with Writer(tmp_path, 2, 9, tensorboard=False):
        assert lines(tmp_path) == [line(2)]
