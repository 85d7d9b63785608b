"""Finds out at the start of a run whether it can be exported, before anything is trained."""

import jax

from s2s_jax.data.items.catalogue import check_item_feature
from s2s_jax.errors import UserError
from s2s_jax.exporting.stablehlo import check_lowering
from s2s_jax.exporting.tower import Tower
from s2s_jax.exporting.tower_files import check_size
from s2s_jax.training.step.params import Tree
from s2s_jax.training.step.settings import StepSettings


def problem_of_export(settings: StepSettings, dense: Tree) -> str | None:
    """Return why a run with these settings could not be exported; None if it could.

    Args:
      settings: the settings of the run.
      dense: the parameters of the dense part, or their shapes.
    """
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), dense)
    tower = Tower.with_dense(settings, shapes)
    try:
        check_item_feature(settings.items)
        check_size(tower)
        check_lowering(tower)
    except UserError as error:
        return str(error)
    except Exception as error:  # JAX raises many types.
        reason = " ".join(str(error).split())[:200]
        return f"JAX cannot lower the model for {type(error).__name__}: {reason}"
    return None
