"""A lock in a store, for one process of any machine.

pyarrow cannot ask a store to write a file only if it is not there, so the lock is a file that its owner
writes again and again. Whoever finds it watches whether it changes: if not, its owner is gone. Clocks of
different machines are never compared.

Two processes that begin within the same second may both write. Then the one that wrote last has the
lock, and the other one notices. If the owner cannot reach the store for longer than `_STALE`, another
process may take the lock; the first one notices, too, as soon as it reaches the store again.
"""

import contextlib
import dataclasses
import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

from s2s_jax.errors import MachineError, UserError
from s2s_serve.storage.address import StorePath

# Seconds between two writes of the owner, and seconds without a write after which it is taken for gone.
_BEAT, _STALE = 20.0, 90.0
# Seconds between two looks at a lock of another process, and after which the first write counts.
_LOOK, _SETTLED = 2.0, 1.0
# Seconds after which an attempt to remove the file is given up.
_RELEASED = 10.0
# Seconds after which a file that HDFS replaces is there again.
_REPLACED = 1.0


class StillOurs(Protocol):
    """What checks that no other process has taken a lock over."""

    def __call__(self, fresh: bool = False) -> None:
        """See `StoreLock.check`."""
        ...


def always_ours(fresh: bool = False) -> None:
    """`StillOurs` of a lock that nobody can take over, as on a disk."""


@dataclasses.dataclass(frozen=True)
class _Owner:
    """What the file says about the owner of a lock.

    Attributes:
      token: a random text.
      beat: the number of the write.
      host: the name of its machine.
      process: its number there.
      place: what tells machines, their starts and containers apart.
      started: when the process started, in the unit of its machine.
    """

    token: str
    beat: int
    host: str
    process: int
    place: str
    started: str


# The locks of this process.
_held: set["StoreLock"] = set()


class StoreLock:
    """A lock that this process has."""

    def __init__(self, path: StorePath, in_use: str):
        """Takes the lock, for `held`; see there."""
        self._path, self._in_use = path, in_use
        process = os.getpid()
        host, place, started = socket.gethostname(), _place(), _started(process)
        self._owner = _Owner(secrets.token_hex(8), 0, host, process, place, started)
        self._lost = False
        # While the file is written again, some stores have none for a moment.
        self._asking = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="s2s-lock", daemon=True)

    def check(self, fresh: bool = False) -> None:
        """Checks that no other process has taken the lock.

        Args:
          fresh: whether to read the file, for what another process could have taken over meanwhile,
            for example while this machine was paused. Otherwise, what the last write found counts.

        Raises:
          UserError: another process has it.
          MachineError: the file cannot be read.
        """
        if fresh and not self._lost:
            with self._asking:
                self._lost = not self._is_ours()
        if self._lost:
            raise UserError(
                f"{self._in_use}; it took over because this process was paused or did not reach the "
                f"store for {_STALE:.0f} s"
            )

    def _take(self, check: Callable[[], None]) -> None:
        self._wait_until_free(check)
        self._write()
        time.sleep(_SETTLED)
        if not self._is_ours():
            raise UserError(self._in_use)
        self._thread.start()

    def _wait_until_free(self, check: Callable[[], None]) -> None:
        found = _read(self._path)
        if found is None or _is_gone(found):
            return
        print(
            f"{self._path.parent} is locked by process {found.process} of {found.host}; waiting up to "
            f"{_STALE:.0f} s to see whether it still runs",
            file=sys.stderr,
            flush=True,
        )
        until = time.monotonic() + _STALE
        while time.monotonic() < until:
            check()
            time.sleep(_LOOK)
            now = _read(self._path)
            if now is None:
                return
            if now != found:
                raise UserError(self._in_use)

    def _write(self) -> None:
        self._path.write_text(json.dumps(dataclasses.asdict(self._owner)) + "\n")

    def _is_ours(self) -> bool:
        found = _read(self._path)
        return found is not None and found.token == self._owner.token

    def _beat(self) -> None:
        while not self._ended.wait(_BEAT):
            # The store may answer again later.
            with contextlib.suppress(MachineError), self._asking:
                if not self._is_ours():
                    self._lost = True
                    return
                self._owner = dataclasses.replace(self._owner, beat=self._owner.beat + 1)
                self._write()

    def _release(self) -> None:
        """Removes the file, unless the store takes long to answer; then it is found unchanged later."""
        self._ended.set()
        removing = threading.Thread(target=self._remove, name="s2s-unlock", daemon=True)
        removing.start()
        removing.join(_RELEASED)

    def _remove(self) -> None:
        if self._thread.ident is not None:
            self._thread.join()
        with contextlib.suppress(MachineError):
            if self._is_ours():
                self._path.unlink(missing_ok=True)


@contextlib.contextmanager
def held(
    path: StorePath, in_use: str, check: Callable[[], None] = lambda: None
) -> Iterator[StoreLock]:
    """Takes a lock, and releases it in the end.

    If another process seems to have it, this waits up to 90 s to see whether that still runs.

    Args:
      path: the file of the lock.
      in_use: the message if another process has it.
      check: raises an error if waiting should end.

    Raises:
      UserError: another process has it.
      MachineError: the store cannot be reached.
    """
    lock = StoreLock(path, in_use)
    _held.add(lock)
    try:
        lock._take(check)
        yield lock
    finally:
        lock._release()
        _held.discard(lock)


def release_all() -> None:
    """Releases the locks of this process, for one that ends while other threads are at work.

    What checks its lock before it writes notices; see `StoreLock.check`.
    """
    for lock in list(_held):
        lock._release()


def _read(path: StorePath) -> _Owner | None:
    """The owner of a lock; None if there is none."""
    text = _text(path)
    if text is None and path.scheme == "hdfs":
        # There, a file is replaced by removing it and then moving the new one to its place.
        time.sleep(_REPLACED)
        text = _text(path)
    try:
        return None if text is None else _Owner(**json.loads(text))
    except (ValueError, TypeError):
        return None


def _text(path: StorePath) -> str | None:
    try:
        return path.read_text()
    except FileNotFoundError:
        return None


def _is_gone(owner: _Owner) -> bool:
    """Whether a process of this machine has ended. (Of other machines, this is not known.)"""
    return owner.place == _place() and owner.started != _started(owner.process)


def _place() -> str:
    """What tells machines, their starts and containers apart."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"


def _started(process: int) -> str:
    """When a process of this machine started; "" if there is none."""
    try:
        # The name of the program before it may have spaces.
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return ""
