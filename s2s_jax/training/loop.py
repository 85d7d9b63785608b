"""The loop: batches in, steps and their metrics out, and what stands between steps.

Between steps tables grow or lose ids, the validation events are ranked, and checkpoints are written.
"""

import contextlib
import math
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, Self

import jax
import numpy as np
from jax.sharding import Mesh

from s2s_jax.config import Config
from s2s_jax.data.pipeline import Batch, Reader
from s2s_jax.errors import NotFiniteError, UserError
from s2s_jax.training import growth, hosts, validation
from s2s_jax.training.checkpoint import Checkpoints
from s2s_jax.training.growth import Evictions, GrowthPlan
from s2s_jax.training.metrics import Meters, SkipLog, Writer
from s2s_jax.training.negatives import ItemSource
from s2s_jax.training.pair_watch import PairWatch
from s2s_jax.training.schedule import Clock
from s2s_jax.training.step import StepFunctions, TrainState, make_step_functions

# From the functions and the state of now to a line of metrics of the validation events.
Evaluate = Callable[[StepFunctions, TrainState], dict[str, float]]


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

    def functions(self, plan: GrowthPlan, clock: Clock | None = None) -> StepFunctions:
        """Pure functions over the devices, for tables as large as they are now.

        Args:
          plan: of the growth of tables.
          clock: of the run; None where no steps are taken.
        """
        return make_step_functions(self.config, self.mesh, plan.capacities_now(), clock)


class Progress(NamedTuple):
    """Where a run stands.

    Attributes:
      step: optimizer steps done.
      state: the devices' part.
      meters: running means.
      plan: of the growth of tables.
      evaluations: so far.
      clock: that learning rates follow.
    """

    step: int
    state: TrainState
    meters: Meters
    plan: GrowthPlan
    evaluations: validation.Progress
    clock: Clock


class StopSignals:
    """Notes SIGTERM and SIGINT for the loop to see; a second one ends the process at once.

    Several processes must stop after the same step. So each sends with its batches whether it was told
    to, and all hear of it in the metrics of the same step.

    Attributes:
      requested: name of the signal that came, None if none did.
    """

    def __init__(self) -> None:
        self.requested: str | None = None
        self._heard = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @property
    def now(self) -> bool:
        """Whether to take no further step."""
        alone = jax.process_count() == 1
        return self._heard or (alone and self.requested is not None)

    def hear(self, told: bool) -> None:
        """Takes in whether any process was told to stop, as a step's metrics say."""
        self._heard = self._heard or told
        if told and self.requested is None:
            self.requested = "a signal to another host"

    def _note(self, number: int, _: FrameType | None) -> None:
        self.requested = signal.Signals(number).name
        signal.signal(number, signal.SIG_DFL)


