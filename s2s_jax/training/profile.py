"""Traces some steps with the JAX profiler, to show where their time goes."""

from pathlib import Path

import jax

from s2s_jax.cluster import hosts
from s2s_jax.training.step.state import TrainState


class Profile:
    """Writes a trace of some steps to `profile/` in the run directory.

    A run that starts or ends among these steps traces those that it takes.
    """

    def __init__(self, run_dir: Path, steps: tuple[int, int] | None):
        """Prepares the trace; nothing is written yet.

        Args:
          run_dir: the run directory.
          steps: first and last step to trace; None: no step is traced.
        """
        self._steps = steps
        self._dir = str(run_dir / "profile")
        self._running = False

    def before(self, step: int) -> None:
        """Starts the trace if `step` should be traced."""
        if self._steps is None or self._running:
            return
        if self._steps[0] <= step <= self._steps[1]:
            try:
                jax.profiler.start_trace(self._dir)
            except (OSError, RuntimeError) as error:
                hosts.say(f"the profile cannot be written to {self._dir} ({error})")
                self._steps = None
                return
            self._running = True

    def after(self, step: int, state: TrainState) -> None:
        """Writes the trace if `step`, which produces `state`, is the last one to trace."""
        if self._steps is not None and step == self._steps[1]:
            jax.block_until_ready(state)
            self.close()

    def close(self) -> None:
        """Writes the trace if one was started. If that fails, it says so, and the run continues."""
        if not self._running:
            return
        self._running = False
        try:
            jax.profiler.stop_trace()
        except (OSError, RuntimeError) as error:
            hosts.say(f"the profile cannot be written to {self._dir} ({error})")
