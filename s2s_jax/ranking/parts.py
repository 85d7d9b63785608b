"""Keeps the finished parts of a command that may be interrupted, one Parquet file per stripe.

The files are in a directory next to the output. A note in this directory says what they were made for:
checkpoint, configuration, logs and so on. The next command uses the parts again if all of this is the
same; otherwise it starts over. Other files in the directory are never removed.
"""

import contextlib
import fcntl
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from s2s_jax.errors import UserError
from s2s_jax.ranking import part_files
from s2s_jax.storage import lock
from s2s_jax.writing import replacing
from s2s_serve.storage.address import Place, StorePath

_NOTE, _LOCK = "made_for.json", ".lock"
_OURS = re.compile(r"\d{8}\.(parquet|tmp)|made_for\.(json|tmp)")


def parts_of(output: Place) -> int:
    """The number of finished parts of an output file, which need not exist."""
    return sum(1 for _ in _directory(output).glob("*.parquet"))


def _directory(output: Place) -> Place:
    return output.with_name(output.name + ".parts")


@contextlib.contextmanager
def locked(path: Place, in_use: str) -> Iterator[lock.StillOurs]:
    """Holds a lock of an output, and removes its file in the end; on a disk, it may be a directory.

    Yields what checks that no other process has taken the lock over, which is possible in a store.

    Args:
      path: the file of the lock.
      in_use: the message if another process holds it.

    Raises:
      UserError: another process holds it.
    """
    if isinstance(path, StorePath):
        with lock.held(path, in_use) as held:
            yield held.check
        return
    is_file = not path.is_dir()
    held = os.open(path, os.O_RDWR | os.O_CREAT if is_file else os.O_RDONLY, 0o644)
    try:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(in_use) from error
        except OSError:
            # Some network file systems have no locks.
            print(f"{path} cannot be locked", file=sys.stderr, flush=True)
        yield lock.always_ours
        if is_file:
            path.unlink(missing_ok=True)
    finally:
        os.close(held)


