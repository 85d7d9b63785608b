"""The directory that a new log is written to, on this machine or in a store.

Until all files of a log are written, their names begin with a dot, so readers skip them.
"""

import contextlib
import errno
import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

from s2s_jax.errors import MachineError, UserError
from s2s_jax.storage import lock
from s2s_serve.storage import file_systems
from s2s_serve.storage.address import Place, StorePath
from s2s_serve.storage.scratch import Scratch

# Prefix of the names of directories in which events are sorted.
SORTING = ".sorting_"
_OWN = re.compile(r"part-\d+\.orc")
_UNFINISHED = re.compile(r"\.part-\d+\.orc")
# S3 renames by copying, and copies no larger files.
_LARGEST_OF_S3 = 5 * 2**30


class LogDirectory(Protocol):
    """What `orc_writer.open_log` needs of a directory. Messages refer to its flags."""

    def reserved(self, overwrite: bool) -> AbstractContextManager[None]:
        """Makes the directory, and keeps other processes away from it during the `with` block.

        Files that a killed process left are removed.

        Args:
          overwrite: whether there may be files of an earlier log.

        Raises:
          UserError: there are files that the new ones would mix with, or another process writes there.
        """
        ...

    def place_of(self, name: str) -> Place:
        """The final place of a file."""
        ...

    def unfinished(self, name: str) -> Path:
        """The file of this machine to write to."""
        ...

    def ended(self, name: str) -> None:
        """Is called when a file is written."""
        ...

    def show(self, names: Sequence[str]) -> None:
        """Removes the files of the earlier log, then gives all new files their final names."""
        ...

    def discard(self, names: Sequence[str]) -> None:
        """Removes files that are not shown."""
        ...

    def not_written(self, error: OSError) -> str:
        """The message for an error of this machine's disk."""
        ...


def log_directory(out: Place, temp_dir: Path | None) -> LogDirectory:
    """The directory at a place.

    Args:
      out: the place.
      temp_dir: if the place is in a store, the directory for the file that is being written; None:
        `TMPDIR`.
    """
    return _InStore(out, temp_dir) if isinstance(out, StorePath) else _OnDisk(out)


class _OnDisk:
    def __init__(self, out: Path):
        self._out = out
        self._earlier: Sequence[Path] = ()

    @contextlib.contextmanager
    def reserved(self, overwrite: bool) -> Iterator[None]:
        out = self._out
        made = not out.exists()
        if not made and not out.is_dir():
            raise _expected_directory(out)
        out.mkdir(parents=True, exist_ok=True)
        there = {str(path.relative_to(out)): path for path in out.rglob("*.orc")}
        names = _replaced(out, sorted(there), overwrite)
        self._earlier = [there[name] for name in names]
        try:
            with self._locked():
                self._remove_leftovers()
                yield
        except BaseException:
            if made:
                with contextlib.suppress(OSError):
                    out.rmdir()
            raise

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        directory = os.open(self._out, os.O_RDONLY)
        try:
            try:
                fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UserError(_in_use(self._out)) from error
            except OSError as error:
                # Some network file systems have no locks.
                if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EBADF):
                    raise
            yield
        finally:
            os.close(directory)

    def _remove_leftovers(self) -> None:
        for path in self._out.iterdir():
            if _UNFINISHED.fullmatch(path.name):
                path.unlink()
            elif path.name.startswith(SORTING) and path.is_dir():
                shutil.rmtree(path)

    def place_of(self, name: str) -> Path:
        return self._out / name

    def unfinished(self, name: str) -> Path:
        return self._out / f".{name}"

    def ended(self, name: str) -> None:
        pass

    def show(self, names: Sequence[str]) -> None:
        for path in self._earlier:
            path.unlink()
        for name in names:
            self.unfinished(name).rename(self._out / name)

    def discard(self, names: Sequence[str]) -> None:
        for name in names:
            self.unfinished(name).unlink(missing_ok=True)

    def not_written(self, error: OSError) -> str:
        return f"--output: {self._out} cannot be written ({error})"


