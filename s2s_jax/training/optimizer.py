"""AdamW for the dense part chained with a sparse-row AdamW for the tables, in Optax.

Parameters are `{"dense": …, "tables": {name: [R, D]}}` and, if tables have default rows,
`"unknown": {name: [D]}`. Gradients have the same keys, but a table's leaf holds a row for each of the
unique rows that a device asked for, `[U, D]` a device. The extra argument `reduce` brings them to the
devices that own the rows. Updates of tables are the new tables themselves, written in place: nothing of
a table's size is ever made beside it.

Shapes: R rows and D width of a table, W rows of a window (see `embedding.exchange`).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from s2s_jax.config import LRConfig
from s2s_jax.embedding import exchange, lookup
from s2s_jax.embedding.tables import NUM_SEGMENTS
from s2s_jax.training.schedule import Clock, learning_rate

Params = dict[str, Any]

# Place of the sparse-row AdamW in the chain of `make_optimizer`.
_SPARSE = 2

# `(gradients of tables, visit, carry) -> carry`: see `exchange.reduce`. The carry is a tree of tables
# and arrays beside them, sharded by rows.
Reduce = Callable[[Any, exchange.Visit, Any], Any]


class SparseRowState(NamedTuple):
    """State of `sparse_row_adamw`.

    Attributes:
      count: int32 scalar, updates so far.
      moments: first and second moments side by side, `[R, 2D]` beside each table `[R, D]`: a row's
        moments are used together, and one place in memory is fetched faster than two.
    """

    count: jax.Array
    moments: Any


class NewTables(NamedTuple):
    """What `sparse_row_adamw` makes of the gradients of tables.

    Attributes:
      values: the tables after the update.
      square_norm: f32 `[S]` (S segments of a table) that add up to the squared norm of the gradient that
        was applied.
    """

    values: dict[str, jax.Array]
    square_norm: jax.Array


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

    `update` takes `reduce`, and returns `NewTables` for `apply_updates`.
    """

    def init(params: Any) -> SparseRowState:
        def zeros(table_RD: jax.Array) -> jax.Array:
            rows, width = table_RD.shape
            return jnp.zeros((rows, 2 * width), table_RD.dtype)

        return SparseRowState(jnp.zeros((), jnp.int32), jax.tree.map(zeros, params))

    def update(
        updates: Any, state: Any, params: Any = None, *, reduce: Reduce | None = None, **_: Any
    ) -> tuple[Any, Any]:
        assert reduce is not None, "pass reduce to the update"
        count = jnp.asarray(optax.safe_increment(state.count))
        t = count.astype(jnp.float32)
        rate = jnp.asarray(learning_rate(state.count))
        step_size = rate * jnp.sqrt(1 - config.beta2**t) / (1 - config.beta1**t)

        def visit(carry: Any, windows: dict[str, exchange.Window]) -> Any:
            tables, moments, square_norm = carry
            for name, (rows_W, g_WD) in windows.items():
                table_WD = lookup.gather(tables[name], rows_W)
                m_WD, v_WD = jnp.split(lookup.gather(moments[name], rows_W), 2, axis=-1)
                m_WD = config.beta1 * m_WD + (1 - config.beta1) * g_WD
                v_WD = config.beta2 * v_WD + (1 - config.beta2) * jnp.square(g_WD)
                table_WD = (1 - rate * config.weight_decay) * table_WD
                table_WD -= step_size * m_WD / (jnp.sqrt(v_WD) + config.eps)
                new_WD2 = jnp.concatenate([m_WD, v_WD], axis=-1)
                tables = tables | {name: lookup.scatter_set(tables[name], rows_W, table_WD)}
                moments = moments | {name: lookup.scatter_set(moments[name], rows_W, new_WD2)}
            return tables, moments, _add_squares(square_norm, windows)

        carry = params["tables"], state.moments["tables"], jnp.zeros(NUM_SEGMENTS)
        tables, moments, square_norm = reduce(updates["tables"], visit, carry)
        state = SparseRowState(count, state.moments | {"tables": moments})
        return updates | {"tables": NewTables(tables, square_norm)}, state

    return optax.GradientTransformationExtraArgs(init, update)


