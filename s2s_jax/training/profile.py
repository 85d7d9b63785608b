"""Profiles some steps with the JAX profiler, to show where their time goes."""

from pathlib import Path

import jax

from s2s_jax.cluster import hosts
from s2s_jax.errors import MachineError
from s2s_jax.training.step.state import TrainState
from s2s_serve.storage import file_systems
from s2s_serve.storage.address import Place, StorePath
from s2s_serve.storage.scratch import Scratch


class Profile:
    """Writes a trace of some steps to `profile/` in the run directory.

    If a run starts or ends between them, it traces only its own steps.
    """

    def __init__(self, run_dir: Place, steps: tuple[int, int] | None):
        """Prepare the trace; nothing is written yet.

        Args:
          run_dir: the run directory.
          steps: the first and the last step to trace; None means no step.
        """
        self._steps = steps
        self._dir = run_dir / "profile"
        # Traces for a store are written to a temporary directory, and then copied.
        self._scratch = Scratch() if steps and isinstance(run_dir, StorePath) else None
        self._running = False

    def before(self, step: int) -> None:
        """Start the trace if `step` should be traced."""
        if self._steps is None or self._running:
            return
        if self._steps[0] <= step <= self._steps[1]:
            try:
                jax.profiler.start_trace(str(self._written))
            except (OSError, RuntimeError) as error:
                hosts.say(f"the profile cannot be written to {self._dir} ({error})")
                self._steps = None
                return
            self._running = True

    def after(self, step: int, state: TrainState) -> None:
        """Write the trace if `step`, which produced `state`, is the last one to trace."""
        if self._steps is not None and step == self._steps[1]:
            jax.block_until_ready(state)
            self.close()

    def close(self) -> None:
        """Write the trace if one was started. If that fails, print why; the run continues."""
        if not self._running:
            return
        self._running = False
        try:
            jax.profiler.stop_trace()
            if isinstance(self._dir, StorePath):
                files = [path for path in self._written.rglob("*") if path.is_file()]
                below = (path.relative_to(self._written).as_posix() for path in files)
                copies = zip(files, map(self._dir.__truediv__, below), strict=True)
                file_systems.copy_all(copies, to_store=True)
        except (OSError, RuntimeError, MachineError) as error:
            hosts.say(f"the profile cannot be written to {self._dir} ({error})")

    @property
    def _written(self) -> Path:
        """The directory of this machine that JAX writes to."""
        if self._scratch is not None:
            return self._scratch.path / "profile"
        assert isinstance(self._dir, Path)
        return self._dir
