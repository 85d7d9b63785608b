"""Ranks the validation events when an evaluation is due, and records the result."""

import time
from collections.abc import Callable

import jax

from s2s_jax.cluster import hosts
from s2s_jax.runs.writer import Writer
from s2s_jax.training.common_stop import CommonStop
from s2s_jax.training.evaluations import Evaluations
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
            f"step {step}: {key} {line[key]:.4f}{_without_model(line, key)} of "
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


def _without_model(line: dict[str, float], key: str) -> str:
    """Return the metric `key` of the rankings without a model, in parentheses; "" if there are none."""
    keys = {name: key.replace("/", f"/{name}/") for name in ("popularity", "neighbours")}
    texts = [f"{name} {line[key]:.4f}" for name, key in keys.items() if key in line]
    return f" ({', '.join(texts)})" if texts else ""