def rows_norm(gradients: Any, reduce: Reduce) -> jax.Array:
    """The norm of the gradient of all tables, f32 scalar."""

    def visit(square_norm: jax.Array, windows: dict[str, exchange.Window]) -> jax.Array:
        return _add_squares(square_norm, windows)

    return jnp.sqrt(reduce(gradients, visit, jnp.zeros(NUM_SEGMENTS)).sum())


def _add_squares(square_norm: jax.Array, windows: dict[str, exchange.Window]) -> jax.Array:
    squares = sum(jnp.square(window.sums_WD).sum() for window in windows.values())
    return square_norm.at[0].add(squares)


def clip_by_norm(max_norm: float) -> optax.GradientTransformationExtraArgs:
    """Scales gradients to `max_norm` if their norm, passed to `update` as `grad_norm`, is larger.

    As `optax.clip_by_global_norm`, which cannot know the norm of rows whose parts lie on several
    devices.
    """

    def init(params: Any) -> optax.EmptyState:
        del params
        return optax.EmptyState()

    def update(
        updates: Any, state: Any, params: Any = None, *, grad_norm: Any = None, **_: Any
    ) -> tuple[Any, Any]:
        assert grad_norm is not None, "pass grad_norm to the update"
        scale = jnp.where(grad_norm < max_norm, 1.0, max_norm / grad_norm)
        return jax.tree.map(lambda g: g * scale.astype(g.dtype), updates), state

    return optax.GradientTransformationExtraArgs(init, update)


def make_optimizer(
    config: LRConfig, default_rows: bool = False, clock: Clock | None = None
) -> optax.GradientTransformationExtraArgs:
    """The whole optimizer: clipping by the global norm, then AdamW and sparse-row AdamW, masked.

    Default rows learn at the rate of tables: they are rows like others, which models see in the same
    places and at the same scale. Every batch has ids that they stand for, so plain AdamW serves them.

    Args:
      config: rates and moments.
      default_rows: whether tables have them.
      clock: that the rates follow; None: as `schedule.learning_rate` says.
    """

    def adamw(peak: float) -> optax.GradientTransformation:
        return optax.adamw(
            learning_rate(config, peak, clock),
            b1=config.beta1,
            b2=config.beta2,
            eps=config.eps,
            weight_decay=config.weight_decay,
        )

    def only(part: str, transformation: Any) -> optax.GradientTransformationExtraArgs:
        def mask(params: Any) -> Any:
            return {name: name == part for name in params}

        return optax.masked(transformation, mask)

    sparse = sparse_row_adamw(learning_rate(config, config.sparse_lr, clock), config)
    clip = optax.identity()
    if config.clip_norm is not None:
        clip = clip_by_norm(config.clip_norm)
    parts = [clip, only("dense", adamw(config.dense_lr)), only("tables", sparse)]
    if default_rows:
        parts.append(only("unknown", adamw(config.sparse_lr)))
    return optax.chain(*parts)


def apply_updates(params: Params, updates: Any) -> Params:
    """Adds updates to the dense part and to default rows; tables are replaced."""
    dense = {name: part for name, part in params.items() if name != "tables"}
    added: Any = optax.apply_updates(dense, {name: updates[name] for name in dense})
    return added | {"tables": updates["tables"].values}


def table_moments(opt_state: Any) -> dict[str, jax.Array]:
    """The moments of all tables in the state of `make_optimizer`."""
    return opt_state[_SPARSE].inner_state.moments["tables"]


def with_table_moments(opt_state: Any, moments: dict[str, jax.Array]) -> Any:
    """The state of `make_optimizer` with other moments of tables."""
    of_rows = opt_state[_SPARSE]
    sparse = of_rows.inner_state
    sparse = sparse._replace(moments=sparse.moments | {"tables": moments})
    changed = of_rows._replace(inner_state=sparse)
    return (*opt_state[:_SPARSE], changed, *opt_state[_SPARSE + 1 :])
