"""The optimizer in Optax: AdamW or Muon for the dense part, and a sparse-row AdamW for the tables.

The gradient of a table has one row for each unique row that a device used, `[U, D]` per device. The
extra argument `reduce` sends these rows to the devices that own them. Tables are updated in place, so no
second array of the size of a table is ever made.

Shapes: R rows and D width of a table, M = 2 D, A = D + 1, G rows whose gradients are summed together
(see `embedding.exchange`).
"""

from collections.abc import Mapping
from typing import Literal, NamedTuple, NotRequired, Protocol, TypedDict, TypeVar, cast

import jax
import jax.numpy as jnp
import optax

from s2s_jax.config import LRConfig
from s2s_jax.embedding.exchange import RowGradients, Visit
from s2s_jax.embedding.lookup import Arrays, read_rows, write_rows
from s2s_jax.embedding.row_averages import with_new_values
from s2s_jax.embedding.tables import NUM_SEGMENTS
from s2s_jax.training.step.dense_optimizer import adamw, dense_optimizer
from s2s_jax.training.step.params import Params, Tree, default_rows
from s2s_jax.training.step.schedule import Clock, learning_rate

# The parts of `Params`, and their places in the chain of `make_optimizer`, where clipping comes first.
Part = Literal["dense", "tables", "unknown"]
_PLACES: dict[Part, int] = {"dense": 1, "tables": 2, "unknown": 3}

_Carry = TypeVar("_Carry")


class Reduce(Protocol):
    """Calls `visit` with gradients on the devices that own their rows; see `exchange.reduce`."""

    def __call__(self, gradients: Arrays, visit: Visit[_Carry], carry: _Carry, /) -> _Carry:
        """Return the last carry: a tree of tables and other arrays that are sharded by rows."""
        ...


class SparseRowState(NamedTuple):
    """The state of `sparse_row_adamw`.

    Attributes:
      count: int32 scalar, the number of updates so far.
      moments: `[R, 2D]` for each table `[R, D]`: the first moments of a row, followed by its second
        moments. Both are used together, and reading them from one place in memory is faster.
    """

    count: jax.Array
    moments: dict[str, Arrays]


class NewTables(NamedTuple):
    """The updates of `sparse_row_adamw`.

    Attributes:
      values: the tables after the update.
      square_norm: f32 `[S]` (S segments of a table); their sum is the squared norm of the gradient that
        was applied.
      averages: f32 `[R, A]` for each table, the averages after the update; empty without
        `lr.average_decay`.
    """

    values: Arrays
    square_norm: jax.Array
    averages: Arrays


class Updates(TypedDict):
    """The updates of all parameters: new tables, and differences to add to all other parameters."""

    dense: Tree
    tables: NewTables
    unknown: NotRequired[Arrays]