class Parts:
    """The finished parts of one output file."""

    def __init__(self, output: Place, made_for: Mapping[str, Any]):
        """Opens the directory of the parts, and removes parts that were made for something else.

        Args:
          output: the output file.
          made_for: everything that the parts depend on, as JSON.

        Raises:
          UserError: the directory cannot be written or is not a directory of parts, or another process
            is writing parts there.
        """
        self._output = output
        self._dir = _directory(output)
        now = json.loads(json.dumps(made_for))
        self._digest = part_files.digest_of(now)
        self._held = contextlib.ExitStack()
        _check_nothing_below(output)
        try:
            self._dir.mkdir(parents=True, exist_ok=True)
            in_store = isinstance(self._dir, StorePath)
            in_use = (
                f"--output: another process is writing {output}; wait for it or give another "
                f"--output"
            )
            # On a disk, the directory itself is locked.
            path = self._dir / _LOCK if in_store else self._dir
            self._still_ours = self._held.enter_context(locked(path, in_use))
            before = self._made_for()
            if before is not None and before != now:
                changed = [key for key in now if key not in before or before[key] != now[key]]
                print(
                    f"{self._dir}: its parts were made with another {', '.join(changed)}; starting over",
                    file=sys.stderr,
                    flush=True,
                )
                self._remove()
            _replace(self._dir / _NOTE, lambda path: path.write_text(json.dumps(now)))
        except BaseException as error:
            self._held.close()
            if not isinstance(error, OSError):
                raise
            raise UserError(f"--output: {self._dir} cannot be written: {error}") from error

    def missing(self, stripes: int, complete: bool = False) -> list[int]:
        """Return the numbers of the parts that are not done.

        Parts that were made for something else are not, as after another command took over the lock.

        Args:
          stripes: the number of stripes.
          complete: whether parts in which rows were skipped are not done.
        """
        there = list(self._dir.glob("*.parquet"))
        said = zip(there, part_files.read_all(there), strict=True)
        done = {
            path
            for path, each in said
            if each is not None
            and each.digest == self._digest
            and not (complete and each.counts["skipped_rows"])
        }
        return [number for number in range(stripes) if self._path(number) not in done]

    def __contains__(self, number: int) -> bool:
        return self._path(number).exists()

    def write(self, number: int, table: pa.Table, counts: Mapping[str, int]) -> None:
        """Writes a part and its counts.

        Raises:
          UserError: the part cannot be written, or another process has taken over the output.
        """
        self._still_ours(fresh=True)
        table = part_files.signed(table, self._digest, counts)
        try:
            _replace(self._path(number), lambda path: pq.write_table(table, str(path)))
        except OSError as error:
            raise UserError(f"--output: {self._dir} cannot be written: {error}") from error

    def discard(self) -> None:
        """Removes the output file; for recommendations without a row."""
        self._output.unlink()

    def join(self) -> Counter[str]:
        """Joins the parts into the output file, one part at a time in memory, and removes them.

        Returns:
          The sums of the parts' counts.

        Raises:
          UserError: the output cannot be written, or a part was made for something else.
        """
        counts: Counter[str] = Counter()
        paths = sorted(self._dir.glob("*.parquet"))
        assert paths, "a log has stripes"
        try:
            with replacing(self._output) as unfinished, contextlib.ExitStack() as until_written:
                writer = None
                for path in paths:
                    table = part_files.read_rows(path)
                    said = part_files.said_by(table.schema.metadata, table.num_rows)
                    if said is None or said.digest != self._digest:
                        raise UserError(
                            f"--output: {path} was made for something else by another command "
                            f"meanwhile; start again, which makes it again"
                        )
                    counts.update(said.counts)
                    table = table.replace_schema_metadata()
                    if writer is None:
                        writer = until_written.enter_context(
                            pq.ParquetWriter(str(unfinished), table.schema)
                        )
                    writer.write_table(table)
                until_written.close()
                self._still_ours(fresh=True)
            # The output may have been uploaded for long.
            self._still_ours(fresh=True)
            if self._remove() and isinstance(self._dir, Path):
                self._dir.rmdir()
        except OSError as error:
            raise UserError(f"--output: {self._output} cannot be written: {error}") from error
        return counts

    def _path(self, number: int) -> Place:
        return self._dir / f"{number:08}.parquet"

    def _made_for(self) -> dict[str, Any] | None:
        """Return what the existing parts were made for; None if there are no parts.

        A full disk, or a kill, may have left parts or temporary files without a note; they are removed.
        """
        names = [path.name for path in self._dir.iterdir() if path.name != _LOCK]
        if not names:
            return None
        foreign = [name for name in names if not _OURS.fullmatch(name)]
        if not foreign and _NOTE not in names:
            # Only what says that it is a part is one.
            paths = [self._dir / name for name in names if name.endswith(".parquet")]
            read = zip(paths, part_files.read_all(paths), strict=True)
            foreign = [path.name for path, said in read if said is None]
        if foreign:
            raise UserError(
                f"--output: {self._dir} is needed for the parts of an unfinished output, but it is not "
                f"such a directory (found {foreign[0]}); move it away or give another --output"
            )
        if _NOTE not in names:
            self._remove()
            return None
        try:
            made_for = json.loads((self._dir / _NOTE).read_text())
        except ValueError:
            made_for = None
        return made_for if isinstance(made_for, dict) else {}

    def close(self) -> None:
        """Releases the lock."""
        self._held.close()

    def _remove(self) -> bool:
        """Removes the parts, and returns whether the directory is now empty."""
        others = False
        # The note is the last one, because it says whose parts these are.
        for path in sorted(self._dir.iterdir(), key=lambda path: path.name == _NOTE):
            if _OURS.fullmatch(path.name):
                path.unlink()
            elif path.name != _LOCK:
                others = True
        return not others


def _check_nothing_below(output: Place) -> None:
    """Refuses the address of a file that is also one of a directory, which some stores allow."""
    if isinstance(output, StorePath) and output.scheme != "hdfs":
        below = next(output.iterdir(), None)
        if below is not None:
            raise UserError(
                f"--output: expected no file below {output}, found {below.name}; give another path, "
                f"or remove what is below"
            )


def _replace(path: Place, write: Any) -> None:
    """Writes a temporary file and moves it to `path`, so that no one reads a partial file."""
    if isinstance(path, StorePath):
        with replacing(path) as copied:
            write(copied)
        return
    unfinished = path.with_suffix(".tmp")
    write(unfinished)
    unfinished.replace(path)
