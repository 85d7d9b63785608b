"""Averages of all weights (`lr.average_decay`), which replace them in evaluation and afterwards.

Training goes on from the weights themselves. See `embedding.row_averages` for the averages of tables.

Shapes: R rows and D width of a table, A = D + 1.
"""

from typing import cast

import jax
import jax.numpy as jnp

from s2s_jax.embedding.lookup import Arrays
from s2s_jax.embedding.row_averages import new_weight, no_averages
from s2s_jax.training.step.params import Params, Tree, default_rows


def empty_averages(params: Params) -> Params:
    """Return the averages before the first step: like the parameters, but tables are `[R, A]`."""
    zeros = jax.tree.map(jnp.zeros_like, dict(params) | {"tables": {}})
    tables = {name: no_averages(table_RD) for name, table_RD in params["tables"].items()}
    return cast(Params, zeros | {"tables": tables})


def next_averages(
    decay: float, averages: Params, params: Params, tables: Arrays, step: jax.Array
) -> Params:
    """Return the averages after a step.

    Args:
      decay: `lr.average_decay`.
      averages: the averages before the step.
      params: the parameters after the step.
      tables: f32 `[R, A]` for each table: its averages after the step.
      step: int32, the number of the step; the first one is 1.
    """
    weight = new_weight(decay, step)
    others = {name: part for name, part in averages.items() if name != "tables"}
    changed = {name: part for name, part in params.items() if name != "tables"}
    moved = jax.tree.map(lambda c, w: c + weight.astype(c.dtype) * (w - c), others, changed)
    return cast(Params, moved | {"tables": tables})


def averaged_others(averages: Params, params: Params, step: jax.Array) -> tuple[Tree, Arrays]:
    """Return the averages of the dense part and of the default rows after `step` steps."""

    def chosen(average: jax.Array, value: jax.Array) -> jax.Array:
        return jnp.where(step > 0, average, value)

    dense = jax.tree.map(chosen, averages["dense"], params["dense"])
    return dense, jax.tree.map(chosen, default_rows(averages), default_rows(params))
