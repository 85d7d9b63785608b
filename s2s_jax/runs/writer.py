"""Writes the metrics of a run to metrics.jsonl, TensorBoard and the terminal."""

import contextlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Self

from s2s_jax.runs.metrics_file import Line, MetricsFile
from s2s_jax.runs.progress_bar import ProgressBar
from s2s_jax.runs.tensorboard import EventFile


class Writer:
    """Writes lines to metrics.jsonl, TensorBoard and the terminal."""

    def __init__(
        self,
        run_dir: Path,
        step: int,
        total_steps: int,
        tensorboard: bool,
        unwritten: Sequence[Line] = (),
    ):
        """Opens the files of a run that is at `step`; removes lines of later steps.

        Args:
          run_dir: the run directory.
          step: steps done: 0, or the step of the checkpoint from which the run continues.
          total_steps: the step at which the run ends.
          tensorboard: whether to write event files too.
          unwritten: lines up to `step` that could not be written before.

        Raises:
          UserError: metrics.jsonl cannot be written.
        """
        self._file = MetricsFile(run_dir, step, unwritten)
        self._tensorboard: EventFile | None = None
        if tensorboard:
            with self._or_without_tensorboard():
                self._tensorboard = EventFile(run_dir / "tensorboard", step)
        self._bar = ProgressBar(step, total_steps)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()

    @property
    def unwritten(self) -> list[Line]:
        """Lines that could not be written to metrics.jsonl."""
        return self._file.unwritten

    def advance(self, step: int) -> None:
        """Moves the progress bar to `step`."""
        self._bar.advance(step)

    def write(self, line: Line) -> None:
        """Writes a line of training metrics or of an evaluation.

        Raises:
          UserError: metrics.jsonl cannot be written. A failure of TensorBoard, which only has the same
            numbers, is ignored.
        """
        if self._tensorboard is not None:
            values = {name: value for name, value in line.items() if name != "step"}
            with self._or_without_tensorboard():
                self._tensorboard.write(int(line["step"]), values)
        if "loss" in line:
            self._bar.show(line)
        self._file.write(line)

    @contextlib.contextmanager
    def _or_without_tensorboard(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if self._tensorboard is not None:
                self._tensorboard.close()
                self._tensorboard = None
            print(
                f"TensorBoard's files cannot be written ({error.strerror or error}); the run continues "
                f"without them, and metrics.jsonl has the same numbers",
                file=sys.stderr,
                flush=True,
            )
