"""Saves checkpoints of a run."""

from typing import Any

from s2s_jax.data.batching.places import Place
from s2s_jax.runs.writer import Writer
from s2s_jax.training.job import Job, Start
from s2s_jax.training.pair_watch import PairWatch
from s2s_jax.training.step.state import TrainState


class Saver:
    """Saves each step at most once, with everything that the run needs to continue after it."""

    def __init__(self, job: Job, start: Start, pairs: PairWatch, writer: Writer | None):
        """Start with the first step of the run, or the step that it continues from, as saved.

        Args:
          job: the parts of the run that do not change.
          start: where the run starts; the current state of its meters, plan and evaluations is saved.
          pairs: the watch that knows whether anything was learned.
          writer: the writer that keeps lines it could not write; None in all processes but the first.
        """
        self._job, self._start, self._pairs, self._writer = job, start, pairs, writer
        self._saved_step = start.step

    def save(self, step: int, state: TrainState, place: Place) -> None:
        """Save a step in the background, unless it is saved or nothing was learned so far.

        Args:
          step: the number of the step, whose metrics have been read.
          state: the state after the step.
          place: the reading position after the step.

        Raises:
          UserError: this checkpoint, or the previous one, cannot be written.
        """
        if step <= self._saved_step or self._pairs.nothing_learned:
            return
        job, start = self._job, self._start
        progress: dict[str, Any] = {
            "reader": job.reader.get_state(place),
            "meters": start.meters.get_state(),
            "growth": start.plan.get_state(),
            "clock": start.clock.get_state(),
            "catalogue": None if job.items is None else job.items.fingerprint,
        }
        if job.settings.lr.average_decay is not None:
            progress["average_decay"] = job.settings.lr.average_decay
        if self._writer is not None:
            self._writer.flush()
            if self._writer.unwritten:
                progress["unwritten"] = self._writer.unwritten
        job.checkpoints.save(step, state, progress, start.evaluations.values)
        self._saved_step = step
