"""Restores a checkpoint of a run for evaluating, recommending and reporting."""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

from jax.sharding import Mesh

from s2s_jax.cluster import hosts
from s2s_jax.config import Config
from s2s_jax.errors import UserError
from s2s_jax.runs.checkpoints.compatibility import check_config
from s2s_jax.runs.checkpoints.store import Checkpoints
from s2s_jax.runs.metrics_file import read_lines
from s2s_jax.runs.place import place_of_run
from s2s_jax.training.evaluations import chosen_step, chosen_weight
from s2s_jax.training.growth import GrowthPlan
from s2s_jax.training.step.functions import StepFunctions, make_step_functions
from s2s_jax.training.step.settings import StepSettings
from s2s_jax.training.step.state import TrainState
from s2s_serve.storage.address import Place


class Saved(NamedTuple):
    """What is known about a checkpoint without restoring it.

    Attributes:
      step: the step of the checkpoint.
      fingerprint: the fingerprint of the checkpoint; see `Checkpoints.fingerprint`.
      capacities: the number of rows of each growing table.
      kinds: the kind of ids of each feature in the training log; see `features.entry_kinds`.
      chosen_weight: the weight of counted neighbours that training chose; None if it chose none.
      run_dir: the directory of the run.
    """

    step: int
    fingerprint: str
    capacities: dict[str, int]
    kinds: dict[str, str]
    chosen_weight: float | None
    run_dir: Place

    def with_weight(self, config: Config) -> Config:
        """Return a configuration with the weight of this checkpoint, if `eval.neighbours` is auto.

        Imported weights, which are those of step 0, are used by themselves.

        Raises:
          UserError: it is auto, but training chose no weight.
        """
        if config.eval.neighbours != "auto":
            return config
        weight = 0.0 if self.step == 0 else self.chosen_weight
        if weight is None:
            raise UserError(
                f"eval.neighbours: expected a number, because no evaluation up to step {self.step} of "
                f"{self.run_dir} chose a weight (training with eval.neighbours auto writes it to "
                f"metrics.jsonl), found auto; give a number, such as 1, and compare numbers with s2s "
                f"evaluate --split validation"
            )
        settings = dataclasses.replace(config.eval, neighbours=weight)
        return dataclasses.replace(config, eval=settings)


class Restored(NamedTuple):
    """A restored checkpoint.

    Attributes:
      saved: what is known about the checkpoint.
      functions: the functions of the model.
      state: the state on the devices.
    """

    saved: Saved
    functions: StepFunctions
    state: TrainState

    @property
    def step(self) -> int:
        """The step of the checkpoint."""
        return self.saved.step

    @property
    def fingerprint(self) -> str:
        """The fingerprint of the checkpoint."""
        return self.saved.fingerprint

    @property
    def kinds(self) -> dict[str, str]:
        """The kind of ids of each feature in the training log."""
        return self.saved.kinds

    def with_weight(self, config: Config) -> Config:
        """Return a configuration with the weight of this checkpoint, see `Saved.with_weight`."""
        return self.saved.with_weight(config)


def find(config: Config, checkpoint: str = "best", run_dir: Place | None = None) -> Saved:
    """Finds a checkpoint of a run, without restoring it.

    Args:
      config: the configuration, which must fit the run.
      checkpoint: "best" (by `eval.metric`; the newest if nothing was evaluated), "newest", or a step.
      run_dir: the directory of the run; None: `train.output_dir`.

    Raises:
      UserError: there is no such checkpoint, it cannot be read, or the configuration does not fit the
        run.
    """
    with _opened(config, run_dir) as (checkpoints, directory):
        return _find(config, checkpoint, checkpoints, directory)


def restore(
    config: Config, mesh: Mesh, checkpoint: str = "best", run_dir: Place | None = None
) -> Restored:
    """Restores a checkpoint of a run.

    Args:
      config: the configuration, which must fit the run.
      mesh: the devices; they may differ from those that the run was trained on.
      checkpoint: see `find`.
      run_dir: the directory of the run; None: `train.output_dir`.

    Raises:
      UserError: see `find`.
    """
    with _opened(config, run_dir) as (checkpoints, directory):
        saved = _find(config, checkpoint, checkpoints, directory)
        functions = make_step_functions(StepSettings.of(config), mesh, saved.capacities)
        state = checkpoints.restore(saved.step, functions.abstract)
        return Restored(saved, functions, state)


@contextlib.contextmanager
def _opened(config: Config, run_dir: Place | None) -> Iterator[tuple[Checkpoints, Place]]:
    """Opens the checkpoints of a run."""
    run_dir = place_of_run(config.train.output_dir) if run_dir is None else run_dir
    if not (run_dir / "checkpoints").is_dir():
        raise UserError(
            f"train.output_dir: expected the directory of a run, found no checkpoints in {run_dir}; "
            f"train first"
        )
    checkpoints = Checkpoints(run_dir, newest=None, read_only=True)
    try:
        if checkpoints.newest_step is not None:
            check_config(run_dir, config)
        yield checkpoints, run_dir
    finally:
        checkpoints.close()


def _find(config: Config, checkpoint: str, checkpoints: Checkpoints, run_dir: Place) -> Saved:
    # Both depend on metrics.jsonl, of which other hosts may see an older copy.
    step = hosts.from_first(
        lambda: chosen_step(checkpoint, checkpoints.steps, run_dir, config.eval)
    )
    plan = GrowthPlan(config.features, config.tables)
    progress = checkpoints.progress(step)
    plan.set_state(progress["growth"])
    reader = progress["reader"] if "reader" in progress else {}
    # Older checkpoints do not have the kinds.
    kinds = reader["kinds"] if "kinds" in reader else {}
    # Lines that could not be written to metrics.jsonl.
    unwritten = progress["unwritten"] if "unwritten" in progress else []
    weight = hosts.from_first(lambda: chosen_weight([*read_lines(run_dir), *unwritten], step))
    fingerprint = checkpoints.fingerprint(step)
    return Saved(step, fingerprint, plan.capacities_now(), kinds, weight, run_dir)
