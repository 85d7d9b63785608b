"""Checks that all hosts of a job have the same run directory."""

import contextlib
import secrets
import time

import jax

from s2s_jax.cluster import hosts
from s2s_jax.errors import MachineError, UserError
from s2s_jax.writing import explained
from s2s_serve.storage.address import Place

_NAME = ".hosts"
# Seconds within which a file that one host wrote must be seen by the others, and between two looks.
_SEEN_AFTER, _LOOK = 20.0, 0.5


def check_shared(run_dir: Place) -> None:
    """Refuses a run directory that is not the same place on all hosts.

    Each would write its own parts of checkpoints into its own directory, so none would ever be complete.
    Host 0 writes a file with a random text, which the others must find.

    Raises:
      UserError: a host does not find it, or it cannot be written.
    """
    if jax.process_count() == 1:
        return
    # Host 0 may have waited for the lock of the run, longer than hosts wait in what follows.
    hosts.wait_for_all("run directory locked")
    path = run_dir / _NAME

    def write() -> str:
        token = secrets.token_hex(8)
        with explained(path):
            path.write_text(token)
        return token

    try:
        token = hosts.from_first(write)
        found = token if hosts.is_first() else _found(path, token)
        other = hosts.first_other(found)
    finally:
        if hosts.is_first():
            # It is written again by the next job.
            with contextlib.suppress(OSError, MachineError):
                path.unlink(missing_ok=True)
    if other is not None:
        raise UserError(
            f"train.output_dir: expected the same directory on all hosts, but host {other} does not "
            f"find a file there that host 0 wrote (on host {jax.process_index()}, it is "
            f"{run_dir.resolve()}); give a directory that all hosts share, or the address of a store"
        )


def _found(path: Place, token: str) -> str:
    """The text of a file, which becomes `token` within a while: network file systems keep old copies."""
    until = time.monotonic() + _SEEN_AFTER
    while True:
        found = _text(path)
        if found == token or time.monotonic() > until:
            return found
        time.sleep(_LOOK)


def _text(path: Place) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
