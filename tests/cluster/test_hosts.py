"""Jobs of several real processes: `jax.distributed` with CPU devices on this machine."""

import dataclasses
import errno
import os
import re
import signal
import threading
import time
import zlib
from pathlib import Path

import jax
import numpy as np
import pytest
import small
from jobs_of import assert_same_run, learned, wait_for_line
from several import finish, make_job, start, start_program

from s2s_jax.cluster import ending, hosts
from s2s_jax.cluster.joining import join
from s2s_jax.cluster.mesh import make_mesh
from s2s_jax.cluster.place import COORDINATOR, HOST, NUM_HOSTS
from s2s_jax.errors import EXIT_DONE, EXIT_STOPPED, EXIT_USER_ERROR, Stopped, UserError
from s2s_jax.jobs.train import train

USERS = 90

# Host 0 is still at work when the others wait for it. JAX's own wait at the end takes 4 s at most.
LEAVER = """
import os, sys, time
import jax
from s2s_jax.cli.exit import run_command
from s2s_jax.cluster.ending import ending_together, leave
from s2s_jax.cluster.joining import join
from s2s_jax.errors import UserError
connect = jax.distributed.initialize
jax.distributed.initialize = lambda *a, **k: connect(*a, **k, shutdown_timeout_seconds=4)
def main(arguments):
    join()
    with ending_together():
        if os.environ["S2S_JAX_HOST"] == "0":
            time.sleep(float(arguments[0]))
            if arguments[1] == "fail":
                raise UserError("--output: expected a directory")
        print("leaves", file=sys.stderr, flush=True)
    leave()
    return 0
run_command(main)
"""


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    directory = tmp_path_factory.mktemp("log")
    small.write_log(directory, USERS)
    return directory


@pytest.fixture(scope="module")
def straight(log, tmp_path_factory):
    """Two processes of two devices each."""
    directory = tmp_path_factory.mktemp("straight")
    config = make_job(log, directory / "run")
    ended = finish(start(config, directory, 2, 2))
    assert [code for code, _ in ended] == [EXIT_DONE, EXIT_DONE], ended
    assert "20 steps into" in ended[0][1]
    assert "steps into" not in ended[1][1]
    return config


def test_two_processes_train_as_one(straight, log, tmp_path):
    """2 processes x 2 devices and 1 x 4 differ only in the order in which devices' sums are added."""
    config = make_job(log, tmp_path / "one")
    assert not train(config, make_mesh(jax.devices()[:4]))
    two = learned(Path(straight.train.output_dir))
    np.testing.assert_allclose(learned(tmp_path / "one"), two, rtol=1e-5)


@pytest.mark.slow
def test_one_process_continues_what_two_began(straight, log, tmp_path):
    moved = tmp_path / "moved"
    first = make_job(log, moved, train_steps=13)
    # Without threads, batches are put on the devices where implicit transfers are refused.
    first = dataclasses.replace(first, io=dataclasses.replace(first.io, thread_num=0))
    ended = finish(start(first, tmp_path, 2, 2))
    assert [code for code, _ in ended] == [EXIT_DONE, EXIT_DONE], ended
    assert not train(make_job(log, moved), make_mesh(jax.devices()[:4]))
    two = learned(Path(straight.train.output_dir))
    np.testing.assert_allclose(learned(moved), two, rtol=1e-5)


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_after_the_same_step(straight, log, tmp_path):
    config = make_job(log, tmp_path / "run")
    processes = start(config, tmp_path, 2, 2, pause=0.2)
    wait_for_line(tmp_path / "run", 5)
    processes[1].send_signal(signal.SIGTERM)
    ended = finish(processes)
    assert [code for code, _ in ended] == [EXIT_STOPPED, EXIT_STOPPED], ended
    assert "stopped by a signal to another host" in ended[0][1]
    newest = max(int(p.name) for p in (tmp_path / "run" / "checkpoints").iterdir())
    assert 5 < newest < 20
    ended = finish(start(config, tmp_path, 2, 2))
    assert [code for code, _ in ended] == [EXIT_DONE, EXIT_DONE], ended
    assert f"continuing from the checkpoint of step {newest}" in ended[0][1]
    assert learned(tmp_path / "run") == learned(Path(straight.train.output_dir))
    assert_same_run(straight, config, step=20)


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_process_ends_the_others_and_the_job_continues(straight, log, tmp_path, killed):
    config = make_job(log, tmp_path / "run", save_steps=6)
    processes = start(config, tmp_path, 2, 2, pause=0.2)
    wait_for_line(tmp_path / "run", 10)
    processes[killed].kill()
    processes[killed].communicate()
    begin = time.monotonic()
    ((code, output),) = finish([processes[1 - killed]])
    assert time.monotonic() - begin < 120
    assert code != 0, output
    assert re.search("another host of the job is gone|coordination service", output), output
    ended = finish(start(config, tmp_path, 2, 2))
    assert [code for code, _ in ended] == [EXIT_DONE, EXIT_DONE], ended
    assert "continuing from the checkpoint of step 6" in ended[0][1]
    assert learned(tmp_path / "run") == learned(Path(straight.train.output_dir))


@pytest.mark.slow
def test_processes_with_other_files_are_refused(log, tmp_path):
    """The same relative path leads to different files on one of them."""
    small.write_log(tmp_path / "other", USERS, seed=3)
    for name, target in (("a", log), ("b", tmp_path / "other")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "log").symlink_to(target)
    config = make_job(Path("log"), tmp_path / "run")
    ended = finish(start(config, tmp_path, 2, 2, directories=(tmp_path / "a", tmp_path / "b")))
    assert EXIT_USER_ERROR in [code for code, _ in ended], ended
    assert any("io.data_paths: host 1 does not see the same" in output for _, output in ended), (
        ended
    )


