"""Ranks the validation events when an evaluation is due, and records the result."""

import time
from collections.abc import Callable

import jax

from s2s_jax.cluster import hosts
from s2s_jax.runs.writer import Writer
from s2s_jax.training.common_stop import CommonStop
from s2s_jax.training.evaluations import NEIGHBOURS_WEIGHT, Evaluations
from s2s_jax.training.step.functions import StepFunctions
from s2s_jax.training.step.state import TrainState

# A function of the current functions and state that returns metrics of the validation events. Its last
# argument keeps the hosts in lockstep; see `hosts.in_lockstep`.
Evaluate = Callable[[StepFunctions, TrainState, hosts.InLockstep], dict[str, float]]


class Validator:
    """Evaluates the states of a run."""

    def __init__(
        self,
        evaluations: Evaluations,
        evaluate: Evaluate | None,
        total_steps: int,
        writer: Writer | None,
        stop: CommonStop,
    ):
        """Start with the evaluations so far.

        Args:
          evaluations: the evaluations of the run so far; new ones are added.
          evaluate: the function that ranks the validation events; None if no evaluation is ever due.
          total_steps: the step at which the run ends.
          writer: the writer of metrics; None in all processes but the first.
          stop: the request to stop, which may end an evaluation.
        """
        self._evaluations, self._evaluate = evaluations, evaluate
        self._total_steps, self._writer, self._stop = total_steps, writer, stop

    def due(self, step: int) -> bool:
        """Whether `step` should be evaluated and has not been."""
        return self._evaluations.due(step, self._total_steps)

    def evaluate(self, step: int, functions: StepFunctions, state: TrainState) -> bool:
        """Evaluate a step, and write the result.

        Args:
          step: the number of the step, which must have been saved.
          functions: the functions for the sizes of the tables in `state`.
          state: the state after the step.

        Returns:
          Whether the evaluation is complete. If a stop interrupts it, there is no result, and the
          continued run repeats it from the beginning.
        """
        begun = time.perf_counter()
        result = self._result(functions, state)
        if result is None:
            return False
        line = {"step": step} | result
        if self._writer is not None:
            self._writer.write(line)
        self._evaluations.add(line)
        key = self._evaluations.metric
        hosts.say(
            f"step {step}: {key} {line[key]:.4f}{_beside(line, key)} of "
            f"{line['eval/users']:,.0f} users, best at step {self._evaluations.best_step}, "
            f"{time.perf_counter() - begun:.1f} s"
        )
        return True

    def _result(self, functions: StepFunctions, state: TrainState) -> dict[str, float] | None:
        assert self._evaluate is not None, "evaluations are due"
        evaluate = self._evaluate

        def evaluation() -> dict[str, float]:
            # Transfer guards are per thread, and this may run in a thread of its own.
            with jax.transfer_guard("allow"):
                return evaluate(functions, state, self._stop.in_lockstep)

        return self._stop.evaluated(evaluation)


def _beside(line: dict[str, float], key: str) -> str:
    """Return what an evaluation has beside the metric `key`, in parentheses; "" if there is nothing.

    That is the same metric of other rankings, and the weight that was chosen.
    """
    names = {
        "popularity": "popularity",
        "neighbours": "neighbours",
        "model_alone": "the model alone",
    }
    texts = [
        f"{told_as} {line[other]:.4f}"
        for name, told_as in names.items()
        if (other := key.replace("/", f"/{name}/")) in line
    ]
    if NEIGHBOURS_WEIGHT in line:
        texts.append(f"with neighbours of weight {line[NEIGHBOURS_WEIGHT]:g}")
    return f" ({', '.join(texts)})" if texts else ""
