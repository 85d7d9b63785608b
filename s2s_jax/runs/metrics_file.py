"""A run's `metrics.jsonl`: lines of numbers of steps and of evaluations."""

import contextlib
import itertools
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from s2s_jax.writing import explained, replacing

_NAME = "metrics.jsonl"
# Numbers of a step, or of an evaluation after it, by name; including `step`.
Line = dict[str, float]


def read_lines(run_dir: Path) -> list[Line]:
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

    def __init__(self, run_dir: Path, step: int, unwritten: Sequence[Line] = ()):
        """Opens the file of a run that is at `step`; removes lines of later steps.

        Args:
          run_dir: the run directory.
          step: steps done: 0, or the step of the checkpoint from which the run continues.
          unwritten: lines up to `step` that could not be written before.

        Raises:
          UserError: the file cannot be written.
        """
        self._path = run_dir / _NAME
        found = read_lines(run_dir)
        if step == 0 and found:
            _set_aside(self._path)
        kept = [line for line in found if line["step"] <= step]
        kept += [line for line in unwritten if line not in kept]
        with replacing(self._path) as unfinished:
            unfinished.write_text("".join(json.dumps(line) + "\n" for line in kept))
        with explained(self._path):
            # Unbuffered, so that we know what was written.
            self._file = self._path.open("ab", buffering=0)
        self._unwritten: list[Line] = []

    @property
    def unwritten(self) -> list[Line]:
        """Lines that could not be written to the file."""
        return list(self._unwritten)

    def write(self, line: Line) -> None:
        """Appends a line, after the lines that could not be written before.

        Raises:
          UserError: the file cannot be written.
        """
        self._unwritten.append(line)
        text = "".join(json.dumps(line) + "\n" for line in self._unwritten)
        with explained(self._path):
            self._append(text.encode())
        self._unwritten = []

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def _append(self, data: bytes) -> None:
        """Writes all of `data` or, if a partial write can be undone, nothing."""
        before = os.fstat(self._file.fileno()).st_size
        try:
            while data:
                data = data[self._file.write(data) :]
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file.fileno(), before)
            raise


def _set_aside(path: Path) -> None:
    """Keeps the metrics of a run without checkpoints when another run begins in its directory."""
    number = next(n for n in itertools.count(1) if not path.with_suffix(f".{n}.jsonl").exists())
    kept = path.with_suffix(f".{number}.jsonl")
    with explained(kept):
        path.rename(kept)
    print(
        f"{path.parent} has metrics but no checkpoint to continue from: training starts from the "
        f"beginning, and the old {path.name} is now {kept.name}",
        file=sys.stderr,
        flush=True,
    )
