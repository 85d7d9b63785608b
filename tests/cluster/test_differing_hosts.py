"""Hosts of a job that do not see the same run, or not yet."""

import shutil
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import small
from jobs_of import learned
from several import finish, make_job, start

from s2s_jax.cluster import hosts
from s2s_jax.cluster.mesh import make_mesh
from s2s_jax.errors import EXIT_DONE, EXIT_USER_ERROR, MachineError, UserError
from s2s_jax.jobs.train import train
from s2s_jax.ranking.restored import find
from s2s_jax.runs import shared_dir
from s2s_jax.runs.checkpoints import store
from s2s_jax.runs.checkpoints.store import Checkpoints

USERS = 90
# Host 1 sees an old list of checkpoints at its first three looks.
STALE = """
if host == 1:
    from orbax.checkpoint import CheckpointManager
    load, looks = CheckpointManager._load_checkpoint_infos, []
    def stale(*arguments, **options):
        looks.append(1)
        return load(*arguments, **options)[: -1 if len(looks) <= 3 else None]
    CheckpointManager._load_checkpoint_infos = stale
"""


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


@pytest.mark.slow
def test_all_hosts_continue_from_the_same_checkpoint_even_if_one_sees_it_late(
    log, tmp_path, monkeypatch
):
    mesh = make_mesh(jax.devices()[:4])
    train(make_job(log, tmp_path / "one", train_steps=10, save_steps=5), mesh)
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    train(make_job(log, tmp_path / "one", save_steps=5), mesh)
    config = make_job(log, tmp_path / "two", save_steps=5)
    ended = finish(start(config, tmp_path, 2, 2, change=STALE))
    assert [code for code, _ in ended] == [EXIT_DONE, EXIT_DONE], ended
    assert "continuing from the checkpoint of step 10" in ended[0][1]
    np.testing.assert_allclose(learned(tmp_path / "one"), learned(tmp_path / "two"), rtol=1e-5)
    # A host that evaluates takes the checkpoint that host 0 chooses.
    assert find(config, "newest").step == 20
    made_by_host_0 = [15, None]
    monkeypatch.setattr(hosts, "from_first", lambda _: made_by_host_0.pop(0))
    assert find(config, "newest").step == 15


@pytest.mark.parametrize(("read_only", "error"), [(False, MachineError), (True, UserError)])
def test_hosts_that_see_other_checkpoints_end(tmp_path, monkeypatch, read_only, error):
    monkeypatch.setattr(store, "_LOOK", 0.01)
    (tmp_path / "checkpoints" / "20").mkdir(parents=True)
    told = []
    monkeypatch.setattr(hosts, "first_other", lambda fact: told.append(fact) or 1)
    with pytest.raises(UserError, match=r"host 1 sees other .*\(host 0 sees 20\)") as caught:
        Checkpoints(tmp_path, None, read_only)
    assert type(caught.value) is error
    assert len(told) > 5
    assert set(told) == {"[20]"}
