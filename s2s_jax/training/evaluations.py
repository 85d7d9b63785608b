"""When training evaluates, which checkpoint was best, and when to stop for lack of progress."""

from collections.abc import Sequence
from pathlib import Path

from s2s_jax.config import EvalConfig
from s2s_jax.errors import UserError
from s2s_jax.runs.metrics_file import read_lines

# Evaluations of a run whose `every_steps` is auto.
_EVALUATIONS = 10


class Evaluations:
    """The evaluations of a run so far.

    Attributes:
      values: `eval.metric` of each step that was evaluated.
      best_step: the step of the best, None before the first.
    """

    def __init__(self, settings: EvalConfig, lines: Sequence[dict[str, float]] = ()):
        """Args: the settings, and lines of metrics.jsonl up to the step that the run stands at."""
        self._settings = settings
        self._name = f"eval/{settings.metric}"
        self.values: dict[int, float] = {}
        self.best_step: int | None = None
        self._best = -1.0
        self._since_best = 0
        for line in lines:
            self.add(line)

    def add(self, line: dict[str, float]) -> None:
        """Takes in a line of metrics.jsonl."""
        if self._name not in line:
            return
        self.values[int(line["step"])] = line[self._name]
        if line[self._name] > self._best:
            self._best, self.best_step, self._since_best = line[self._name], int(line["step"]), 0
        else:
            self._since_best += 1

    def due(self, step: int, last_step: int) -> bool:
        """Whether to evaluate after `step` of a run that ends at `last_step`, where rates are least.

        So it is until that has been done: a run that was stopped before evaluates when it goes on.
        """
        every = self._settings.every_steps
        if every == "auto":
            every = max(last_step // _EVALUATIONS, 1)
        at_step = every is not None and (step % every == 0 or step == last_step)
        return at_step and step > 0 and step not in self.values

    @property
    def exhausted(self) -> bool:
        """Whether patience is at its end."""
        patience = self._settings.patience
        return patience is not None and self._since_best >= patience


def best_step(run_dir: Path, settings: EvalConfig, steps: Sequence[int]) -> int | None:
    """Of some checkpoints, that whose evaluation in metrics.jsonl was best; None if none has any."""
    lines = [line for line in read_lines(run_dir) if line["step"] in steps]
    return Evaluations(settings, lines).best_step


def chosen_step(checkpoint: str, steps: Sequence[int], run_dir: Path, settings: EvalConfig) -> int:
    """The step of the checkpoint that `--checkpoint` names.

    Args:
      checkpoint: best (by `eval.metric`; the newest where nothing was evaluated), newest, or a step.
      steps: of the whole checkpoints, rising.
      run_dir: of the run.
      settings: of the run.

    Raises:
      UserError: there is none, or none of that step.
    """
    if not steps:
        raise UserError(f"train.output_dir: {run_dir} has no whole checkpoint; train first")
    if checkpoint == "newest":
        return steps[-1]
    if checkpoint == "best":
        best = best_step(run_dir, settings, steps)
        return steps[-1] if best is None else best
    if not checkpoint.isdecimal() or int(checkpoint) not in steps:
        listed = ", ".join(map(str, steps))
        raise UserError(
            f"--checkpoint: expected best, newest or one of {listed}, found {checkpoint}"
        )
    return int(checkpoint)
