"""The loop: batches in, steps and their metrics out, and what stands between steps.

Between steps tables grow or lose ids, the validation events are ranked, and checkpoints are written.
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from s2s_jax.cluster import hosts
from s2s_jax.config import Config
from s2s_jax.data.batching.dataset import HostBatch
from s2s_jax.data.batching.reader import Reader
from s2s_jax.errors import NotFiniteError, Stopped, UserError
from s2s_jax.runs.checkpoints.store import Checkpoints
from s2s_jax.runs.skip_log import SkipLog
from s2s_jax.runs.writer import Writer
from s2s_jax.signals import Stop
from s2s_jax.training import growth
from s2s_jax.training.evaluations import Evaluations
from s2s_jax.training.growth import Evictions, GrowthPlan
from s2s_jax.training.item_source import ItemSource
from s2s_jax.training.meters import Meters
from s2s_jax.training.pair_watch import PairWatch
from s2s_jax.training.profile import Profile
from s2s_jax.training.step.batches import put_stop
from s2s_jax.training.step.functions import StepFunctions, make_step_functions
from s2s_jax.training.step.schedule import Clock
from s2s_jax.training.step.state import TrainState

# From the functions and the state of now to a line of metrics of the validation events; what is done one
# after the other goes through the last argument.
Evaluate = Callable[[StepFunctions, TrainState, hosts.InStep], dict[str, float]]


class Job(NamedTuple):
    """The parts of a run that stay.

    Attributes:
      config: the configuration.
      mesh: the devices.
      reader: batches.
      checkpoints: of the run directory.
      items: of the log, where the loss needs them.
    """

    config: Config
    mesh: Mesh
    reader: Reader
    checkpoints: Checkpoints
    items: ItemSource | None

    def functions(
        self, plan: GrowthPlan, clock: Clock | None = None, step: int = 0
    ) -> StepFunctions:
        """Pure functions over the devices, for tables as large as they are now.

        Args:
          plan: of the growth of tables.
          clock: of the run; None where no steps are taken.
          step: functions are for tables as large as they will be in it, if it is not past.
        """
        return make_step_functions(self.config, self.mesh, plan.capacities_now(step), clock)


class Start(NamedTuple):
    """Where a run stands.

    Attributes:
      step: optimizer steps done.
      state: the devices' part.
      meters: running means.
      plan: of the growth of tables.
      evaluations: so far.
      clock: that learning rates follow.
      unwritten: lines of metrics up to here that metrics.jsonl lacks.
    """

    step: int
    state: TrainState
    meters: Meters
    plan: GrowthPlan
    evaluations: Evaluations
    clock: Clock
    unwritten: Sequence[dict[str, float]] = ()

    @property
    def done(self) -> bool:
        """Whether there is no further step to take, and nothing to evaluate."""
        end_step = self.clock.end_step
        return self.step >= end_step and not self.evaluations.due(self.step, end_step)


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
        """Stands before the first step.

        Args:
          job: the parts of the run that stay.
          start: where it stands.
          total_steps: at which it ends.
          writer: of metrics; None in all processes but the first.
          stop: may ask for an end.
          evaluate: ranks the validation events; called where `eval.every_steps` says, None if it says
            nowhere.
        """
        self._job, self._total_steps, self._writer, self._stop = job, total_steps, writer, stop
        self._step, self._state, self._meters, self._plan = start[:4]
        self._evaluations, self._clock = start.evaluations, start.clock
        self._place = job.reader.place
        self._evaluate = evaluate
        self._saved_step = self._step
        self._evictions = Evictions(job.config.features, job.config.tables, job.mesh)
        self._profile = Profile(job.config)
        steps, run_dir = job.reader.steps_per_epoch, Path(job.config.train.output_dir)
        self._pairs = PairWatch(run_dir, job.reader.packing, self._step, steps, total_steps)
        self._skips = SkipLog(run_dir, job.reader.skipped_files, host=jax.process_index())
        self._pending: tuple[int, Any, float] | None = None
        self._compiled: Any = None
        self._functions: StepFunctions | None = None
        self._alone = jax.process_count() == 1
        # Whether all processes know that one was told to stop.
        self._agreed = False

    def run(self) -> bool:
        """Runs to the end, or to a stop, and saves; returns whether it was told to stop.

        Raises:
          UserError: a batch cannot be read, a table is full or nothing is left to learn from; what was
            trained is saved. Or something cannot be written; what was trained is saved if it can be.
          NotFiniteError: loss or gradient not finite; nothing is saved after the last good step.
        """
        try:
            # Hidden copies between host and device would be slow, so they fail instead.
            with contextlib.closing(self._profile), jax.transfer_guard("disallow"):
                self._take_steps()
        except (UserError, OSError):
            # Of several processes the others know nothing of it and could not save with this one.
            if self._alone and not self._job.checkpoints.failed:
                with contextlib.suppress(UserError):  # Of lines that still cannot be written.
                    self._read_pending()
                self._save()
            self._job.checkpoints.wait()
            raise
        self._save()
        self._refuse(self._pairs.nothing)
        if self._evaluations.exhausted:
            hosts.say(
                f"stopped after step {self._step}: {self._job.config.eval.patience} evaluations in a "
                f"row were no better than that of step {self._evaluations.best_step}"
            )
        self._job.checkpoints.wait()
        return self._stopping and not self._done

    def _take_steps(self) -> None:
        # A run that was stopped between saving and evaluating has yet to evaluate.
        self._evaluate_if_due()
        while not self._stopping and not self._done:
            self._refuse(self._plan.full)
            self._refuse(self._pairs.nothing)
            asked = time.perf_counter()
            batch = self._next_batch()
            if batch is None:
                return
            waited = time.perf_counter() - asked
            arrays: dict[str, jax.Array] = batch.arrays
            if self._job.items is not None:
                arrays = arrays | self._job.items.draw(self._step + 1)
            if self._compiled is None or self._plan.due(self._step + 1):
                if not self._compile(arrays):
                    return
                waited = 0.0
            self._grow_and_evict()
            self._take_step(batch, arrays, waited)
            self._save_and_evaluate()

    @property
    def _done(self) -> bool:
        """Whether there is no further step to take, and nothing to evaluate."""
        if self._evaluations.exhausted:
            return True
        due = self._evaluations.due(self._step, self._total_steps)
        return self._step >= self._total_steps and not due

    @property
    def _stopping(self) -> bool:
        """Whether to take no further step, which all processes see alike."""
        return self._agreed or (self._alone and self._stop.requested is not None)

    def _next_batch(self) -> HostBatch | None:
        """The next batch; None if told to stop while waiting for it."""
        if not self._alone:
            return next(self._job.reader)
        try:
            with self._stop.at_once():
                return next(self._job.reader)
        except Stopped:
            return None

    def _compile(self, arrays: dict[str, jax.Array]) -> bool:
        """Compiles the next step, before tables grow for it; returns False if told to stop meanwhile."""
        # Steps before are not part of what is timed anew.
        self._read_pending()
        functions = self._job.functions(self._plan, self._clock, self._step + 1)
        arrays = arrays | put_stop(False, self._job.mesh)
        compiled = self._stop.unless_stopped(
            lambda: functions.train_step.lower(functions.abstract, arrays).compile()
        )
        if hosts.any_told(self._stop.requested is not None):
            self._agreed = True
            return False
        self._functions, self._compiled = functions, compiled
        # Rates leave out compilation and the first reading.
        self._meters.start_rates()
        return True

    def _grow_and_evict(self) -> None:
        for name in self._plan.take(self._step + 1):
            hosts.say(f"step {self._step}: table {name} grows")
            with jax.transfer_guard("allow"):
                self._state = growth.doubled(self._state, name, self._job.mesh)
        self._state = self._evictions.before(self._step + 1, self._state)

    def _refuse(self, reason: str | None) -> None:
        """Ends the run, saved, if there is a reason."""
        if reason is not None:
            self._save()
            self._job.checkpoints.wait()
            raise UserError(reason)

    def _take_step(self, batch: HostBatch, arrays: dict[str, jax.Array], waited: float) -> None:
        if not self._alone:
            told = put_stop(self._stop.requested is not None, self._job.mesh)
            arrays = arrays | told
        self._profile.before(self._step + 1)
        self._state, metrics = self._compiled(self._state, arrays)
        last, self._pending = self._pending, (self._step + 1, metrics, waited)
        self._step += 1
        # From here on all is that of the new step, whatever fails.
        self._place = batch.after
        self._read(last)
        self._skips.add(batch.skipped)
        self._job.checkpoints.check()
        self._profile.after(self._step, self._state)

    def _read_pending(self) -> None:
        """Reads the metrics of the last step, if they have not been read."""
        last, self._pending = self._pending, None
        self._read(last)

    def _read(self, last: tuple[int, Any, float] | None) -> None:
        if last is None:
            return
        step, metrics, waited = last
        values = {name: _total(x) for name, x in jax.device_get(metrics).items()}
        _check_finite(step, values, self._job.checkpoints)
        self._agreed = self._agreed or bool(values["stop"])
        self._plan.update(step, values)
        self._pairs.update(step, values)
        self._meters.add(values, waited)
        if self._writer is not None:
            self._writer.advance(step)
        if step % self._job.config.train.log_steps == 0:
            line = self._meters.take_line(step)
            if self._writer is not None:
                self._writer.write(line)

    def _save_and_evaluate(self) -> None:
        evaluates = self._evaluations.due(self._step, self._total_steps)
        if (
            evaluates
            or self._step % self._job.config.train.save_steps == 0
            or self._step == self._total_steps
            or self._stopping
        ):
            self._save()
        self._evaluate_if_due()

    def _evaluate_if_due(self) -> None:
        """Evaluates this step, which is saved, and writes what was found.

        One that is interrupted is given up, and done from the beginning when the run goes on.
        """
        if self._stopping or not self._evaluations.due(self._step, self._total_steps):
            return
        if self._functions is None:
            self._functions = self._job.functions(self._plan, self._clock)
        begun = time.perf_counter()
        found = self._evaluation(self._functions)
        if found is None:
            return
        line = {"step": self._step} | found
        if self._writer is not None:
            self._writer.write(line)
        self._evaluations.add(line)
        name = f"eval/{self._job.config.eval.metric}"
        hosts.say(
            f"step {self._step}: {name} {line[name]:.4f} of {line['eval/users']:,.0f} users, best at "
            f"step {self._evaluations.best_step}, {time.perf_counter() - begun:.1f} s"
        )
        self._meters.start_rates()

    def _evaluation(self, functions: StepFunctions) -> dict[str, float] | None:
        """What an evaluation finds; None if told to stop meanwhile."""

        assert self._evaluate is not None, "evaluations are due"
        evaluation = self._evaluate

        def evaluate() -> dict[str, float]:
            with jax.transfer_guard("allow"):
                return evaluation(functions, self._state, self._in_step)

        try:
            return self._stop.unless_stopped(evaluate) if self._alone else evaluate()
        except Stopped:
            self._agreed = True
            return None

    def _in_step(self, items: Iterable[Any], fact_of: Callable[[Any], int]) -> Iterator[Any]:
        return hosts.in_step(items, fact_of, self._stop)

    def _save(self) -> None:
        self._read_pending()
        if self._step > self._saved_step and not self._pairs.none_yet:
            reached: dict[str, Any] = {
                "reader": self._job.reader.get_state(self._place),
                "meters": self._meters.get_state(),
                "growth": self._plan.get_state(),
                "clock": self._clock.get_state(),
                "catalogue": None if self._job.items is None else self._job.items.fingerprint,
            }
            if self._writer is not None and self._writer.unwritten:
                reached["unwritten"] = self._writer.unwritten
            checkpoints, values = self._job.checkpoints, self._evaluations.values
            checkpoints.save(self._step, self._state, reached, values)
            self._saved_step = self._step


def _total(x: np.ndarray) -> Any:
    """A number of the metrics, added up where it comes in parts."""
    return x.sum(dtype=np.int64) if x.ndim else x


def _check_finite(step: int, values: dict[str, Any], checkpoints: Checkpoints) -> None:
    if math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"]):
        return
    checkpoints.wait()
    raise NotFiniteError(
        f"step {step}: loss {values['loss']}, gradient norm {values['grad_norm']}, expected finite "
        f"numbers; lower lr.dense_lr and lr.sparse_lr or set lr.clip_norm, and start again: the newest "
        f"checkpoint is {checkpoints.newest_step or 'none'}"
    )