def sparse_row_adamw(
    learning_rate: optax.Schedule, config: LRConfig, ratios: Mapping[str, float] | None = None
) -> optax.GradientTransformationExtraArgs:
    """Return AdamW for the rows that a batch uses; other rows and their moments do not change.

    For a row used at step t with gradient g (summed over its occurrences in the batch):

        row = (1 − lr·wd)·row
        m = β1·m + (1 − β1)·g;  v = β2·v + (1 − β2)·g²
        row = row − lr·sqrt(1 − β2^t) / (1 − β1^t) · m / (sqrt(v) + ε)

    t counts all steps, including those that did not use the row. This is RecIS's SparseAdamW. It is also
    Adam (Kingma and Ba, 2015) with decoupled weight decay (Loshchilov and Hutter, 2019), except for the
    place of ε. `ratios` has the learning rate of each table relative to lr.

    `update` takes `reduce` and, with `lr.average_decay`, the averages of the tables. It returns
    `NewTables` for `apply_updates`.
    """

    def init(params: optax.Params) -> SparseRowState:
        def zeros(table_RD: jax.Array) -> jax.Array:
            rows, width = table_RD.shape
            return jnp.zeros((rows, 2 * width), table_RD.dtype)

        return SparseRowState(jnp.zeros((), jnp.int32), jax.tree.map(zeros, params))

    def update(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        *,
        reduce: Reduce | None = None,
        averages: Arrays | None = None,
        **_: object,
    ) -> tuple[optax.Updates, optax.OptState]:
        assert reduce is not None, "pass reduce to the update"
        gradients, values = cast(Params, updates), cast(Params, params)
        state = cast(SparseRowState, state)
        count = jnp.asarray(optax.safe_increment(state.count))
        t = count.astype(jnp.float32)
        rate = jnp.asarray(learning_rate(state.count))
        step_size = rate * jnp.sqrt(1 - config.beta2**t) / (1 - config.beta1**t)

        steps = {
            name: _Step(count, rate * ratio, step_size * ratio)
            for name in values["tables"]
            for ratio in [1.0 if ratios is None else ratios[name]]
        }

        def visit(
            carry: tuple[dict[str, _Table], jax.Array], summed: dict[str, RowGradients]
        ) -> tuple[dict[str, _Table], jax.Array]:
            tables, square_norm = carry
            new = {
                name: _stepped(config, steps[name], tables[name], of_rows)
                for name, of_rows in summed.items()
            }
            return tables | new, _add_squares(square_norm, summed)

        before = {
            name: _Table(
                table_RD, state.moments["tables"][name], averages[name] if averages else None
            )
            for name, table_RD in values["tables"].items()
        }
        carry = before, jnp.zeros(NUM_SEGMENTS)
        tables, square_norm = reduce(gradients["tables"], visit, carry)
        moments = {name: table.moments_RM for name, table in tables.items()}
        state = SparseRowState(count, state.moments | {"tables": moments})
        new_tables = NewTables(
            {name: table.values_RD for name, table in tables.items()},
            square_norm,
            {n: table.averages_RA for n, table in tables.items() if table.averages_RA is not None},
        )
        updated = {**gradients, "tables": new_tables}
        return cast(optax.Updates, updated), state

    return optax.GradientTransformationExtraArgs(init, update)


class _Step(NamedTuple):
    """The number of a step, its learning rate, and the rate with Adam's correction of the moments."""

    count: jax.Array
    rate: jax.Array
    size: jax.Array


class _Table(NamedTuple):
    """A table, the moments of its rows, and their averages."""

    values_RD: jax.Array
    moments_RM: jax.Array
    averages_RA: jax.Array | None


def _stepped(config: LRConfig, step: _Step, table: _Table, gradients: RowGradients) -> _Table:
    """Return a table after the update, which is in place."""
    rows_G, g_GD = gradients
    values_GD = before_GD = read_rows(table.values_RD, rows_G)
    m_GD, v_GD = jnp.split(read_rows(table.moments_RM, rows_G), 2, axis=-1)
    m_GD = config.beta1 * m_GD + (1 - config.beta1) * g_GD
    v_GD = config.beta2 * v_GD + (1 - config.beta2) * jnp.square(g_GD)
    values_GD = (1 - step.rate * config.weight_decay) * values_GD
    values_GD -= step.size * m_GD / (jnp.sqrt(v_GD) + config.eps)
    new_GM = jnp.concatenate([m_GD, v_GD], axis=-1)
    averages_RA, decay = table.averages_RA, config.average_decay
    if averages_RA is not None:
        assert decay is not None, "averages are only kept with lr.average_decay"
        averages_RA = with_new_values(decay, averages_RA, rows_G, before_GD, values_GD, step.count)
    return _Table(
        write_rows(table.values_RD, rows_G, values_GD),
        write_rows(table.moments_RM, rows_G, new_GM),
        averages_RA,
    )


def rows_norm(gradients: Arrays, reduce: Reduce) -> jax.Array:
    """Return f32 scalar: the norm of the gradients of all tables together."""

    def visit(square_norm: jax.Array, summed: dict[str, RowGradients]) -> jax.Array:
        return _add_squares(square_norm, summed)

    return jnp.sqrt(reduce(gradients, visit, jnp.zeros(NUM_SEGMENTS)).sum())


def _add_squares(square_norm: jax.Array, summed: dict[str, RowGradients]) -> jax.Array:
    squares = sum(jnp.square(each.sums_GD).sum() for each in summed.values())
    return square_norm.at[0].add(squares)