class _InStore:
    def __init__(self, out: StorePath, temp_dir: Path | None):
        self._out, self._temp_dir = out, temp_dir
        self._scratch: Scratch | None = None
        self._earlier: Sequence[StorePath] = ()
        self._still_ours: lock.StillOurs = lock.always_ours

    @contextlib.contextmanager
    def reserved(self, overwrite: bool) -> Iterator[None]:
        # Before the lock, so that a mistake leaves nothing there.
        self._look(overwrite)
        self._scratch = Scratch(self._temp_dir)
        try:
            with lock.held(self._out / ".lock", _in_use(self._out)) as held:
                self._still_ours = held.check
                unfinished = self._look(overwrite)
                for path in unfinished:
                    path.unlink(missing_ok=True)
                yield
        finally:
            self._scratch.remove()

    def _look(self, overwrite: bool) -> list[StorePath]:
        """Notes the files of an earlier log, and returns those that a killed process left."""
        out = self._out
        if out.is_file():
            raise _expected_directory(out)
        found = [file.path for file in file_systems.files_below(out) or ()]
        there = {"/".join(path.parts_below(out)): path for path in found if path.suffix == ".orc"}
        names = _replaced(out, list(there), overwrite)
        self._earlier = [there[name] for name in names]
        return [path for name, path in there.items() if _UNFINISHED.fullmatch(name)]

    def place_of(self, name: str) -> StorePath:
        return self._out / name

    def unfinished(self, name: str) -> Path:
        assert self._scratch is not None
        return self._scratch.path / name

    def ended(self, name: str) -> None:
        written = self.unfinished(name)
        size = written.stat().st_size
        if self._out.scheme == "s3" and size > _LARGEST_OF_S3:
            raise UserError(
                f"--output: {self._out / name} has {size / 2**30:.1f} GiB, and S3 renames no files of "
                f"more than 5 GiB; write smaller files, with a lower --events_per_file"
            )
        file_systems.upload(written, self._hidden(name))
        written.unlink()

    def show(self, names: Sequence[str]) -> None:
        self._still_ours(fresh=True)
        shown: list[StorePath] = []
        try:
            for path in self._earlier:
                path.unlink(missing_ok=True)
            for name in names:
                shown.append(self._out / name)
                file_systems.move(self._hidden(name), shown[-1])
        except BaseException:
            # A part of a log would be read as if it were all of it.
            with contextlib.suppress(MachineError):
                for path in shown:
                    path.unlink(missing_ok=True)
            raise

    def discard(self, names: Sequence[str]) -> None:
        # The next one removes them otherwise.
        with contextlib.suppress(MachineError):
            for name in names:
                self._hidden(name).unlink(missing_ok=True)

    def not_written(self, error: OSError) -> str:
        flag = "TMPDIR" if self._temp_dir is None else "--temp_dir"
        return f"{flag}: {self._temp_dir or tempfile.gettempdir()} cannot be written ({error})"

    def _hidden(self, name: str) -> StorePath:
        return self._out / f".{name}"


def _replaced(out: Place, names: Sequence[str], overwrite: bool) -> list[str]:
    """The files of an earlier log among the ORC files below a directory, given as relative paths."""
    seen = [name for name in names if name.rpartition("/")[2][0] not in "._"]
    own = [name for name in seen if _OWN.fullmatch(name)]
    others = [name for name in seen if name not in own]
    if own and not overwrite:
        raise UserError(
            f"--output: {out} already holds {own[0]}, which new files would mix with; give another "
            f"directory or --overwrite True"
        )
    if others:
        raise UserError(
            f"--output: {out} holds {others[0]}, which new files would mix with; give another directory"
        )
    return own


def _expected_directory(out: Place) -> UserError:
    return UserError(f"--output: expected a directory, found the file {out}; give another name")


def _in_use(out: Place) -> str:
    return f"--output: another program is writing a log to {out}; wait for it, or give another directory"
