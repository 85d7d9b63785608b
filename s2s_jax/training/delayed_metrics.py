"""Reads the metrics of each step while the next step runs, and passes them on."""

import math
from typing import Any, NamedTuple

import jax
import numpy as np

from s2s_jax.errors import NotFiniteError
from s2s_jax.runs.checkpoints.store import Checkpoints
from s2s_jax.runs.writer import Writer
from s2s_jax.training.common_stop import CommonStop
from s2s_jax.training.growth import GrowthPlan
from s2s_jax.training.meters import Meters
from s2s_jax.training.pair_watch import PairWatch
from s2s_jax.training.step.train_step import Metrics


class _Dispatched(NamedTuple):
    """A step whose metrics have not been read.

    Attributes:
      step: the number of the step.
      metrics: the metrics of the step, on the devices.
      input_wait: the seconds that the step waited for its batch.
    """

    step: int
    metrics: Metrics
    input_wait: float


class DelayedMetrics:
    """Reads metrics one step late, so that the devices do not wait for the host."""

    def __init__(
        self,
        meters: Meters,
        plan: GrowthPlan,
        pairs: PairWatch,
        stop: CommonStop,
        checkpoints: Checkpoints,
        writer: Writer | None,
        log_steps: int,
    ):
        """Start without a step.

        Args:
          meters: the running means and rates.
          plan: the plan of the growth of tables.
          pairs: the watch for steps that have nothing to learn from.
          stop: the agreement of all processes to stop, which is updated from the metrics.
          checkpoints: the checkpoints of the run, to name the newest one in messages.
          writer: the writer of metrics; None in all processes but the first.
          log_steps: the number of steps between lines of metrics.
        """
        self._meters, self._plan, self._pairs, self._stop = meters, plan, pairs, stop
        self._checkpoints, self._writer, self._log_steps = checkpoints, writer, log_steps
        self._pending: _Dispatched | None = None

    def add(self, step: int, metrics: Metrics, input_wait: float) -> None:
        """Add a step that was just dispatched, and read the metrics of the step before it.

        Args:
          step: the number of the step.
          metrics: the metrics of the step, which the devices are still computing.
          input_wait: the seconds that the step waited for its batch.

        Raises:
          NotFiniteError: the loss or the gradient of the step before is not finite.
          UserError: metrics.jsonl cannot be written.
        """
        last, self._pending = self._pending, _Dispatched(step, metrics, input_wait)
        self._read(last)

    def read_last(self) -> None:
        """Read the metrics of the last step, unless they have been read; raises the errors of `add`."""
        last, self._pending = self._pending, None
        self._read(last)

    def _read(self, last: _Dispatched | None) -> None:
        if last is None:
            return
        step = last.step
        values = {name: _total(x) for name, x in jax.device_get(last.metrics).items()}
        self._check_finite(step, values)
        self._stop.update(bool(values["stop"]))
        self._plan.update(step, values)
        self._pairs.update(step, values)
        self._meters.add(values, last.input_wait)
        if self._writer is not None:
            self._writer.advance(step)
        if step % self._log_steps == 0:
            line = self._meters.take_line(step)
            if self._writer is not None:
                self._writer.write(line)

    def _check_finite(self, step: int, values: dict[str, Any]) -> None:
        if math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"]):
            return
        self._checkpoints.wait()
        raise NotFiniteError(
            f"step {step}: loss {values['loss']}, gradient norm {values['grad_norm']}, expected finite "
            f"numbers; lower lr.dense_lr and lr.sparse_lr or set lr.clip_norm, and start again: the "
            f"newest checkpoint is {self._checkpoints.newest_step or 'none'}"
        )


def _total(x: np.ndarray) -> Any:
    """Return a metric as one number; some metrics are sums in several parts."""
    return x.sum(dtype=np.int64) if x.ndim else x
