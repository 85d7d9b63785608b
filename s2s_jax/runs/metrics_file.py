"""A run's `metrics.jsonl`: lines of numbers of steps and of evaluations."""

import contextlib
import itertools
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from s2s_jax.storage.lock import StillOurs, always_ours
from s2s_jax.writing import explained, replacing
from s2s_serve.storage.address import Place, StorePath

_NAME = "metrics.jsonl"
# Seconds between two writes to a store, which takes the whole file each time; and how many times as long
# as such a write the time after it is, at least.
_STORE_SECONDS, _STORE_TIMES = 30, 20
# Numbers of a step, or of an evaluation after it, by name; including `step`.
Line = dict[str, float]


def read_lines(run_dir: Place) -> list[Line]:
    """The complete lines of `metrics.jsonl`; a partial line of a killed run is left out."""
    path = run_dir / _NAME
    if not path.exists():
        return []
    lines = []
    for text in path.read_text().splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            line = json.loads(text)
            if isinstance(line, dict) and "step" in line:
                lines.append(line)
    return lines


class MetricsFile:
    """Appends lines to `metrics.jsonl`."""

    def __init__(
        self,
        run_dir: Place,
        step: int,
        unwritten: Sequence[Line] = (),
        still_ours: StillOurs = always_ours,
    ):
        """Opens the file of a run that is at `step`; removes lines of later steps.

        Args:
          run_dir: the run directory.
          step: steps done: 0, or the step of the checkpoint from which the run continues.
          unwritten: lines up to `step` that could not be written before.
          still_ours: see `run_dir.locked`.

        Raises:
          UserError: the file cannot be written.
        """
        self._path = run_dir / _NAME
        found = read_lines(run_dir)
        if step == 0 and found:
            _set_aside(self._path)
        kept = [line for line in found if line["step"] <= step]
        kept += [line for line in unwritten if line not in kept]
        text = "".join(json.dumps(line) + "\n" for line in kept)
        with replacing(self._path) as unfinished:
            unfinished.write_text(text)
        self._file = _open_end(self._path, text, still_ours)
        self._unwritten: list[Line] = []

    @property
    def unwritten(self) -> list[Line]:
        """Lines that could not be written to the file or, in a store, were not written yet."""
        return list(self._unwritten)

    def write(self, line: Line) -> None:
        """Appends a line, after the lines that were not written before.

        In a store, lines of training wait for a while, because each write takes the whole file.

        Raises:
          UserError: the file cannot be written.
        """
        self._unwritten.append(line)
        if self._file.is_due or "loss" not in line:
            self.flush()

    def flush(self) -> None:
        """Writes the lines that were not written yet.

        Raises:
          UserError: the file cannot be written.
        """
        if not self._unwritten:
            return
        text = "".join(json.dumps(line) + "\n" for line in self._unwritten)
        with explained(self._path):
            self._file.append(text.encode())
        self._unwritten = []

    def close(self) -> None:
        """Closes the file, in a store after writing the lines that were not written yet.

        Raises:
          UserError: they cannot be written.
        """
        try:
            if self._file.waits:
                self.flush()
        finally:
            self._file.close()


class _End(Protocol):
    """The end of a file to which lines are appended.

    Attributes:
      waits: whether lines wait until they are due, to be written together with others.
      is_due: whether lines should be written now.
    """

    waits: bool

    @property
    def is_due(self) -> bool: ...

    def append(self, data: bytes) -> None:
        """Writes all of `data` or, if a partial write can be undone, nothing."""
        ...

    def close(self) -> None: ...


def _open_end(path: Place, text: str, still_ours: StillOurs) -> _End:
    """Opens a file that contains `text`."""
    if isinstance(path, StorePath):
        return _EndInStore(path, text.encode(), still_ours)
    return _EndOnDisk(path)


class _EndOnDisk:
    """See `_End`."""

    waits, is_due = False, True

    def __init__(self, path: Path):
        with explained(path):
            # Unbuffered, so that we know what was written.
            self._file = path.open("ab", buffering=0)

    def append(self, data: bytes) -> None:
        before = os.fstat(self._file.fileno()).st_size
        try:
            while data:
                data = data[self._file.write(data) :]
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file.fileno(), before)
            raise

    def close(self) -> None:
        self._file.close()


class _EndInStore:
    """See `_End`. A store cannot append, so each write takes all lines, of which a copy is kept."""

    waits = True

    def __init__(self, path: StorePath, data: bytes, still_ours: StillOurs):
        self._path, self._data, self._still_ours = path, data, still_ours
        self._due = time.monotonic() + _STORE_SECONDS

    @property
    def is_due(self) -> bool:
        return time.monotonic() >= self._due

    def append(self, data: bytes) -> None:
        # The lines of another process must stay.
        self._still_ours(fresh=True)
        begun = time.monotonic()
        self._path.write_bytes(self._data + data)
        self._data += data
        taken = time.monotonic() - begun
        self._due = time.monotonic() + max(_STORE_SECONDS, _STORE_TIMES * taken)

    def close(self) -> None:
        pass


def _set_aside(path: Place) -> None:
    """Keeps the metrics of a run without checkpoints when another run begins in its directory."""
    names = (path.with_name(f"{path.stem}.{number}.jsonl") for number in itertools.count(1))
    kept = next(name for name in names if not name.exists())
    with explained(kept):
        if isinstance(path, StorePath):
            path.with_name(kept.name).write_bytes(path.read_bytes())
        else:
            path.rename(path.with_name(kept.name))
    print(
        f"{path.parent} has metrics but no checkpoint to continue from: training starts from the "
        f"beginning, and the old {path.name} is now {kept.name}",
        file=sys.stderr,
        flush=True,
    )
