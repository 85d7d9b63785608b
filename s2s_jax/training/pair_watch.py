"""Notices runs that have nothing to learn from."""

from s2s_serve.storage.address import Place


class PairWatch:
    """Notices a run whose batches have no pairs.

    A log without pairs is refused before training starts. Batches can lack pairs even so: when stripes
    can no longer be read, or when packing leaves users only one event each.

    Attributes:
      reason_to_end: why the run must end, as a sentence; None if it can continue.
      nothing_learned: whether no step of the run had a pair so far, so that there is nothing to save.
    """

    def __init__(
        self,
        run_dir: Place,
        packing: int | None,
        step: int,
        steps_per_epoch: int,
        total_steps: int,
    ):
        """Start at a step.

        Args:
          run_dir: the run directory, for messages.
          packing: the number of rows of the log that are packed into a device's batch, for messages;
            None if rows are not packed.
          step: the current step of the run.
          steps_per_epoch: the number of consecutive steps without a pair after which the run ends.
          total_steps: the step at which the run ends.
        """
        self.reason_to_end: str | None = None
        self.nothing_learned = step == 0
        self._run_dir, self._packing = run_dir, packing
        self._steps_per_epoch, self._total_steps = steps_per_epoch, total_steps
        self._without = self._rows = self._skipped = 0

    def update(self, step: int, metrics: dict[str, float]) -> None:
        """Record the metrics of a step."""
        # If padding is scored, there are pairs even without events.
        if metrics["pairs"] > 0 and metrics["tokens"] > 0:
            self.nothing_learned = False
            self._without = self._rows = self._skipped = 0
            return
        self._without += 1
        self._rows += int(metrics["examples"])
        self._skipped += int(metrics["skipped_rows"])
        whole_run = self.nothing_learned and step == self._total_steps
        if self._without >= self._steps_per_epoch or whole_run:
            self.reason_to_end = self._message(step)

    def _message(self, step: int) -> str:
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
