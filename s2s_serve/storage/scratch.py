"""Temporary directories of this machine, for copies of files of stores."""

import contextlib
import fcntl
import os
import shutil
import tempfile
import weakref
from pathlib import Path

_PREFIX = "s2s-copies-"
_LOCK = ".lock"


class Scratch:
    """A temporary directory in `TMPDIR` that is removed with this object, or when the process ends.

    What a killed process left there is removed by the next one.

    Attributes:
      path: the directory.
    """

    def __init__(self) -> None:
        """Makes the directory.

        Raises:
          OSError: it cannot be made.
        """
        _remove_abandoned(Path(tempfile.gettempdir()))
        self.path = Path(tempfile.mkdtemp(prefix=_PREFIX))
        lock = os.open(self.path / "new", os.O_RDWR | os.O_CREAT, 0o600)
        with contextlib.suppress(OSError):  # Some network file systems have no locks.
            fcntl.flock(lock, fcntl.LOCK_EX)
        # Nobody ever finds it unlocked.
        os.rename(self.path / "new", self.path / _LOCK)
        self.remove = weakref.finalize(self, _remove, self.path, lock)


def _remove(path: Path, lock: int) -> None:
    shutil.rmtree(path, ignore_errors=True)
    os.close(lock)


def _remove_abandoned(above: Path) -> None:
    for path in above.glob(f"{_PREFIX}*"):
        # A directory without a lock was made a moment ago, or belongs to another user.
        with contextlib.suppress(OSError):
            lock = os.open(path / _LOCK, os.O_RDWR)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(lock)
