"""Whether steps had anything to learn from."""

from pathlib import Path


class PairWatch:
    """Notices a run whose batches hold no pair of events.

    What the log itself lacks is refused before training starts; this hears of what becomes of it on the
    way: stripes that cannot be read any more, packing that leaves users one event each.

    Attributes:
      nothing: why the run must end, in a sentence; None if it need not.
      none_yet: whether no step since the beginning of the run had a pair, so that there is nothing to
        save.
    """

    def __init__(
        self,
        run_dir: Path,
        packing: int | None,
        step: int,
        steps_per_epoch: int,
        total_steps: int,
    ):
        """Starts at a step.

        Args:
          run_dir: of the run, for messages.
          packing: rows of the log that are packed into a device's batch, for messages; None: they are
            not.
          step: at which the run stands.
          steps_per_epoch: steps without a pair, in a row, that end the run.
          total_steps: at which it ends.
        """
        self.nothing: str | None = None
        self.none_yet = step == 0
        self._run_dir, self._packing = run_dir, packing
        self._steps_per_epoch, self._total_steps = steps_per_epoch, total_steps
        self._without = self._rows = self._skipped = 0

    def update(self, step: int, metrics: dict[str, float]) -> None:
        """Takes in the metrics of a step."""
        # Where padding is scored, there are pairs without any event.
        if metrics["pairs"] > 0 and metrics["tokens"] > 0:
            self.none_yet = False
            self._without = self._rows = self._skipped = 0
            return
        self._without += 1
        self._rows += int(metrics["examples"])
        self._skipped += int(metrics["skipped_rows"])
        whole_run = self.none_yet and step == self._total_steps
        if self._without >= self._steps_per_epoch or whole_run:
            self.nothing = self._why(step)

    def _why(self, step: int) -> str:
        found = (
            f"the {self._without:,} steps to step {step:,} found no pair of events to learn from"
        )
        if self._skipped > self._rows:
            return (
                f"io.data_paths: {found}: {self._skipped:,} rows could not be read; skipped.jsonl in "
                f"{self._run_dir} says why"
            )
        if self._packing is not None:
            return (
                f"io.sequences.rows: {found}: {self._packing:,} users may leave each other one event "
                f"or none; lower it, or set it to auto"
            )
        return (
            f"io.data_paths: {found} in {self._rows:,} rows that have events; look at the log with "
            f"s2s inspect"
        )