def clip_by_norm(max_norm: float) -> optax.GradientTransformationExtraArgs:
    """Return a transformation that scales gradients down to `max_norm` if their norm is larger.

    The norm is passed to `update` as `grad_norm`. `optax.clip_by_global_norm` cannot compute it, because
    several devices have parts of the gradient of one row.
    """

    def init(params: optax.Params) -> optax.EmptyState:
        del params
        return optax.EmptyState()

    def update(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        *,
        grad_norm: jax.Array | None = None,
        **_: object,
    ) -> tuple[optax.Updates, optax.OptState]:
        assert grad_norm is not None, "pass grad_norm to the update"
        scale = jnp.where(grad_norm < max_norm, 1.0, max_norm / grad_norm)
        return jax.tree.map(lambda g: g * scale.astype(g.dtype), updates), state

    return optax.GradientTransformationExtraArgs(init, update)


def make_optimizer(
    config: LRConfig,
    has_default_rows: bool = False,
    clock: Clock | None = None,
    ratios: Mapping[str, float] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Return the complete optimizer: clipping by the global norm, then those of the parts.

    Default rows have the learning rate of tables, since the model uses them like other rows. Nearly
    every batch uses them, so plain AdamW is enough.

    Args:
      config: the learning rates and the settings of the optimizers.
      has_default_rows: whether tables have default rows.
      clock: the clock that learning rates follow, or None; see `schedule.learning_rate`.
      ratios: the learning rate of each table relative to `lr.sparse_lr`; None: 1 for all.
    """

    def only(
        part: Part, transformation: optax.GradientTransformation
    ) -> optax.GradientTransformationExtraArgs:
        def mask(params: optax.Params) -> dict[str, bool]:
            return {name: name == part for name in cast(Params, params)}

        return optax.masked(transformation, mask)

    of_dense = learning_rate(config, config.dense_lr, clock)
    of_tables = learning_rate(config, config.sparse_lr, clock)
    sparse = sparse_row_adamw(of_tables, config, ratios)
    clip = optax.identity()
    if config.clip_norm is not None:
        clip = clip_by_norm(config.clip_norm)
    parts = [clip, only("dense", dense_optimizer(config, of_dense)), only("tables", sparse)]
    if has_default_rows:
        parts.append(only("unknown", _with_ratios(ratios, adamw(config, of_tables))))
    return optax.chain(*parts)


def _with_ratios(
    ratios: Mapping[str, float] | None, transformation: optax.GradientTransformation
) -> optax.GradientTransformation:
    """Return a transformation that scales the updates of default rows by the ratio of their table."""

    def update(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        updates, state = transformation.update(updates, state, params)
        rows = default_rows(cast(Params, updates))
        scaled = rows if ratios is None else {n: x * ratios[n] for n, x in rows.items()}
        return cast(optax.Updates, cast(dict, updates) | {"unknown": scaled}), state

    return optax.GradientTransformation(transformation.init, update)


def apply_updates(params: Params, updates: Updates) -> Params:
    """Return the parameters after adding the updates; tables are replaced."""
    others = cast(optax.Params, {n: part for n, part in params.items() if n != "tables"})
    changes = cast(optax.Updates, {n: part for n, part in updates.items() if n != "tables"})
    added = cast(dict, optax.apply_updates(others, changes))
    return cast(Params, added | {"tables": updates["tables"].values})


def state_of(opt_state: optax.OptState, part: Part) -> optax.OptState:
    """Return the state of `make_optimizer` for one part of the parameters."""
    return _masked(opt_state)[_PLACES[part]].inner_state


def table_moments(opt_state: optax.OptState) -> Arrays:
    """Return the moments of all tables, from the state of `make_optimizer`."""
    return cast(SparseRowState, state_of(opt_state, "tables")).moments["tables"]


def with_table_moments(opt_state: optax.OptState, moments: Arrays) -> optax.OptState:
    """Return the state of `make_optimizer` with other moments for the tables."""
    place = _PLACES["tables"]
    sparse = cast(SparseRowState, state_of(opt_state, "tables"))
    sparse = sparse._replace(moments=sparse.moments | {"tables": moments})
    parts = _masked(opt_state)
    changed = parts[place]._replace(inner_state=sparse)
    return (*parts[:place], changed, *parts[place + 1 :])


def _masked(opt_state: optax.OptState) -> tuple[optax.MaskedState, ...]:
    """Return the states of the chain; the first one, of clipping, is empty."""
    return cast("tuple[optax.MaskedState, ...]", opt_state)
