"""Writes the metrics of a run to metrics.jsonl, TensorBoard and the terminal."""

import contextlib
import sys
from collections.abc import Iterator, Sequence
from typing import Self

from s2s_jax.errors import MachineError, UserError
from s2s_jax.runs.metrics_file import Line, MetricsFile
from s2s_jax.runs.progress_bar import ProgressBar
from s2s_jax.runs.tensorboard import EventFile
from s2s_jax.storage.lock import StillOurs, always_ours
from s2s_serve.storage.address import Place


class Writer:
    """Writes lines to metrics.jsonl, TensorBoard and the terminal."""

    def __init__(
        self,
        run_dir: Place,
        step: int,
        total_steps: int,
        tensorboard: bool,
        unwritten: Sequence[Line] = (),
        still_ours: StillOurs = always_ours,
    ):
        """Opens the files of a run that is at `step`; removes lines of later steps.

        Args:
          run_dir: the run directory.
          step: steps done: 0, or the step of the checkpoint from which the run continues.
          total_steps: the step at which the run ends.
          tensorboard: whether to write event files too.
          unwritten: lines up to `step` that could not be written before.
          still_ours: see `run_dir.locked`.

        Raises:
          UserError: metrics.jsonl cannot be written.
        """
        self._file = MetricsFile(run_dir, step, unwritten, still_ours)
        self._tensorboard: EventFile | None = None
        if tensorboard:
            with self._or_without_tensorboard():
                self._tensorboard = EventFile(run_dir / "tensorboard", step)
        self._bar = ProgressBar(step, total_steps)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        self._bar.stop()
        if self._tensorboard is not None:
            self._tensorboard.close()
        # An error that ends the run says more than one from writing its last lines.
        with contextlib.nullcontext() if error is None else contextlib.suppress(UserError):
            self._file.close()

    @property
    def unwritten(self) -> list[Line]:
        """Lines that are not in metrics.jsonl; see `MetricsFile.unwritten`."""
        return self._file.unwritten

    def flush(self) -> None:
        """Writes the lines that are not in metrics.jsonl, if that is possible now."""
        with contextlib.suppress(UserError):
            self._file.flush()

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
        except (OSError, MachineError) as error:
            if self._tensorboard is not None:
                self._tensorboard.close()
                self._tensorboard = None
            reason = getattr(error, "strerror", None) or error
            print(
                f"TensorBoard's files cannot be written ({reason}); the run continues without them, and "
                f"metrics.jsonl has the same numbers",
                file=sys.stderr,
                flush=True,
            )
