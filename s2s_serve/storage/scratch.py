"""Temporary directories of this machine, for copies of files of stores."""

import contextlib
import fcntl
import os
import shutil
import tempfile
import weakref
from pathlib import Path

_PREFIX, _LOCK = "s2s-copies-", ".lock"


class Scratch:
    """A temporary directory that is removed with this object, or when the process ends.

    The file `NAME.lock` beside it is locked as long. So what a killed process left there is known, and
    removed by the next one.

    Attributes:
      path: the directory.
    """

    def __init__(self, above: Path | None = None) -> None:
        """Makes the directory.

        Args:
          above: where; None: in `TMPDIR`.

        Raises:
          OSError: it cannot be made.
        """
        above = above or Path(tempfile.gettempdir())
        _remove_abandoned(above)
        self.path, lock = _make(above)
        self.remove = weakref.finalize(self, _remove, self.path, lock)


def _make(above: Path) -> tuple[Path, int]:
    while True:
        lock, name = tempfile.mkstemp(_LOCK, _PREFIX, above)
        with contextlib.suppress(OSError):  # Some network file systems have no locks.
            fcntl.flock(lock, fcntl.LOCK_EX)
        path = Path(name)
        # Before it was locked, another process may have taken it for abandoned.
        if path.exists():
            path.with_suffix("").mkdir(mode=0o700)
            return path.with_suffix(""), lock
        os.close(lock)


def _remove(path: Path, lock: int) -> None:
    shutil.rmtree(path, ignore_errors=True)
    path.with_suffix(_LOCK).unlink(missing_ok=True)
    os.close(lock)


def _remove_abandoned(above: Path) -> None:
    for path in above.glob(f"{_PREFIX}*{_LOCK}"):
        # Those of other users cannot be opened, and those that are used cannot be locked.
        with contextlib.suppress(OSError):
            lock = os.open(path, os.O_RDWR)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                os.close(lock)
            else:
                _remove(path.with_suffix(""), lock)
