"""Muon, and learning rates of layers and tables, against NumPy in float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small

from s2s_jax.cluster.mesh import make_mesh
from s2s_jax.config import LRConfig
from s2s_jax.embedding.exchange import RowGradients
from s2s_jax.training.step.batches import put_batch
from s2s_jax.training.step.functions import make_step_functions
from s2s_jax.training.step.optimizer import make_optimizer
from s2s_jax.training.step.settings import StepSettings

Y, E, F, STEPS = 3, 4, 6, 3
RATE, DECAY = 0.02, 0.1


def weights(seed):
    """Arrays with the names and axes of the dense part."""
    rng = np.random.default_rng(seed)

    def linear(inputs, outputs, *layers):
        return {
            "kernel": rng.normal(size=(*layers, inputs, outputs)).astype(np.float32),
            "bias": rng.normal(size=(*layers, outputs)).astype(np.float32),
        }

    layers = {
        "attn": {"qkv": linear(E, 3 * E, Y), "proj": linear(E, E, Y)},
        "hstu": {"uqkv": linear(E, 4 * E, Y)},
        "ffn": {"up": linear(E, F, Y), "down": linear(F, E, Y)},
        "norm1": {"scale": rng.normal(size=(Y, E)).astype(np.float32)},
    }
    transformer = {
        "layers": layers,
        "positions": rng.normal(size=(5, E)).astype(np.float32),
        "final_norm": {"scale": rng.normal(size=E).astype(np.float32)},
    }
    return {"proj": linear(7, E), "transformer": transformer}


def orthogonalized(matrix):
    """Five steps of Newton and Schulz, with the coefficients of Jordan et al."""
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / np.linalg.norm(x)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.T if tall else x


def muon(gradients):
    """The directions of one matrix for its gradients: Nesterov's momentum, corrected, orthogonal."""
    momentum, found = 0.0, []
    for t, g in enumerate(np.asarray(gradients, np.float64), 1):
        momentum = 0.95 * momentum + 0.05 * g
        ahead = 0.95 * momentum / (1 - 0.95 ** (t + 1)) + 0.05 * g / (1 - 0.95**t)
        found.append(0.2 * max(g.shape) ** 0.5 * orthogonalized(ahead))
    return found


def adamw(gradients):
    m = v = 0.0
    found = []
    for t, g in enumerate(np.asarray(gradients, np.float64), 1):
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        found.append(m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8))
    return found


def expected(path, value, gradients, config):
    """An array after all steps."""
    if path[-1] == "kernel" and config.dense_optimizer == "muon":
        parts = {"qkv": 3, "uqkv": 4}.get(path[-2], 1)
        stacked = [g.reshape(-1, *g.shape[-2:]) for g in gradients]
        directions = np.zeros((STEPS, *stacked[0].shape))
        for layer in range(stacked[0].shape[0]):
            split = [np.split(g[layer], parts, axis=1) for g in stacked]
            of_parts = [muon(part) for part in zip(*split, strict=True)]
            for t, each in enumerate(zip(*of_parts, strict=True)):
                directions[t, layer] = np.concatenate(each, axis=1)
        directions = directions.reshape(STEPS, *value.shape)
    else:
        directions = adamw(gradients)
    ratio = np.ones(1)
    if "layers" in path:
        ratio = config.layer_decay ** (Y - 1.0 - np.arange(Y))
    elif path[0] == "proj" or "positions" in path:
        ratio = np.array([config.layer_decay**Y])
    ratio = ratio.reshape(-1, *[1] * (value.ndim - 1))
    value = value.astype(np.float64)
    for direction in directions:
        value = value - RATE * ratio * (direction + DECAY * value)
    return value


@pytest.mark.parametrize("layer_decay", [1.0, 0.5])
@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_the_dense_part_against_numpy(kind, layer_decay):
    config = LRConfig(
        dense_lr=RATE, weight_decay=DECAY, dense_optimizer=kind, layer_decay=layer_decay
    )
    optimizer, params = make_optimizer(config), {"dense": weights(0), "tables": {}}
    state = optimizer.init(params)
    gradients = [weights(seed) for seed in range(1, STEPS + 1)]
    found = params

    def reduce(_, visit, carry):
        return visit(carry, {})

    @jax.jit
    def update(gradient, state, found):
        updates, state = optimizer.update(
            {"dense": gradient, "tables": {}}, state, found, reduce=reduce
        )
        return {"dense": optax.apply_updates(found["dense"], updates["dense"]), "tables": {}}, state

    for gradient in gradients:
        found, state = update(gradient, state, found)

    def check(path, value, ours, *gradients):
        names = [entry.key for entry in path]
        wanted = expected(names, value, gradients, config)
        np.testing.assert_allclose(ours, wanted, rtol=2e-4, atol=2e-4, err_msg=str(names))

    jax.tree_util.tree_map_with_path(check, params["dense"], found["dense"], *gradients)


def trained(config, devices=1):
    mesh = make_mesh(jax.devices()[:devices])
    functions = make_step_functions(StepSettings.of(config), mesh)
    state = functions.init()
    before = jax.device_get(state.params)
    for step in range(2):
        state, _ = functions.train_step(state, put_batch(small.batch(config, 16, step), 1, mesh))
    return before, jax.device_get(state.params)


def test_tables_and_their_default_rows_have_learning_rates_of_their_own():
    """The first step of Adam is as large as the learning rate, whatever the gradient."""
    config = LRConfig(sparse_lr=0.01, weight_decay=0.0)
    optimizer = make_optimizer(config, has_default_rows=True, ratios={"a": 0.25, "b": 1.0})
    tables, rows = ({name: jnp.ones(shape) for name in "ab"} for shape in ((4, 3), 3))
    params = {"dense": {}, "tables": tables, "unknown": rows}

    def reduce(gradients, visit, carry):
        used = jnp.array([1, 3])
        return visit(carry, {n: RowGradients(used, g[used]) for n, g in gradients.items()})

    updates, _ = optimizer.update(params, optimizer.init(params), params, reduce=reduce)
    for name, rate in (("a", 0.0025), ("b", 0.01)):
        np.testing.assert_allclose(updates["unknown"][name], -rate, rtol=1e-5)
        expected = [[1] * 3, [1 - rate] * 3, [1] * 3, [1 - rate] * 3]
        np.testing.assert_allclose(updates["tables"].values[name], expected, rtol=1e-6)


@pytest.mark.slow
def test_muon_does_not_depend_on_the_sharding_of_the_dense_part():
    lr = LRConfig(dense_lr=1e-2, sparse_lr=1e-2, dense_optimizer="muon")
    config = small.config(lr=lr)
    sharded = dataclasses.replace(
        config, train=dataclasses.replace(config.train, dense_sharding="fsdp")
    )
    (before, one), (_, other) = trained(config), trained(sharded, 2)
    kernels = [
        jnp.asarray(each["dense"]["transformer"]["layers"]["ffn"]["up"]["kernel"])
        for each in (before, one, other)
    ]
    np.testing.assert_allclose(kernels[1], kernels[2], atol=1e-4)
    assert np.abs(kernels[0] - kernels[1]).max() > 1e-3
