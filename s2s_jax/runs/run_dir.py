"""A run's directory: its `config.json`, and the lock that lets only one process train in it."""

import contextlib
import fcntl
from collections.abc import Callable, Iterator
from pathlib import Path

from s2s_jax.cluster import hosts
from s2s_jax.config import Config, refuse_addresses
from s2s_jax.errors import UserError
from s2s_jax.storage import lock
from s2s_jax.writing import replacing
from s2s_serve.storage.address import Place, StorePath


@contextlib.contextmanager
def locked(run_dir: Place, check: Callable[[], None] = lambda: None) -> Iterator[lock.StillOurs]:
    """Creates `run_dir` if it does not exist, and keeps other processes from training in it.

    Args:
      run_dir: the run directory.
      check: raises an error if waiting should end; see `lock.held`.

    Raises:
      UserError: the path cannot be used as a directory, or another process is training in it.
    """
    in_use = (
        f"train.output_dir: another process is training in {run_dir}; wait for it or give another "
        f"directory"
    )
    if not isinstance(run_dir, StorePath):
        with _locked_on_disk(run_dir, in_use):
            yield lock.always_ours
    elif hosts.is_first():
        with lock.held(run_dir / ".lock", in_use, check) as held:
            yield held.check
    else:
        yield lock.always_ours


@contextlib.contextmanager
def _locked_on_disk(run_dir: Path, in_use: str) -> Iterator[None]:
    refuse_addresses("train.output_dir", run_dir)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        file = (run_dir / ".lock").open("w")
    except OSError as error:
        raise UserError(f"train.output_dir: {run_dir} cannot be used: {error}") from error
    with file:
        if not hosts.is_first():
            yield
            return
        try:
            # Held until the process ends, in whatever way.
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(in_use) from error
        except OSError:
            pass  # Some network file systems have no locks.
        yield


def config_path(run_dir: Place) -> Place:
    """The path of a run's configuration."""
    return run_dir / "config.json"


def write_config(run_dir: Place, config: Config) -> None:
    """Writes the resolved configuration to `config.json`, in the first process.

    Raises:
      UserError: the file cannot be written.
    """
    if hosts.is_first():
        with replacing(config_path(run_dir)) as unfinished:
            unfinished.write_text(config.to_json())
