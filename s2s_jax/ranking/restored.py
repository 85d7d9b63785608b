"""Restores a checkpoint of a run for evaluating, recommending and reporting."""

from pathlib import Path
from typing import NamedTuple

from jax.sharding import Mesh

from s2s_jax.config import Config
from s2s_jax.errors import UserError
from s2s_jax.runs.checkpoints.compatibility import check_config
from s2s_jax.runs.checkpoints.store import Checkpoints
from s2s_jax.training.evaluations import chosen_step
from s2s_jax.training.growth import GrowthPlan
from s2s_jax.training.step.functions import StepFunctions, make_step_functions
from s2s_jax.training.step.settings import StepSettings
from s2s_jax.training.step.state import TrainState


class Restored(NamedTuple):
    """A restored checkpoint.

    Attributes:
      step: the step of the checkpoint.
      fingerprint: the fingerprint of the checkpoint; see `Checkpoints.fingerprint`.
      functions: the functions of the model.
      state: the state on the devices.
      kinds: the kind of ids of each feature in the training log; see `features.entry_kinds`.
    """

    step: int
    fingerprint: str
    functions: StepFunctions
    state: TrainState
    kinds: dict[str, str]


def restore(
    config: Config, mesh: Mesh, checkpoint: str = "best", run_dir: Path | None = None
) -> Restored:
    """Restores a checkpoint of a run.

    Args:
      config: the configuration, which must fit the run.
      mesh: the devices; they may differ from those that the run was trained on.
      checkpoint: "best" (by `eval.metric`; the newest if nothing was evaluated), "newest", or a step.
      run_dir: the directory of the run; None: `train.output_dir`.

    Raises:
      UserError: there is no such checkpoint, it cannot be read, or the configuration does not fit the
        run.
    """
    run_dir = Path(config.train.output_dir) if run_dir is None else run_dir
    if not (run_dir / "checkpoints").is_dir():
        raise UserError(
            f"train.output_dir: expected the directory of a run, found no checkpoints in {run_dir}; "
            f"train first"
        )
    checkpoints = Checkpoints(run_dir, newest=None, read_only=True)
    try:
        if checkpoints.newest_step is not None:
            check_config(run_dir, config)
        step = chosen_step(checkpoint, checkpoints.steps, run_dir, config.eval)
        plan = GrowthPlan(config.features, config.tables)
        saved = checkpoints.progress(step)
        plan.set_state(saved["growth"])
        functions = make_step_functions(StepSettings.of(config), mesh, plan.capacities_now())
        state = checkpoints.restore(step, functions.abstract)
        reader = saved["reader"] if "reader" in saved else {}
        # Older checkpoints do not have the kinds.
        kinds = reader["kinds"] if "kinds" in reader else {}
        return Restored(step, checkpoints.fingerprint(step), functions, state, kinds)
    finally:
        checkpoints.close()
