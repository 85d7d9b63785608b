"""The training loop: takes steps, and between them grows tables, evaluates and saves."""

import contextlib
import time
from typing import Any

import jax

from s2s_jax.cluster import hosts
from s2s_jax.data.batching.dataset import HostBatch
from s2s_jax.errors import UserError
from s2s_jax.runs.place import place_of_run
from s2s_jax.runs.skip_log import SkipLog
from s2s_jax.runs.writer import Writer
from s2s_jax.signals import Stop
from s2s_jax.training import growth
from s2s_jax.training.common_stop import CommonStop
from s2s_jax.training.delayed_metrics import DelayedMetrics
from s2s_jax.training.growth import Evictions
from s2s_jax.training.job import Job, Start
from s2s_jax.training.pair_watch import PairWatch
from s2s_jax.training.profile import Profile
from s2s_jax.training.saver import Saver
from s2s_jax.training.step.batches import Batch, put_stop
from s2s_jax.training.step.functions import StepFunctions
from s2s_jax.training.validator import Evaluate, Validator


class Loop:
    """Takes steps until the run ends. Step n is dispatched before the metrics of step n - 1 are read."""

    def __init__(
        self,
        job: Job,
        start: Start,
        total_steps: int,
        writer: Writer | None,
        stop: Stop,
        evaluate: Evaluate | None,
    ):
        """Prepare the loop; nothing runs yet.

        Args:
          job: the parts of the run that do not change.
          start: where the run starts.
          total_steps: the step at which the run ends.
          writer: the writer of metrics; None in all processes but the first.
          stop: the request to stop the run early.
          evaluate: the function that ranks the validation events; None if `eval.every_steps` is None.
        """
        settings, reader = job.train, job.reader
        run_dir = place_of_run(settings.output_dir)
        self._job, self._total_steps = job, total_steps
        self._step, self._state, self._place = start.step, start.state, reader.place
        self._plan, self._clock, self._meters = start.plan, start.clock, start.meters
        self._evaluations = start.evaluations
        self._stop = CommonStop(stop, job.mesh)
        self._pairs = PairWatch(
            run_dir, reader.packing, start.step, reader.steps_per_epoch, total_steps
        )
        self._metrics = DelayedMetrics(
            start.meters,
            start.plan,
            self._pairs,
            self._stop,
            job.checkpoints,
            writer,
            settings.log_steps,
        )
        self._saver = Saver(job, start, self._pairs, writer)
        self._validator = Validator(start.evaluations, evaluate, total_steps, writer, self._stop)
        self._evictions = Evictions(job.settings.items.features, job.settings.tables, job.mesh)
        self._profile = Profile(run_dir, settings.profile_steps)
        self._skips = SkipLog(run_dir, reader.skipped_files, host=jax.process_index())
        self._functions: StepFunctions | None = None
        self._compiled_step: Any = None

    def run(self) -> bool:
        """Train until the end or a stop, and save the result.

        Returns:
          Whether a stop ended the run early.

        Raises:
          UserError: a batch cannot be read, a table is full, there is nothing to learn from, or
            something cannot be written. What was trained is saved if possible. If only one of several
            processes has the error, this is not possible.
          NotFiniteError: the loss or the gradient is not finite; nothing is saved after the last good
            step.
        """
        try:
            # Unintended copies between host and devices would be slow, so they fail instead.
            with contextlib.closing(self._profile), jax.transfer_guard("disallow"):
                self._take_steps()
        except (UserError, OSError):
            # Other processes do not know about the error, so they would not save together with this one:
            # they have begun the next step, which has replaced the state and waits for this process.
            if self._stop.alone and not self._job.checkpoints.failed:
                with contextlib.suppress(UserError):  # The lines may still be impossible to write.
                    self._metrics.read_last()
                self._save()
            self._job.checkpoints.wait()
            raise
        self._save()
        self._end_with(self._pairs.reason_to_end)
        if self._evaluations.exhausted:
            hosts.say(
                f"stopped after step {self._step}: {self._job.eval.patience} evaluations in a "
                f"row were no better than that of step {self._evaluations.best_step}"
            )
        self._job.checkpoints.wait()
        return self._stop.stopping and not self._done

    def _take_steps(self) -> None:
        # A run that was stopped between saving and evaluating evaluates first.
        self._evaluate_if_due()
        while not self._stop.stopping and not self._done:
            self._end_with(self._plan.full)
            self._end_with(self._pairs.reason_to_end)
            begun = time.perf_counter()
            batch = self._stop.next_batch(self._job.reader)
            if batch is None:
                return
            input_wait = time.perf_counter() - begun
            arrays: Batch = batch.arrays
            if self._job.items is not None:
                arrays = {**arrays, **self._job.items.draw(self._step + 1)}
            if self._compiled_step is None or self._plan.due(self._step + 1):
                if not self._compile(arrays):
                    return
                input_wait = 0.0
            self._grow_and_evict()
            self._take_step(batch, arrays, input_wait)
            self._save_if_due()
            self._evaluate_if_due()

    @property
    def _done(self) -> bool:
        """Whether there is no step left to take and nothing left to evaluate."""
        if self._evaluations.exhausted:
            return True
        return self._step >= self._total_steps and not self._validator.due(self._step)

    def _end_with(self, reason: str | None) -> None:
        """If there is a reason to end the run, save the state and raise the reason as a `UserError`."""
        if reason is not None:
            self._save()
            self._job.checkpoints.wait()
            raise UserError(reason)

    def _compile(self, arrays: Batch) -> bool:
        """Compile the next step for the sizes that tables will have.

        Returns:
          Whether the step was compiled; False if a stop was requested.
        """
        # Rates start again after compilation, so the steps before it must be counted first.
        self._metrics.read_last()
        functions = self._job.functions(self._plan, self._clock, self._step + 1)
        arrays = {**arrays, **put_stop(False, self._job.mesh)}
        compiled = self._stop.compiled(
            lambda: functions.train_step.lower(functions.abstract, arrays).compile()
        )
        if compiled is None:
            return False
        self._functions, self._compiled_step = functions, compiled
        # Rates leave out compilation and the first reading.
        self._meters.start_rates()
        return True

    def _grow_and_evict(self) -> None:
        for name in self._plan.take(self._step + 1):
            hosts.say(f"step {self._step}: table {name} grows")
            with jax.transfer_guard("allow"):
                self._state = growth.doubled(self._state, name, self._job.mesh)
        self._state = self._evictions.before(self._step + 1, self._state)

    def _take_step(self, batch: HostBatch, arrays: Batch, input_wait: float) -> None:
        arrays = self._stop.with_request(arrays)
        self._profile.before(self._step + 1)
        self._state, metrics = self._compiled_step(self._state, arrays)
        # The step is recorded before anything can fail, so that it can still be saved.
        self._step += 1
        self._place = batch.after
        self._metrics.add(self._step, metrics, input_wait)
        self._skips.add(batch.skipped)
        self._job.checkpoints.check()
        self._profile.after(self._step, self._state)

    def _save_if_due(self) -> None:
        """Save if it is time; also before evaluations, so that the best step can be kept."""
        if (
            self._validator.due(self._step)
            or self._step % self._job.train.save_steps == 0
            or self._step == self._total_steps
            or self._stop.stopping
        ):
            self._save()

    def _save(self) -> None:
        self._metrics.read_last()
        self._saver.save(self._step, self._state, self._place)

    def _evaluate_if_due(self) -> None:
        if self._stop.stopping or not self._validator.due(self._step):
            return
        if self._functions is None:
            self._functions = self._job.functions(self._plan, self._clock)
        if self._validator.evaluate(self._step, self._functions, self._state):
            # Rates leave out evaluations.
            self._meters.start_rates()
