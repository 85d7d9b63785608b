"""The progress of a run on the terminal."""

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from s2s_jax.runs.metrics_file import Line


class ProgressBar:
    """A bar on a terminal; otherwise a plain line of text for each line of metrics."""

    def __init__(self, step: int, total_steps: int):
        """Makes a bar, which `start` shows.

        Args:
          step: the number of steps done.
          total_steps: the step at which the run ends.
        """
        self._total = total_steps
        self._first, self._started = step, 0.0
        self._bar = None
        if sys.stderr.isatty():
            self._bar = Progress(
                TextColumn("training"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[values]}"),
                TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self._task = self._bar.add_task(
                "", total=total_steps, completed=step, values="compiling"
            )

    def start(self) -> None:
        """Shows the bar."""
        if self._bar is not None:
            self._bar.start()

    def stop(self) -> None:
        """Removes the bar."""
        if self._bar is not None:
            self._bar.stop()

    def advance(self, step: int) -> None:
        """Moves the bar to `step`."""
        if not self._started:
            # Time counts from the end of the first step, which waited for compilation.
            self._first, self._started = step, time.perf_counter()
        if self._bar is not None:
            self._bar.update(self._task, completed=step)

    def show(self, line: Line) -> None:
        """Shows the numbers of a line of metrics."""
        values = (
            f"loss {line['loss']:.4f}  hit rate {line['hit_rate']:.4f}  "
            f"{line['tokens_per_sec']:,.0f} tokens/s"
        )
        if self._bar is not None:
            self._bar.update(self._task, values=values)
            return
        done = max(line["step"] - self._first, 1)
        left = (time.perf_counter() - self._started) / done * (self._total - line["step"])
        minutes, seconds = divmod(round(left), 60)
        text = f"step {line['step']:,.0f}/{self._total:,}  {values}  {minutes}:{seconds:02} left"
        print(text, file=sys.stderr, flush=True)
