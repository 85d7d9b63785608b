"""The encoder: causality and padding (tested with gradients), dropout and evaluation mode."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from flax import nnx

from s2s_jax.cluster.mesh import make_mesh
from s2s_jax.config import LossConfig
from s2s_jax.model.dropout import drop_rows
from s2s_jax.model.seq2seq import Seq2Seq
from s2s_jax.training.step.batches import put_batch
from s2s_jax.training.step.functions import make_step_functions
from s2s_jax.training.step.settings import StepSettings
from s2s_serve.encoding.features import id_columns

B, L = 3, small.SEQ_LEN


def make_model(**model_changes):
    config = small.config()
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, **model_changes))
    model = Seq2Seq(config.features, config.target_features, config.model, nnx.Rngs(0))
    rng = np.random.default_rng(0)
    embeddings = {
        f.name: jnp.asarray(rng.normal(size=(B, L, f.emb_dim)), jnp.float32)
        for f in config.features
    }
    return model, embeddings


def test_causality():
    """The gradient of a position's state is zero at later positions and nonzero at earlier ones."""
    model, embeddings = make_model()

    @jax.jit
    @jax.grad
    def gradient(embeddings, position):
        return model(embeddings).preds_ME.reshape(B, L, -1)[1, position].sum()

    for position in range(L):
        gradients = gradient(embeddings, position)
        for gradient_BLD in gradients.values():
            size_BL = np.abs(np.asarray(gradient_BLD)).max(axis=-1)
            assert np.all(size_BL[1, position + 1 :] == 0)
            assert np.all(size_BL[1, : position + 1] > 0)
            assert np.all(size_BL[[0, 2]] == 0)


def test_later_and_padded_positions_change_nothing_earlier():
    model, embeddings = make_model()
    changed = {n: x.at[:, 4:].set(1e3) for n, x in embeddings.items()}
    before = model(embeddings).preds_ME.reshape(B, L, -1)
    after = model(changed).preds_ME.reshape(B, L, -1)
    np.testing.assert_array_equal(before[:, :4], after[:, :4])
    assert np.all(np.abs(before[:, 4:] - after[:, 4:]).max(axis=-1) > 0)


def test_targets_show_target_features_only():
    model, embeddings = make_model()
    assert model.hidden == ("behavior_id",)

    def target(embeddings):
        return model(embeddings).targets_ME.sum()

    gradients = jax.grad(target)(embeddings)
    assert np.all(np.asarray(gradients["behavior_id"]) == 0)
    assert np.all(np.abs(np.asarray(gradients["item_id"])).max(axis=-1) > 0)
    # The same projection as for events, with hidden features set to zero.
    zeroed = embeddings | {"behavior_id": jnp.zeros_like(embeddings["behavior_id"])}
    concatenated = jnp.concatenate([zeroed[f] for f in ("item_id", "behavior_id", "tags")], -1)
    expected = concatenated.reshape(B * L, -1) @ model.proj.kernel[...]
    expected = expected + model.proj.bias[...][None]
    np.testing.assert_allclose(model(embeddings).targets_ME, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("position", ["none", "learned"])
@pytest.mark.parametrize("input_norm", [False, True])
def test_scanned_layers_equal_consecutive_layers(position, input_norm):
    model, embeddings = make_model(position=position, input_norm=input_norm)
    graph, stacked = nnx.split(model.transformer.layers)
    x = model._project(embeddings, ("item_id", "tags")) + model.proj.bias[...][None]
    x = x + model._project(embeddings, ("behavior_id",))
    if position == "learned":
        x = (x.reshape(B, L, -1) + model.transformer.positions[...][None]).reshape(x.shape)
    if input_norm:
        x = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-5)
    for i in range(2):
        layer = nnx.merge(graph, jax.tree.map(lambda p, i=i: p[i], stacked))
        x = layer(x, L, None)
    np.testing.assert_allclose(
        model.transformer.final_norm(x), model(embeddings).preds_ME, rtol=1e-5, atol=1e-6
    )
    first = jax.tree.leaves(stacked)[0]
    assert not np.array_equal(first[0], first[1]), "layers start alike"


@pytest.mark.parametrize("input_norm", [False, True])
def test_vectors_of_young_tables_matter_only_with_input_norm(input_norm):
    """With initial values a fifth as large, the input of the layers changes, or stays the same."""
    model, embeddings = make_model(input_norm=input_norm)
    bias = model.proj.bias
    assert bias is not None
    bias[...] = jnp.zeros_like(bias[...])
    smaller = jax.tree.map(lambda x: x / 5, embeddings)
    one, other = model(embeddings).preds_ME, model(smaller).preds_ME
    assert (np.abs(one - other).max() < 1e-3) == input_norm