class Loop:
    """Takes steps until the run ends. Step n is dispatched before the metrics of step n - 1 are read."""

    def __init__(
        self,
        job: Job,
        progress: Progress,
        total_steps: int,
        writer: Writer | None,
        stop: StopSignals,
        evaluate: Evaluate,
    ):
        """Stands before the first step.

        Args:
          job: the parts of the run that stay.
          progress: where it stands.
          total_steps: at which it ends.
          writer: of metrics; None in all processes but the first.
          stop: signals.
          evaluate: ranks the validation events; called where `eval.every_steps` says.
        """
        self._job, self._total_steps, self._writer, self._stop = job, total_steps, writer, stop
        self._step, self._state, self._meters, self._plan, self._evaluations, self._clock = progress
        self._evaluate = evaluate
        self._saved_step = self._step
        self._evictions = Evictions(job.config, job.mesh)
        self._profile = _Profile(job.config)
        steps = job.reader.steps_per_epoch
        self._pairs = PairWatch(job.config, self._step, steps, total_steps)
        run_dir = Path(job.config.train.output_dir)
        self._skips = SkipLog(run_dir, job.reader.skipped_files, host=jax.process_index())
        self._pending: tuple[int, Any, float] | None = None
        self._compiled: Any = None
        self._functions: StepFunctions | None = None

    def run(self) -> None:
        """Runs to the end, or to a stop, and saves.

        Raises:
          UserError: a batch cannot be read, a table is full or nothing is left to learn from; what was
            trained is saved.
          NotFiniteError: loss or gradient not finite; nothing is saved after the last good step.
        """
        # Hidden copies between host and device would be slow, so they fail instead.
        with contextlib.closing(self._profile), jax.transfer_guard("disallow"):
            while (
                self._step < self._total_steps
                and not self._stop.now
                and not self._evaluations.exhausted
            ):
                self._grow_and_evict()
                batch, waited = self._next_batch()
                self._take_step(batch, waited)
                self._evaluate_and_save()
        self._save()
        self._refuse(self._pairs.nothing)
        if self._evaluations.exhausted:
            hosts.say(
                f"stopped after step {self._step}: {self._job.config.eval.patience} evaluations in a "
                f"row were no better than that of step {self._evaluations.best_step}"
            )
        self._job.checkpoints.wait()

    def _grow_and_evict(self) -> None:
        self._refuse(self._plan.full)
        self._refuse(self._pairs.nothing)
        for name in self._plan.take(self._step + 1):
            hosts.say(f"step {self._step}: table {name} grows")
            with jax.transfer_guard("allow"):
                self._state = growth.doubled(self._state, name, self._job.mesh)
            self._compiled = None
        self._state = self._evictions.before(self._step + 1, self._state)

    def _refuse(self, reason: str | None) -> None:
        """Ends the run, saved, if there is a reason."""
        if reason is not None:
            self._save()
            self._job.checkpoints.wait()
            raise UserError(reason)

    def _next_batch(self) -> tuple[Batch, float]:
        """The next batch, and how many seconds it was waited for."""
        asked = time.perf_counter()
        try:
            batch = next(self._job.reader)
        except UserError:
            # Nothing trained is lost; the position is that of before the batch that failed. Of several
            # processes the others know nothing of it and could not save with this one.
            if jax.process_count() == 1:
                self._save()
            raise
        return batch, time.perf_counter() - asked

    def _take_step(self, batch: Batch, waited: float) -> None:
        self._skips.add(batch.skipped)
        arrays = batch.arrays
        if self._job.items is not None:
            arrays = arrays | self._job.items.draw(self._step + 1)
        if self._compiled is None:
            # Steps before are not part of what is timed anew.
            self._read_pending()
            self._functions = self._job.functions(self._plan, self._clock)
            self._compiled = self._functions.train_step.lower(self._state, arrays).compile()
            # Rates leave out compilation and the first reading.
            self._meters.start_rates()
            waited = 0.0
        self._profile.before(self._step + 1)
        self._state, metrics = self._compiled(self._state, arrays)
        self._read_pending()
        self._step += 1
        self._pending = (self._step, metrics, waited)
        self._profile.after(self._step, self._state)

    def _read_pending(self) -> None:
        """Reads the metrics of the last step, if they have not been read."""
        if self._pending is None:
            return
        step, metrics, waited = self._pending
        self._pending = None
        values = {name: _total(x) for name, x in jax.device_get(metrics).items()}
        _check_finite(step, values, self._job.checkpoints)
        self._stop.hear(bool(values["stop"]))
        self._plan.hear(step, values)
        self._pairs.hear(step, values)
        self._meters.add(values, waited)
        if self._writer is not None:
            self._writer.advance(step)
        if step % self._job.config.train.log_steps == 0:
            line = self._meters.take_line(step)
            if self._writer is not None:
                self._writer.write(line)

    def _evaluate_and_save(self) -> None:
        settings = self._job.config.train
        if self._evaluations.due(self._step, self._total_steps):
            self._save(self._evaluation())
        elif (
            self._step % settings.save_steps == 0
            or self._step == self._total_steps
            or self._stop.now
        ):
            self._save()

    def _evaluation(self) -> float:
        """Writes an evaluation of this step, and returns what the best is chosen by."""
        assert self._functions is not None, "a step came before"
        self._read_pending()
        begun = time.perf_counter()
        with jax.transfer_guard("allow"):
            line = {"step": self._step} | self._evaluate(self._functions, self._state)
        self._evaluations.hear(line)
        name = f"eval/{self._job.config.eval.metric}"
        if self._writer is not None:
            self._writer.write(line)
        hosts.say(
            f"step {self._step}: {name} {line[name]:.4f} of {line['eval/users']:,.0f} users, best at "
            f"step {self._evaluations.best_step}, {time.perf_counter() - begun:.1f} s"
        )
        self._meters.start_rates()
        return line[name]

    def _save(self, metric: float | None = None) -> None:
        self._read_pending()
        if self._step > self._saved_step and not self._pairs.none_yet:
            reached = {
                "reader": self._job.reader.get_state(),
                "meters": self._meters.get_state(),
                "growth": self._plan.get_state(),
                "clock": self._clock.get_state(),
            }
            self._job.checkpoints.save(self._step, self._state, reached, metric)
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


class _Profile:
    """Writes a trace of the steps `train.profile_steps` to `profile/` in the run directory.

    A run that starts or ends among these steps traces those that it takes.
    """

    def __init__(self, config: Config):
        self._steps = config.train.profile_steps
        self._dir = str(Path(config.train.output_dir) / "profile")
        self._running = False

    def before(self, step: int) -> None:
        if self._steps is None or self._running:
            return
        if self._steps[0] <= step <= self._steps[1]:
            jax.profiler.start_trace(self._dir)
            self._running = True

    def after(self, step: int, state: TrainState) -> None:
        if self._steps is not None and step == self._steps[1]:
            jax.block_until_ready(state)
            self.close()

    def close(self) -> None:
        """Writes the trace if one is being made. It is worth less than the run, which goes on."""
        if not self._running:
            return
        self._running = False
        try:
            jax.profiler.stop_trace()
        except (OSError, RuntimeError) as error:
            hosts.say(f"the profile cannot be written to {self._dir} ({error})")
