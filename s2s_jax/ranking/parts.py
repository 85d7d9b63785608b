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
import weakref
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from s2s_jax.errors import UserError

# The key of a part's counts in its metadata.
COUNTS = b"s2s_jax.counts"
_NOTE = "made_for.json"
_OURS = re.compile(r"\d{8}\.(parquet|tmp)|made_for\.(json|tmp)")


def parts_of(output: Path) -> int:
    """The number of finished parts of an output file, which need not exist."""
    return sum(1 for _ in _directory(output).glob("*.parquet"))


def _directory(output: Path) -> Path:
    return output.with_name(output.name + ".parts")


class Parts:
    """The finished parts of one output file."""

    def __init__(self, output: Path, made_for: Mapping[str, Any]):
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
        try:
            self._dir.mkdir(parents=True, exist_ok=True)
            self._unlock = weakref.finalize(self, os.close, self._lock())
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
        except OSError as error:
            raise UserError(f"--output: {self._dir} cannot be written: {error}") from error

    def missing(self, stripes: int) -> list[int]:
        """Return the numbers of the parts that are not done.

        Args:
          stripes: the number of stripes.
        """
        return [number for number in range(stripes) if number not in self]

    def __contains__(self, number: int) -> bool:
        return self._path(number).exists()

    def write(self, number: int, table: pa.Table, counts: Mapping[str, int]) -> None:
        """Writes a part and its counts.

        Raises:
          UserError: the part cannot be written.
        """
        # Both are in one file, so that an interruption cannot save one without the other.
        table = table.replace_schema_metadata({COUNTS: json.dumps(counts)})
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
          UserError: the output cannot be written.
        """
        unfinished = self._output.with_name(f".{self._output.name}.tmp")
        counts: Counter[str] = Counter()
        paths = sorted(self._dir.glob("*.parquet"))
        assert paths, "a log has stripes"
        schema = pq.read_schema(paths[0]).remove_metadata()
        try:
            with pq.ParquetWriter(str(unfinished), schema) as writer:
                for path in paths:
                    table = pq.read_table(path)
                    counts.update(json.loads(table.schema.metadata[COUNTS]))
                    writer.write_table(table.replace_schema_metadata())
            unfinished.replace(self._output)
            if self._remove():
                self._dir.rmdir()
        except OSError as error:
            with contextlib.suppress(OSError):
                unfinished.unlink()
            raise UserError(f"--output: {self._output} cannot be written: {error}") from error
        return counts

    def _path(self, number: int) -> Path:
        return self._dir / f"{number:08}.parquet"

    def _made_for(self) -> dict[str, Any] | None:
        """Return what the existing parts were made for; None if there are no parts."""
        names = [path.name for path in self._dir.iterdir()]
        if not names:
            return None
        foreign = [name for name in names if not _OURS.fullmatch(name)]
        if foreign or _NOTE not in names:
            found = foreign[0] if foreign else f"no {_NOTE}"
            raise UserError(
                f"--output: {self._dir} is needed for the parts of an unfinished output, but it is not "
                f"such a directory (found {found}); move it away or give another --output"
            )
        try:
            made_for = json.loads((self._dir / _NOTE).read_text())
        except ValueError:
            made_for = None
        return made_for if isinstance(made_for, dict) else {}

    def _lock(self) -> int:
        """Locks the directory, and returns a file descriptor that holds the lock until it is closed."""
        directory = os.open(self._dir, os.O_RDONLY)
        try:
            fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(directory)
            raise UserError(
                f"--output: another process is writing {self._output}; wait for it or give another "
                f"--output"
            ) from error
        except OSError:
            pass  # Some network file systems have no locks.
        return directory

    def close(self) -> None:
        """Releases the lock."""
        self._unlock()

    def _remove(self) -> bool:
        """Removes the parts, and returns whether the directory is now empty."""
        others = False
        for path in self._dir.iterdir():
            if _OURS.fullmatch(path.name):
                path.unlink()
            else:
                others = True
        return not others


def _replace(path: Path, write: Any) -> None:
    """Writes a temporary file and moves it to `path`, so that no one reads a partial file."""
    unfinished = path.with_suffix(".tmp")
    write(unfinished)
    unfinished.replace(path)