@pytest.mark.parametrize("where", ["dropout", "input_dropout", "event_dropout"])
def test_dropout_is_a_function_of_its_key(where):
    model, embeddings = make_model(**{where: 0.5})
    quiet = model(embeddings).preds_ME
    one = model(embeddings, jax.random.key(1)).preds_ME
    np.testing.assert_array_equal(one, model(embeddings, jax.random.key(1)).preds_ME)
    assert not np.allclose(one, model(embeddings, jax.random.key(2)).preds_ME)
    assert not np.allclose(one, quiet)
    # Targets are complete.
    targets = model(embeddings, jax.random.key(1)).targets_ME
    np.testing.assert_array_equal(targets, model(embeddings).targets_ME)


def test_whole_events_are_dropped():
    x_ME = jax.random.normal(jax.random.key(0), (4000, 5))
    dropped_ME = np.asarray(drop_rows(x_ME, 0.3, jax.random.key(1)))
    kept_M = dropped_ME.any(axis=1)
    np.testing.assert_array_equal(dropped_ME[kept_M], np.asarray(x_ME)[kept_M])
    # Four standard deviations of the mean of 4,000 decisions.
    assert abs(kept_M.mean() - 0.7) < 4 * (0.3 * 0.7 / 4000) ** 0.5


def test_predictions_do_not_depend_on_dropped_events():
    """With nearly all events dropped, and no positions, all predictions of a row are the same."""
    model, embeddings = make_model(event_dropout=0.999, position="none")
    preds_BLE = model(embeddings, jax.random.key(1)).preds_ME.reshape(-1, L, 16)
    np.testing.assert_allclose(
        preds_BLE, np.broadcast_to(preds_BLE[:, :1], preds_BLE.shape), atol=1e-5
    )


def test_bfloat16_is_close_to_float32_with_float32_parameters():
    exact, embeddings = make_model()
    rough, _ = make_model(dtype="bfloat16")
    assert all(p.dtype == jnp.float32 for p in jax.tree.leaves(nnx.state(rough, nnx.Param)))
    one, other = exact(embeddings).preds_ME, rough(embeddings).preds_ME
    assert other.dtype == jnp.float32
    assert 1e-4 < np.abs(one - other).max() < 0.1


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_the_loss_compares_the_vectors_of_users_and_items(similarity):
    config = small.config(
        loss=LossConfig(similarity=similarity, target_features=("item_id", "tags"))
    )
    mesh = make_mesh(jax.devices()[:1])
    functions = make_step_functions(StepSettings.of(config), mesh)
    state, sent = functions.init(), small.batch(config, 8, 0)
    batch = put_batch(sent, 1, mesh)
    encoded = functions.predict(state, {name: x[0] for name, x in batch.items()})

    def expected(x_ME, position_B):
        x = np.asarray(x_ME).reshape(8, L, -1)[np.arange(8), position_B]
        return x / np.linalg.norm(x, axis=1, keepdims=True) if similarity == "cosine" else x

    last = np.maximum(sent["length"] - 1, 0)
    ids_MC = batch["ids"].reshape(8 * L, -1)
    users = functions.user_vectors(state, ids_MC, batch["length"][0], L).vectors_BE
    np.testing.assert_allclose(users, expected(encoded.preds_ME, last), rtol=1e-5, atol=1e-6)
    ids = {}
    for feature in config.features:
        columns = sent["ids"][..., id_columns(config.features)[feature.name]]
        ids[feature.name] = columns[None, np.arange(8), last][:, :, None]
    items = functions.item_vectors(state, ids)
    np.testing.assert_allclose(items, expected(encoded.targets_ME, last), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("devices", [1, 4])
def test_predict_is_eval_mode(devices):
    """`predict` gives the states without dropout, on any number of devices."""
    config = small.config()
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, dropout=0.5))
    mesh = make_mesh(jax.devices()[:devices])
    functions = make_step_functions(StepSettings.of(config), mesh)
    state = functions.init()
    batch = jax.tree.map(lambda x: x[0], put_batch(small.batch(config, 8, 0), 1, mesh))
    encoded = functions.predict(state, batch)
    assert encoded.preds_ME.shape == (8 * L, 16)
    np.testing.assert_array_equal(encoded.preds_ME, functions.predict(state, batch).preds_ME)
