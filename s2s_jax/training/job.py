"""The parts of a run, and the step where it starts."""

from collections.abc import Sequence
from typing import NamedTuple

from jax.sharding import Mesh

from s2s_jax.config import EvalConfig, TrainConfig
from s2s_jax.data.batching.reader import Reader
from s2s_jax.runs.checkpoints.store import Checkpoints
from s2s_jax.training.evaluations import Evaluations
from s2s_jax.training.growth import GrowthPlan
from s2s_jax.training.item_source import ItemSource
from s2s_jax.training.meters import Meters
from s2s_jax.training.step.functions import StepFunctions, make_step_functions
from s2s_jax.training.step.schedule import Clock
from s2s_jax.training.step.settings import StepSettings
from s2s_jax.training.step.state import TrainState


class Job(NamedTuple):
    """The parts of a run that do not change while it trains.

    Attributes:
      settings: the settings of a step.
      train: the settings of training.
      eval: the settings of evaluation.
      mesh: the devices.
      reader: the reader of the log.
      checkpoints: the checkpoints of the run directory.
      items: the source of negatives and of shares of items; None if the loss needs neither.
    """

    settings: StepSettings
    train: TrainConfig
    eval: EvalConfig
    mesh: Mesh
    reader: Reader
    checkpoints: Checkpoints
    items: ItemSource | None

    def functions(
        self, plan: GrowthPlan, clock: Clock | None = None, step: int = 0
    ) -> StepFunctions:
        """Return the pure functions for the sizes that growing tables have in a step.

        Args:
          plan: the plan of the growth of tables.
          clock: the clock of the run; None if no steps are taken.
          step: the step; for a past step, the tables have their current sizes.
        """
        return make_step_functions(self.settings, self.mesh, plan.capacities_now(step), clock)


class Start(NamedTuple):
    """Where a run begins or continues.

    Attributes:
      step: the number of optimizer steps done.
      state: the state on the devices.
      meters: the running means and rates of the metrics.
      plan: the plan of the growth of tables.
      evaluations: the evaluations so far.
      clock: the clock that learning rates follow.
      unwritten: the lines of metrics up to this step that metrics.jsonl lacks.
    """

    step: int
    state: TrainState
    meters: Meters
    plan: GrowthPlan
    evaluations: Evaluations
    clock: Clock
    unwritten: Sequence[dict[str, float]] = ()

    @property
    def done(self) -> bool:
        """Whether there is no step left to take and nothing left to evaluate."""
        end_step = self.clock.end_step
        return self.step >= end_step and not self.evaluations.due(self.step, end_step)
