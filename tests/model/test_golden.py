"""Our model, loss and optimizers, compared with the RecIS example in PyTorch (`golden/README.md`)."""

import dataclasses

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from s2s_jax.cluster.mesh import make_mesh
from s2s_jax.embedding.tables import table_specs
from s2s_jax.training.step.batches import put_batch
from s2s_jax.training.step.functions import make_step_functions
from s2s_jax.training.step.settings import StepSettings


def run(config, arrays, steps, devices=1):
    mesh = make_mesh(jax.devices()[:devices])
    functions = make_step_functions(StepSettings.of(config), mesh)
    state = functions.init()
    params = golden.params_from(arrays, "w0", table_specs(config.features, config.tables))
    jax.tree.map(lambda a, b: np.testing.assert_equal(a.shape, b.shape), state.params, params)
    params = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), params, state.params)
    state = state._replace(params=params)
    losses, hit_rates = [], []
    for step in range(steps):
        state, metrics = functions.train_step(state, put_batch(golden.batch(arrays, step), 1, mesh))
        losses.append(float(metrics["loss"]))
        hit_rates.append(float(metrics["hit_rate"]))
    return losses, hit_rates, jax.device_get(state.params)


@pytest.mark.parametrize(
    ("name", "tolerance", "devices"),
    [
        ("golden_seed.npz", 1e-5, 4),
        ("golden_fast.npz", 2e-5, 1),
        pytest.param("golden_seed.npz", 1e-5, 1, marks=pytest.mark.slow),
        pytest.param("golden_fast.npz", 2e-5, 4, marks=pytest.mark.slow),
    ],
)
def test_losses_hit_rates_and_weights(name, tolerance, devices):
    arrays = golden.load(name)
    config = golden.recis_config(arrays)
    losses, hit_rates, params = run(config, arrays, len(arrays["losses"]), devices)
    np.testing.assert_allclose(losses, arrays["losses"], rtol=tolerance)
    # Both count hits of the same pairs, so equal rates mean equal counts.
    pairs = arrays["ids/item"].shape[1] * (arrays["ids/item"].shape[2] - 1)
    np.testing.assert_array_equal(
        np.rint(np.multiply(hit_rates, pairs)), np.rint(arrays["hit_rates"] * pairs)
    )
    if name == "golden_seed.npz":
        assert_same_weights(params, arrays, config)


def assert_same_weights(params, arrays, config):
    expected = golden.params_from(arrays, "w1", table_specs(config.features, config.tables))
    # The true gradient of the key bias is 0, where Adam turns rounding errors into steps.
    hidden = config.model.hidden_size
    for tree in (params, expected):
        bias = np.array(tree["dense"]["transformer"]["layers"]["attn"]["qkv"]["bias"])
        bias[:, hidden : 2 * hidden] = 0
        tree["dense"]["transformer"]["layers"]["attn"]["qkv"]["bias"] = bias
    for spec in table_specs(config.features, config.tables).values():
        unused = golden.table_from(spec, np.ones((spec.buckets, spec.emb_dim))) == 0
        params["tables"][spec.name] = np.where(unused, 0, params["tables"][spec.name])
    jax.tree.map(
        lambda ours, theirs: np.testing.assert_allclose(ours, theirs, atol=1e-4), params, expected
    )


def test_losses_with_the_corrected_pairing():
    arrays = golden.load("golden_seed.npz")
    config = golden.recis_config(arrays)
    config = dataclasses.replace(config, loss=dataclasses.replace(config.loss, pairing="next"))
    losses, hit_rates, _ = run(config, arrays, len(arrays["losses_next"]))
    np.testing.assert_allclose(losses, arrays["losses_next"], rtol=1e-5)
    np.testing.assert_allclose(hit_rates, arrays["hit_rates_next"], atol=1e-6)


def test_bfloat16_is_near():
    arrays = golden.load("golden_seed.npz")
    config = golden.recis_config(arrays)
    model = dataclasses.replace(config.model, dtype="bfloat16")
    config = dataclasses.replace(config, model=model)
    losses, _, params = run(config, arrays, 5)
    np.testing.assert_allclose(losses, arrays["losses"][:5], rtol=1e-2)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
