"""Averages of the weights against averages over all steps in float64."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
import small

from s2s_jax.cluster.mesh import make_mesh, row_sharded
from s2s_jax.training.step.batches import put_batch
from s2s_jax.training.step.functions import make_step_functions
from s2s_jax.training.step.settings import StepSettings

DECAY, STEPS, ROWS = 0.7, 6, 8
ITEMS = np.arange(296)


def with_lr(config, **changes):
    return dataclasses.replace(config, lr=dataclasses.replace(config.lr, **changes))


def mean(values):
    """The weighted mean of the values after each step."""
    weights = DECAY ** np.arange(len(values) - 1, -1, -1.0)
    return np.tensordot(weights / weights.sum(), np.asarray(values, np.float64), axes=1)


def batch(config, step, mesh):
    """Few items, so that most rows are used in some steps only."""
    made = small.batch(config, ROWS, step)
    return put_batch(made, 1, mesh)


@functools.cache
def trained(decay, devices):
    """The functions, and the states after all steps."""
    config = with_lr(small.config(), average_decay=decay)
    mesh = make_mesh(jax.devices()[:devices])
    functions = make_step_functions(StepSettings.of(config), mesh)
    state, states = functions.init(), []
    for step in range(STEPS):
        state, _ = functions.train_step(state, batch(config, step, mesh))
        states.append(jax.device_get(state))
    return functions, state, states


def outputs(functions, state, devices):
    """The vectors of users and of all items."""
    histories = small.batch(small.config(), ROWS, 99)
    rows = row_sharded(make_mesh(jax.devices()[:devices]))
    ids_BLC = histories["ids"]
    ids_MC = jax.device_put(ids_BLC.reshape(-1, ids_BLC.shape[-1]), rows)
    length_B = jax.device_put(histories["length"], rows)
    users = functions.user_vectors(state, ids_MC, length_B, ids_BLC.shape[1]).vectors_BE
    ids = {
        "item_id": ITEMS.reshape(1, -1, 1, 1).astype(np.int32),
        "behavior_id": np.full((1, ITEMS.size, 1, 1), -1, np.int32),
        "tags": (ITEMS[:, None] % [7, 11, 13]).reshape(1, -1, 1, 3).astype(np.int32),
    }
    return np.asarray(users), np.asarray(functions.item_vectors(state, ids))


@pytest.mark.parametrize("devices", [1, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 8))])
def test_averages_are_evaluated_and_the_weights_trained(devices):
    functions, state, states = trained(DECAY, devices)
    plain, last, plain_states = trained(None, devices)
    jax.tree.map(np.testing.assert_array_equal, states[-1].params, plain_states[-1].params)
    expected = jax.tree.map(lambda *x: mean(x), *[each.params for each in plain_states])
    averaged = jax.tree.map(
        lambda x, like: jax.device_put(x.astype(np.float32), like.sharding), expected, last.params
    )
    theirs = outputs(plain, last._replace(params=averaged), devices)
    for ours, wanted, raw in zip(
        outputs(functions, state, devices), theirs, outputs(plain, last, devices), strict=True
    ):
        np.testing.assert_allclose(ours, wanted, atol=1e-5)
        assert np.abs(ours - raw).max() > 1e-2


def test_before_the_first_step_the_weights_are_evaluated():
    functions, plain = trained(DECAY, 1)[0], trained(None, 1)[0]
    ours, theirs = outputs(functions, functions.init(), 1), outputs(plain, plain.init(), 1)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
