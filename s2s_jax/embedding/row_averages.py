"""Exponential moving averages of the rows of a table, at the cost of the rows that a step uses.

The average after step t, with decay d, is the mean of the row's values after the steps 1 to t, where the
value after step i has the weight d^(t - i) (Polyak and Juditsky, "Acceleration of stochastic
approximation by averaging", 1992; the weights are divided by their sum, as Adam does). A row that is not
used does not change. So its average c, computed after step s, can be brought up to step t at once:

    c = row + share(s, t) · (c − row),  share(s, t) = d^(t − s) · (1 − d^s) / (1 − d^t)

This is done when the row is used again, or read. `share(0, t)` is 0, so a row that was never used is its
own average. An id of a growing table counts as having its initial value until it gets a row.

Shapes: R rows, G some of them, D width of the table, A = D + 1: the average of a row, followed by the
step after which it was computed. The step is exact up to 2^24; both are read from one place in memory.
"""

import math

import jax
import jax.numpy as jnp

from s2s_jax.embedding.lookup import read_rows, write_rows


def no_averages(table_RD: jax.Array) -> jax.Array:
    """Return f32 `[R, A]`: the averages before the first step."""
    rows, width = table_RD.shape
    return jnp.zeros((rows, width + 1), table_RD.dtype)


def averaged(
    decay: float, values_GD: jax.Array, averages_GA: jax.Array, step: jax.Array | int
) -> jax.Array:
    """Return f32 `[G, D]`: the averages of rows after `step` steps.

    Args:
      decay: the decay of the averages.
      values_GD: the rows after `step`.
      averages_GA: their stored averages, computed after this step or before.
      step: the number of steps done.

    Examples:
      >>> row, stored = jnp.array([[8.0]]), jnp.array([[2.0, 1.0]])  # After step 1, it was 2.
      >>> averaged(0.5, row, stored, 3).tolist()  # (1 · 2 + 2 · 8 + 4 · 8) / 7
      [[7.142857...]]
    """
    old_GD, since_G1 = averages_GA[:, :-1], averages_GA[:, -1:]
    now = jnp.asarray(step, averages_GA.dtype)
    kept_G1 = _power(decay, now - since_G1) * _sum_of_weights(decay, since_G1)
    # Before the first step, nothing is averaged; the maximum avoids 0 / 0.
    share_G1 = kept_G1 / jnp.maximum(_sum_of_weights(decay, now), 1 - decay)
    return values_GD + share_G1 * (old_GD - values_GD)


def new_weight(decay: float, step: jax.Array) -> jax.Array:
    """Return f32 scalar: the weight of the value after `step` in the average after this step."""
    return (1 - decay) / _sum_of_weights(decay, jnp.asarray(step, jnp.float32))


def with_new_values(
    decay: float,
    averages_RA: jax.Array,
    rows_G: jax.Array,
    before_GD: jax.Array,
    after_GD: jax.Array,
    step: jax.Array,
) -> jax.Array:
    """Return f32 `[R, A]`: the averages after `step`, in which some rows changed; in place.

    Args:
      decay: the decay of the averages.
      averages_RA: the averages before the step.
      rows_G: int32, the rows that the step used, see `exchange.RowGradients`.
      before_GD: their values before the step.
      after_GD: their values after the step.
      step: int32, the number of this step; the first one is 1.
    """
    old_GD = averaged(decay, before_GD, read_rows(averages_RA, rows_G), step - 1)
    new_GD = old_GD + new_weight(decay, step) * (after_GD - old_GD)
    step_G1 = jnp.full_like(new_GD[:, :1], step)
    return write_rows(averages_RA, rows_G, jnp.concatenate([new_GD, step_G1], axis=-1))


def _power(decay: float, steps: jax.Array) -> jax.Array:
    return jnp.exp(steps * math.log(decay))


def _sum_of_weights(decay: float, steps: jax.Array) -> jax.Array:
    """Return 1 − decay^steps, with all its digits also where the decay is nearly 1."""
    return -jnp.expm1(steps * math.log(decay))
