"""The evaluations of a run: when they are due, which checkpoint is best, and when to stop early."""

from collections.abc import Sequence

from s2s_jax.config import EvalConfig
from s2s_jax.errors import UserError
from s2s_jax.runs.metrics_file import read_lines
from s2s_serve.storage.address import Place

# The key of the weight of counted neighbours that an evaluation chose, with `eval.neighbours` auto.
NEIGHBOURS_WEIGHT = "eval/neighbours_weight"
# The largest number of evaluations in a run with `eval.every_steps` auto.
_EVALUATIONS = 10


class Evaluations:
    """The evaluations of a run so far.

    Attributes:
      metric: the key of `eval.metric` in metrics.jsonl.
      values: the value of this metric for each step that was evaluated.
      best_step: the step with the best value; None before the first evaluation.
      best_line: the line of this step.
    """

    def __init__(self, settings: EvalConfig, lines: Sequence[dict[str, float]] = ()):
        """Start with the evaluations among some lines of metrics.jsonl.

        Args:
          settings: the settings of evaluation.
          lines: the lines up to the current step of the run.
        """
        self._settings = settings
        self.metric = f"eval/{settings.metric}"
        self.values: dict[int, float] = {}
        self.best_step: int | None = None
        self.best_line: dict[str, float] | None = None
        self._since_best = 0
        for line in lines:
            self.add(line)

    def add(self, line: dict[str, float]) -> None:
        """Add a line of metrics.jsonl; lines that are not evaluations are ignored."""
        if self.metric not in line:
            return
        self.values[int(line["step"])] = line[self.metric]
        if self.best_line is None or line[self.metric] > self.best_line[self.metric]:
            self.best_line, self.best_step, self._since_best = line, int(line["step"]), 0
        else:
            self._since_best += 1

    def due(self, step: int, last_step: int) -> bool:
        """Whether `step` should be evaluated and has not been.

        A run that was stopped just before an evaluation does it when it continues.

        Args:
          step: the current step.
          last_step: the step at which the run ends; it is always evaluated, because learning rates are
            lowest there.
        """
        every = self._settings.every_steps
        if every == "auto":
            # Rounded up, so that no more evaluations fit into a run.
            every = -(-last_step // _EVALUATIONS)
        at_step = every is not None and (step % every == 0 or step == last_step)
        return at_step and step > 0 and step not in self.values

    @property
    def exhausted(self) -> bool:
        """Whether training should stop because `eval.patience` has run out."""
        patience = self._settings.patience
        return patience is not None and self._since_best >= patience


def best_step(run_dir: Place, settings: EvalConfig, steps: Sequence[int]) -> int | None:
    """Return the step with the best evaluation in metrics.jsonl, or None if none was evaluated."""
    lines = [line for line in read_lines(run_dir) if line["step"] in steps]
    return Evaluations(settings, lines).best_step


def chosen_weight(lines: Sequence[dict[str, float]], step: int) -> float | None:
    """Return the weight of counted neighbours that belongs to the checkpoint of a step.

    A checkpoint is saved before its step is evaluated, so the lines have the weight, as they have the
    metric that says which checkpoint is best.

    Args:
      lines: lines of metrics.jsonl.
      step: the step of the checkpoint.

    Returns:
      The weight that the newest evaluation up to this step chose; None if none chose one.
    """
    chose = [line for line in lines if NEIGHBOURS_WEIGHT in line and line["step"] <= step]
    newest = max(chose, key=lambda line: line["step"], default=None)
    return None if newest is None else newest[NEIGHBOURS_WEIGHT]


def chosen_step(checkpoint: str, steps: Sequence[int], run_dir: Place, settings: EvalConfig) -> int:
    """Return the step of the checkpoint that `--checkpoint` names.

    Args:
      checkpoint: best (by `eval.metric`; the newest if nothing was evaluated), newest, or a step.
      steps: the steps of the complete checkpoints, in ascending order.
      run_dir: the run directory.
      settings: the settings of evaluation of the run.

    Raises:
      UserError: there is no complete checkpoint, or none of this step.
    """
    if not steps:
        raise UserError(f"train.output_dir: {run_dir} has no complete checkpoint; train first")
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