@pytest.mark.slow
@pytest.mark.parametrize("guilty", [0, 1])
def test_an_early_mistake_on_one_host_ends_all_soon(log, tmp_path, guilty):
    """The log is missing on one host. The other host waits, and learns that the first one has ended."""
    for host, name in enumerate(("a", "b")):
        (tmp_path / name).mkdir()
        if host != guilty:
            (tmp_path / name / "log").symlink_to(log)
    config = make_job(Path("log"), tmp_path / "run")
    processes = start(config, tmp_path, 2, 2, directories=(tmp_path / "a", tmp_path / "b"))
    ended = finish(processes)
    assert ended[guilty][0] == EXIT_USER_ERROR, ended
    assert "error: io.data_paths: log does not exist" in ended[guilty][1]
    assert ended[1 - guilty][0] == EXIT_STOPPED, ended
    # It knows from the other's message, or from the end of its connections.
    words = f"host {guilty} of the job has ended|another host of the job is gone"
    assert re.search(words, ended[1 - guilty][1]), ended
    assert not any("Traceback" in output for _, output in ended), ended


@pytest.mark.slow
def test_a_host_that_is_done_waits_for_one_that_works_long():
    ended = finish(start_program([LEAVER, "12", "succeed"], 2, 1))
    assert [code for code, _ in ended] == [EXIT_DONE, EXIT_DONE], ended


@pytest.mark.slow
def test_a_host_that_is_done_ends_with_one_that_fails():
    ended = finish(start_program([LEAVER, "8", "fail"], 2, 1))
    assert [code for code, _ in ended] == [EXIT_USER_ERROR, EXIT_STOPPED], ended
    assert ended[0][1].splitlines()[-1] == "error: --output: expected a directory"
    assert "error: host 0 of the job has ended, and so does host 1" in ended[1][1]
    assert len(ended[1][1].splitlines()) == 2, ended


@pytest.mark.slow
def test_a_signal_ends_a_host_that_is_done_and_the_others():
    processes = start_program([LEAVER, "60", "succeed"], 2, 1)
    assert processes[1].stderr.readline() == "leaves\n"
    begin = time.monotonic()
    processes[1].send_signal(signal.SIGTERM)
    ended = finish(processes)
    assert time.monotonic() - begin < 30
    assert [code for code, _ in ended] == [EXIT_STOPPED, EXIT_STOPPED], ended
    assert ended[1][1] == "stopped by SIGTERM; start again\n"


def test_a_reader_of_stdout_who_wants_no_more_ends_a_host_silently(monkeypatch, capfd):
    def leave_process(code):
        raise SystemExit(code)

    monkeypatch.setattr(ending, "_ending", threading.Event())
    monkeypatch.setattr(ending, "_count", lambda: 2)
    monkeypatch.setattr(ending, "_notify_others", lambda: None)
    monkeypatch.setattr(os, "_exit", leave_process)
    with pytest.raises(SystemExit) as ended, ending.ending_together():
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")
    assert ended.value.code == 128 + signal.SIGPIPE
    assert capfd.readouterr().err == ""


def test_hosts_leave_what_they_do_together_before_the_same_item(monkeypatch):
    """The numbers of both hosts, this one and another one, are made up."""

    def of_all(*facts):
        return np.array([facts, other.pop(0)], np.uint32)

    monkeypatch.setattr(hosts, "_of_all", of_all)
    same = [zlib.crc32(str(item).encode()) for item in (1, 2)]
    other = [(0, same[0]), (0, same[1]), (0, 0)]
    assert list(hosts.in_lockstep([1, 2], lambda item: item)) == [1, 2]
    other = [(0, same[0]), (1, same[1])]
    items = hosts.in_lockstep([1, 2], lambda item: item)
    assert next(items) == 1
    with pytest.raises(Stopped, match="another host"):
        next(items)
    # One host could not read the item that the other host has next.
    other = [(0, same[0]), (0, 0)]
    with pytest.raises(UserError, match="host 1 reads other rows than host 0"):
        list(hosts.in_lockstep([1, 2], lambda item: item))


@pytest.mark.parametrize("size", [0, 1, 99, 100, 101, 250])
def test_what_one_host_makes_arrives_at_the_others_in_parts(monkeypatch, size):
    """What is sent is written down for host 0, and read by host 1."""
    sent = []
    made = {"text": "é" * size, "numbers": np.arange(size), "none": None}

    def as_host(number, send):
        monkeypatch.setattr(jax, "process_count", lambda: 2)
        monkeypatch.setattr(jax, "process_index", lambda: number)
        monkeypatch.setattr(hosts, "_sent", send)

    monkeypatch.setattr(hosts, "_SENT_BYTES", 100)
    as_host(0, lambda x: sent.append(x) or x)
    assert hosts.from_first(lambda: made) is made
    assert all(x.size <= 100 for x in sent)

    def receive(x):
        of_first = sent.pop(0)
        assert (x.shape, x.dtype) == (of_first.shape, of_first.dtype)
        return of_first

    as_host(1, receive)
    received = hosts.from_first(lambda: pytest.fail("only host 0 counts"))
    assert not sent
    assert received["text"] == made["text"]
    np.testing.assert_array_equal(received["numbers"], made["numbers"])


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({HOST: "0"}, [COORDINATOR]),
        ({HOST: "2", NUM_HOSTS: "2", COORDINATOR: "a:1"}, ["0 to 1", "2"]),
        (
            {HOST: "x", NUM_HOSTS: "2", COORDINATOR: "a:1"},
            ["whole number", "'x'"],
        ),
    ],
)
def test_an_incomplete_environment_is_refused(environment, words, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError) as caught:
        join()
    for word in words:
        assert word in str(caught.value)
