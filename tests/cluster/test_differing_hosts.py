"""Hosts of a job that do not see the same run, or not yet."""

import threading
import time
from pathlib import Path

import pytest
import small
from several import finish, make_job, start

from s2s_jax.errors import EXIT_USER_ERROR
from s2s_jax.runs import shared_dir

USERS = 90


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    directory = tmp_path_factory.mktemp("log")
    small.write_log(directory, USERS)
    return directory


@pytest.mark.slow
def test_a_run_directory_of_each_host_is_refused(log, tmp_path):
    """The same relative path is another directory on each host."""
    directories = (tmp_path / "a", tmp_path / "b")
    for directory in directories:
        directory.mkdir()
    config = make_job(log, Path("run"))
    ended = finish(start(config, tmp_path, 2, 2, directories=directories))
    assert [code for code, _ in ended] == [EXIT_USER_ERROR, EXIT_USER_ERROR], ended
    for directory, (_, output) in zip(directories, ended, strict=True):
        assert "train.output_dir: expected the same directory on all hosts, but host 1" in output
        assert str(directory / "run") in output
        assert not [name for name in (directory / "run").iterdir() if name.name != ".lock"]


def test_a_file_system_may_show_the_file_of_another_host_late(tmp_path, monkeypatch):
    monkeypatch.setattr(shared_dir, "_LOOK", 0.05)
    path = tmp_path / "hosts"
    path.write_text("that of an earlier job")
    late = threading.Timer(0.3, lambda: path.write_text("token"))
    late.start()
    assert shared_dir._found(path, "token") == "token"
    late.join()
    monkeypatch.setattr(shared_dir, "_SEEN_AFTER", 0.1)
    begun = time.monotonic()
    assert shared_dir._found(path, "other") != "other"
    path.unlink()
    assert shared_dir._found(path, "other") != "other"
    assert time.monotonic() - begun < 2
