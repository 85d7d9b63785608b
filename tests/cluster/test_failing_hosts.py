"""One of the hosts of a job cannot write or read."""

import pytest
import small
from several import finish, make_job, start

from s2s_jax.errors import EXIT_STOPPED, EXIT_USER_ERROR

USERS = 90
# One host can write no more files from the second save on.
FULL = """
if host == GUILTY:
    import resource
    from s2s_jax.runs.checkpoints.store import Checkpoints
    save = Checkpoints.save
    def limited(self, step, *rest):
        if step == 10:
            resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
        save(self, step, *rest)
    Checkpoints.save = limited
"""
# One host cannot read the eighth batch.
UNREADABLE = """
if host == 1:
    from s2s_jax.errors import UserError
    read, batches = t.Reader.__next__, []
    def until_8(self):
        batches.append(1)
        if len(batches) == 8:
            raise UserError("io.data_paths: part-1.orc cannot be read")
        return read(self)
    t.Reader.__next__ = until_8
"""


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    directory = tmp_path_factory.mktemp("log")
    small.write_log(directory, USERS)
    return directory


@pytest.mark.slow
@pytest.mark.parametrize("guilty", [0, 1])
def test_a_checkpoint_that_one_host_cannot_write_ends_all_soon(log, tmp_path, guilty):
    config = make_job(log, tmp_path / "run", train_steps=200, log_steps=200, save_steps=5)
    ended = finish(start(config, tmp_path, 2, 2, change=FULL.replace("GUILTY", str(guilty))))
    assert ended[guilty][0] == EXIT_USER_ERROR, ended
    failed = "the checkpoint of step 10 cannot be written (File too large)"
    assert failed in ended[guilty][1], ended
    assert "the newest complete one is of step 5;" in ended[guilty][1]
    assert ended[1 - guilty][0] == EXIT_STOPPED, ended
    assert not any("Traceback" in output for _, output in ended), ended


@pytest.mark.slow
def test_a_batch_that_one_host_cannot_read_loses_what_follows_the_newest_checkpoint(log, tmp_path):
    """As the page about exit codes says."""
    config = make_job(log, tmp_path / "run", save_steps=5)
    ended = finish(start(config, tmp_path, 2, 2, change=UNREADABLE))
    assert [code for code, _ in ended] == [EXIT_STOPPED, EXIT_USER_ERROR], ended
    assert "error: io.data_paths: part-1.orc cannot be read" in ended[1][1]
    assert not any("Traceback" in output for _, output in ended), ended
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["5"]
