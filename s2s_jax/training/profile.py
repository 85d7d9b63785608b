"""A trace of some steps, for looking at where their time goes."""

from pathlib import Path

import jax

from s2s_jax.cluster import hosts
from s2s_jax.config import Config
from s2s_jax.training.step.state import TrainState


class Profile:
    """Writes a trace of the steps `train.profile_steps` to `profile/` in the run directory.

    A run that starts or ends among these steps traces those that it takes.
    """

    def __init__(self, config: Config):
        """Traces what `train.profile_steps` says, None: nothing."""
        self._steps = config.train.profile_steps
        self._dir = str(Path(config.train.output_dir) / "profile")
        self._running = False

    def before(self, step: int) -> None:
        """Starts the trace if `step` is among those that are traced."""
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
        """Writes the trace if `step`, which led to `state`, is the last of them."""
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
