"""Jobs of several processes on this machine."""

import dataclasses
import os
import pickle
import socket
import subprocess
import sys
import time
from pathlib import Path

import small
from jobs_of import job
from places import HELPERS, REPO

from s2s_jax.cluster.place import COORDINATOR, HOST, NUM_HOSTS
from s2s_jax.config import Config

RUNNER = """
import os, pickle, sys, time
import s2s_jax.jobs.train as t
from s2s_jax.cli.commands.train import run
from s2s_jax.cli.exit import run_command
from s2s_jax.cluster.ending import leave
from s2s_jax.cluster.joining import join
config, pause = pickle.load(open(sys.argv[1], "rb")), float(sys.argv[2])
host = int(os.environ["S2S_JAX_HOST"])
exec(sys.argv[3])
next_ = t.Reader.__next__
t.Reader.__next__ = lambda self: (time.sleep(pause), next_(self))[1]
def main(_):
    join()
    code = run(config)
    leave()
    return code
run_command(main)
"""


def start(
    config: Config,
    scratch: Path,
    count: int,
    devices: int,
    pause: float = 0.0,
    directories: tuple[Path, ...] = (),
    change: str = "",
) -> list[subprocess.Popen]:
    """Starts processes that train, 0 to `count` - 1; see `start_program`.

    Each first runs the code `change`, in which `host` is its number, and sleeps `pause` seconds before
    each batch.
    """
    path = scratch / f"config-{time.monotonic_ns()}.pickle"
    path.write_bytes(pickle.dumps(config))
    return start_program([RUNNER, str(path), str(pause), change], count, devices, directories)


def start_program(
    program: list[str], count: int, devices: int, directories: tuple[Path, ...] = ()
) -> list[subprocess.Popen]:
    """Starts processes 0 to `count` - 1, with `devices` devices each, in `directories` or this one.

    Args:
      program: Python code and its arguments.
      count: the number of processes.
      devices: the number of devices of each.
      directories: their working directories.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    processes = []
    for host in range(count):
        env = os.environ | {
            "PYTHONPATH": f"{HELPERS}:{REPO}",
            "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}",
            COORDINATOR: f"localhost:{port}",
            NUM_HOSTS: str(count),
            HOST: str(host),
        }
        command = [sys.executable, "-c", *program]
        processes.append(
            subprocess.Popen(
                command,
                env=env,
                cwd=directories[host] if directories else None,
                stderr=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                text=True,
            )
        )
    return processes


def finish(processes, timeout: float = 150) -> list[tuple[int, str]]:
    """Exit code and messages of each process."""
    deadline, ended = time.monotonic() + timeout, []
    try:
        for process in processes:
            _, output = process.communicate(timeout=max(deadline - time.monotonic(), 1))
            ended.append((process.returncode, output))
    finally:
        for process in processes:
            process.kill()
    return ended


def make_job(log: Path, run_dir: Path, devices: int = 4, **changes) -> Config:
    """A global batch of 8 rows, and a growing table whose items begin with counted neighbours."""
    config = job(log, run_dir, **{"train_steps": 20, "log_steps": 5, "save_steps": 10} | changes)
    config = small.growing(config, init="neighbours")
    return dataclasses.replace(config, io=dataclasses.replace(config.io, batch_size=8 // devices))
