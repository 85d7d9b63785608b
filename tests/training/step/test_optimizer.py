"""Sparse-row AdamW, schedules and clipping against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from s2s_jax.config import Constant, Cosine, Linear, LRConfig
from s2s_jax.embedding import lookup
from s2s_jax.embedding.exchange import RowGradients
from s2s_jax.embedding.tables import TableSpec
from s2s_jax.training.step.optimizer import apply_updates, make_optimizer, rows_norm, table_moments
from s2s_jax.training.step.schedule import learning_rate

ROWS, WIDTH = 512, 6
SPEC = TableSpec(name="t", buckets=ROWS, emb_dim=WIDTH, init_std=1.0, features=("f",))
DENSE = {"w": np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4)}


def start(config):
    optimizer = make_optimizer(config)
    table = np.random.default_rng(0).normal(size=(ROWS, WIDTH)).astype(np.float32)
    params = {
        "dense": jax.tree.map(jnp.asarray, DENSE),
        "tables": {"t": jnp.asarray(table)},
    }
    return optimizer, params, optimizer.init(params), table


def on_one_device(rows):
    """On one device, a single visit has all rows."""

    def reduce(gradients, visit, carry):
        return visit(carry, {name: RowGradients(rows[name], g) for name, g in gradients.items()})

    return reduce


def test_fifty_steps_with_repeated_ids_against_numpy():
    config = LRConfig(sparse_lr=0.03, weight_decay=0.1, warmup_steps=5)
    optimizer, params, state, table = start(config)
    rng = np.random.default_rng(1)

    @jax.jit
    def step(params, state, buckets, gradient_MD):
        unique = lookup.deduplicate(SPEC, {"f": buckets})

        def objective(rows_UD):
            picked = lookup.combine(rows_UD, unique.places["f"], buckets >= 0, "sum")
            return (picked * gradient_MD).sum()

        rows_UD = lookup.read_rows(params["tables"]["t"], unique.rows_U)
        gradients = {
            "dense": jax.tree.map(jnp.zeros_like, params["dense"]),
            "tables": {"t": jax.grad(objective)(rows_UD)},
        }
        reduce = on_one_device({"t": unique.rows_U})
        updates, state = optimizer.update(gradients, state, params, reduce=reduce)
        return apply_updates(params, updates), state

    expected = table.astype(np.float64)
    m, v = np.zeros((ROWS, WIDTH)), np.zeros((ROWS, WIDTH))
    touched = np.zeros(ROWS, bool)
    for t in range(1, 51):
        # Few ids, so that they repeat within and between batches; -1 means no id.
        buckets = rng.integers(-1, 40, size=(30, 1)).astype(np.int32)
        gradient_MD = rng.normal(size=(30, WIDTH)).astype(np.float32)
        params, state = step(params, state, buckets, gradient_MD)
        lr = config.sparse_lr * min(t / config.warmup_steps, 1)
        for bucket in set(buckets[:, 0]) - {-1}:
            row = bucket % 256 * SPEC.segment_rows + bucket // 256
            g = gradient_MD[buckets[:, 0] == bucket].astype(np.float64).sum(axis=0)
            expected[row] *= 1 - lr * config.weight_decay
            m[row] = config.beta1 * m[row] + (1 - config.beta1) * g
            v[row] = config.beta2 * v[row] + (1 - config.beta2) * g**2
            step_size = lr / (1 - config.beta1**t) * np.sqrt(1 - config.beta2**t)
            expected[row] -= step_size * m[row] / (np.sqrt(v[row]) + config.eps)
            touched[row] = True
    ours = np.asarray(params["tables"]["t"])
    assert 30 < touched.sum() < 50
    np.testing.assert_allclose(ours[touched], expected[touched], rtol=2e-5, atol=2e-5)
    np.testing.assert_array_equal(ours[~touched], table[~touched])


def test_dense_part_is_adamw_and_tables_do_not_disturb_it():
    config = LRConfig(dense_lr=0.02, weight_decay=0.1)
    optimizer, params, state, _ = start(config)
    reference = optax.adamw(0.02, weight_decay=0.1)
    theirs, theirs_state = jax.tree.map(jnp.asarray, DENSE), None
    theirs_state = reference.init(theirs)
    for i in range(5):
        gradient = jax.tree.map(lambda x, i=i: jnp.cos(x * (i + 1)), theirs)
        updates, theirs_state = reference.update(gradient, theirs_state, theirs)
        theirs = optax.apply_updates(theirs, updates)
        reduce = on_one_device({"t": jnp.arange(3)})
        everything = {"dense": gradient, "tables": {"t": jnp.ones((3, WIDTH))}}
        updates, state = optimizer.update(everything, state, params, reduce=reduce)
        params = apply_updates(params, updates)
    np.testing.assert_allclose(params["dense"]["w"], theirs["w"], rtol=1e-6)


def test_clipping_uses_the_norm_of_dense_part_and_rows_together():
    config = LRConfig(clip_norm=0.5)
    optimizer, params, state, _ = start(config)
    dense = {"w": np.full((3, 4), 2.0, np.float32)}
    rows_gradient = np.full((2, WIDTH), 3.0, np.float32)
    reduce = on_one_device({"t": jnp.asarray([1, 4])})
    gradients = {"dense": dense, "tables": {"t": rows_gradient}}
    norm = np.sqrt((dense["w"] ** 2).sum() + (rows_gradient**2).sum())
    rows = rows_norm(gradients["tables"], reduce)
    np.testing.assert_allclose(rows, np.sqrt((rows_gradient**2).sum()), rtol=1e-6)
    updates, state = optimizer.update(
        gradients, state, params, reduce=reduce, grad_norm=jnp.hypot(optax.tree.norm(dense), rows)
    )
    unclipped = updates["tables"].square_norm.sum() * (norm / 0.5) ** 2
    np.testing.assert_allclose(unclipped, (rows_gradient**2).sum(), rtol=1e-5)
    moments = np.asarray(table_moments(state)["t"])
    expected = (1 - config.beta1) * 3.0 * 0.5 / norm
    np.testing.assert_allclose(moments[1, :WIDTH], expected, rtol=1e-5)
    assert np.all(moments[2] == 0)


@pytest.mark.parametrize("warmup", [0, 1, 4])
@pytest.mark.parametrize(
    "decay",
    [Constant(), Linear(steps=20, final_ratio=0.1), Cosine(steps=20, final_ratio=0.1)],
    ids=lambda decay: decay.kind,
)
def test_schedules(warmup, decay):
    config = LRConfig(warmup_steps=warmup, decay=decay)
    schedule = learning_rate(config, 2.0)
    for count in range(25):
        if count < warmup:
            expected = 2.0 * (count + 1) / warmup
        else:
            done = min((count - warmup) / (20 - warmup), 1)
            shape = {
                "constant": 1.0,
                "linear": 1 - 0.9 * done,
                "cosine": 0.1 + 0.9 * (1 + np.cos(np.pi * done)) / 2,
            }[decay.kind]
            expected = 2.0 * shape
        np.testing.assert_allclose(schedule(count), expected, rtol=1e-5)
