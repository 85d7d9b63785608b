"""The running means and rates of the metrics of a run."""

import time
from collections.abc import Callable
from typing import Any

from s2s_jax.training.flops import AtPeak

_MEANS = ("loss", "hit_rate", "grad_norm")
# Sums since the beginning of the run; written unless they are 0.
_COUNTS = ("skipped_rows", "cut_positions")


class Meters:
    """Means and rates over the steps since the last line of metrics.jsonl.

    The sums behind the means are saved in checkpoints, so that a continued run writes the same numbers
    as an uninterrupted one. Rates only cover the time of this process.
    """

    def __init__(
        self,
        at_peak: AtPeak | None = None,
        clock: Callable[[], float] = time.perf_counter,
        memory: Callable[[], int | None] = lambda: None,
    ):
        """Start without any steps.

        Args:
          at_peak: the time that steps would take at the peak of the devices. If it is None, the peak is
            unknown, and `mfu` is not written.
          clock: a function that returns the time in seconds.
          memory: a function that returns the peak memory of the devices in bytes. If it returns None,
            `device_memory_mb` is not written.
        """
        self._at_peak = at_peak
        self._clock, self._memory = clock, memory
        self._sums = dict.fromkeys(_MEANS, 0.0)
        self._steps = 0
        self._counts = dict.fromkeys(_COUNTS, 0)
        self._tables: dict[str, int] = {}
        self.start_rates()

    def start_rates(self) -> None:
        """Start counting time, examples and tokens again from zero."""
        self._since = self._clock()
        self._timed_steps = self._examples = self._tokens = 0
        self._input_wait = self._attended = 0.0

    def add(self, metrics: dict[str, float], input_wait: float) -> None:
        """Add a step.

        Args:
          metrics: the metrics of the step.
          input_wait: the seconds that the step waited for its batch.
        """
        for name in _MEANS:
            self._sums[name] += float(metrics[name])
        self._steps += 1
        self._timed_steps += 1
        self._examples += int(metrics["examples"])
        self._tokens += int(metrics["tokens"])
        self._input_wait += input_wait
        if "attended" in metrics:
            self._attended += float(metrics["attended"])
        for name in self._counts:
            self._counts[name] += int(metrics[name]) if name in metrics else 0
        self._tables = {name: int(x) for name, x in metrics.items() if name.startswith("table/")}

    def take_line(self, step: int) -> dict[str, float]:
        """Return the line of metrics.jsonl for `step`, and start the next line."""
        seconds = max(self._clock() - self._since, 1e-9)
        line = {"step": step} | {name: self._sums[name] / self._steps for name in _MEANS}
        line["examples_per_sec"] = self._examples / seconds
        line["tokens_per_sec"] = self._tokens / seconds
        line["step_ms"] = 1e3 * seconds / self._timed_steps
        line["input_wait_ms"] = 1e3 * self._input_wait / self._timed_steps
        if self._at_peak is not None:
            at_peak = (
                self._at_peak.step * self._timed_steps + self._at_peak.attended * self._attended
            )
            line["mfu"] = at_peak / seconds
        memory = self._memory()
        if memory is not None:
            line["device_memory_mb"] = memory / 1e6
        line |= {name: count for name, count in self._counts.items() if count}
        line |= self._tables
        self._sums = dict.fromkeys(_MEANS, 0.0)
        self._steps = 0
        self.start_rates()
        return line

    def get_state(self) -> dict[str, Any]:
        """Return the state for a checkpoint, as JSON."""
        return {
            "steps": self._steps,
            "sums": dict(self._sums),
            "counts": dict(self._counts),
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Restore a state from `get_state`."""
        self._steps = state["steps"]
        self._sums = dict(state["sums"])
        self._counts = dict(state["counts"])
