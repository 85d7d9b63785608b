"""AdamW for the dense part chained with a sparse-row AdamW for the tables, in Optax.

Parameters are `{"dense": …, "tables": {name: [R, D]}}`. Gradients and updates have the same keys, but
a table's leaf is `[U, D]`: one row for each of the unique rows of the batch, whose places travel beside
it as the extra argument `table_rows`. So clipping and masking are Optax's own, and nothing of a
table's size is ever made.

Shapes: R rows and D width of a table, U unique rows of a batch.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from s2s_jax.config import LRConfig
from s2s_jax.embedding import lookup

Params = dict[str, Any]


class SparseRowState(NamedTuple):
    """State of `sparse_row_adamw`.

    Attributes:
      count: int32 scalar, updates so far.
      moments: first and second moments side by side, `[R, 2D]` beside each table `[R, D]`: a row's
        moments are used together, and one place in memory is fetched faster than two.
    """

    count: jax.Array
    moments: Any


def sparse_row_adamw(
    learning_rate: optax.Schedule, config: LRConfig
) -> optax.GradientTransformationExtraArgs:
    """AdamW on the rows that a batch uses; all others, and their moments, stay as they are.

    For a row used at step t with gradient g (summed over its occurrences in the batch):

        row = (1 − lr·wd)·row
        m = β1·m + (1 − β1)·g;  v = β2·v + (1 − β2)·g²
        row = row − lr·sqrt(1 − β2^t) / (1 − β1^t) · m / (sqrt(v) + ε)

    t counts all steps, not those that used the row. This is RecIS's SparseAdamW (and, but for the
    place of ε, Adam of Kingma and Ba, 2015, with the decoupled decay of Loshchilov and Hutter, 2019).

    `update` takes `table_rows`, the unique row indices of each table (see `lookup.Unique`), and returns
    changes of these rows for `apply_updates`.
    """

    def init(params: Any) -> SparseRowState:
        def zeros(table_RD: jax.Array) -> jax.Array:
            rows, width = table_RD.shape
            return jnp.zeros((rows, 2 * width), table_RD.dtype)

        return SparseRowState(jnp.zeros((), jnp.int32), jax.tree.map(zeros, params))

    def update(
        updates: Any, state: Any, params: Any = None, *, table_rows: Any = None, **_: Any
    ) -> tuple[Any, Any]:
        assert table_rows is not None, "pass table_rows to the update"
        count = jnp.asarray(optax.safe_increment(state.count))
        t = count.astype(jnp.float32)
        rate = jnp.asarray(learning_rate(state.count))
        step_size = rate * jnp.sqrt(1 - config.beta2**t) / (1 - config.beta1**t)

        changes, moments = {}, {}
        for name, gradient_UD in updates["tables"].items():
            rows_U = table_rows[name]
            table_UD = lookup.gather(params["tables"][name], rows_U)
            moments_RD2 = state.moments["tables"][name]
            m_UD, v_UD = jnp.split(lookup.gather(moments_RD2, rows_U), 2, axis=-1)
            m_UD = config.beta1 * m_UD + (1 - config.beta1) * gradient_UD
            v_UD = config.beta2 * v_UD + (1 - config.beta2) * jnp.square(gradient_UD)
            decay_UD = rate * config.weight_decay * table_UD
            changes[name] = -decay_UD - step_size * m_UD / (jnp.sqrt(v_UD) + config.eps)
            new_UD2 = jnp.concatenate([m_UD, v_UD], axis=-1)
            moments[name] = lookup.scatter_set(moments_RD2, rows_U, new_UD2)
        updates = updates | {"tables": changes}
        return updates, SparseRowState(count, state.moments | {"tables": moments})

    return optax.GradientTransformationExtraArgs(init, update)


def learning_rate(config: LRConfig, peak: float) -> optax.Schedule:
    """Linear warm-up from 0 to `peak`, then constant, or linear or cosine decay to `final_ratio`."""
    warmup = config.warmup_steps
    if config.decay == "constant":
        after = optax.constant_schedule(peak)
    else:
        assert config.decay_steps is not None, "validated"
        steps, end = config.decay_steps - warmup, config.final_ratio
        if config.decay == "linear":
            after = optax.linear_schedule(peak, peak * end, steps)
        else:
            after = optax.cosine_decay_schedule(peak, steps, alpha=end)
    if warmup == 0:
        return after
    # The first update already moves: step t of the warm-up has t / warmup of the peak.
    rise = optax.linear_schedule(peak / warmup, peak, max(warmup - 1, 1))
    return optax.join_schedules([rise, after], [warmup])


def make_optimizer(config: LRConfig) -> optax.GradientTransformationExtraArgs:
    """The whole optimizer: clipping by the global norm, then AdamW and sparse-row AdamW, masked."""
    dense = optax.adamw(
        learning_rate(config, config.dense_lr),
        b1=config.beta1,
        b2=config.beta2,
        eps=config.eps,
        weight_decay=config.weight_decay,
    )
    sparse = sparse_row_adamw(learning_rate(config, config.sparse_lr), config)
    clip = optax.identity()
    if config.clip_norm is not None:
        clip = optax.clip_by_global_norm(config.clip_norm)
    return optax.chain(
        clip,
        optax.masked(dense, {"dense": True, "tables": False}),
        optax.masked(sparse, {"dense": False, "tables": True}),
    )


def apply_updates(params: Params, updates: Any, table_rows: Mapping[str, jax.Array]) -> Params:
    """Adds dense updates to the dense part and row changes to the rows `table_rows` of the tables."""
    tables = {
        name: lookup.scatter_add(table_RD, table_rows[name], updates["tables"][name])
        for name, table_RD in params["tables"].items()
    }
    return {"dense": optax.apply_updates(params["dense"], updates["dense"]), "tables": tables}
