"""The train step: accumulation, devices, donation and updated rows."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
import small

from s2s_jax.cluster.mesh import make_mesh
from s2s_jax.config import LRConfig, TimeGaps
from s2s_jax.embedding.tables import table_specs
from s2s_jax.errors import UserError
from s2s_jax.training.step.batches import put_batch
from s2s_jax.training.step.functions import make_step_functions
from s2s_jax.training.step.optimizer import state_of, table_moments
from s2s_jax.training.step.settings import StepSettings
from s2s_serve.encoding.features import id_columns

ROWS = 16
CLIPPED = small.config(lr=LRConfig(dense_lr=1e-2, sparse_lr=1e-2, clip_norm=1.0))


@functools.cache
def run(config, steps=4, devices=1, microbatches=1):
    mesh = make_mesh(jax.devices()[:devices])
    functions = make_step_functions(StepSettings.of(config), mesh)
    state = functions.init()
    all_metrics = []
    for step in range(steps):
        batch = put_batch(small.batch(config, ROWS, step), microbatches, mesh)
        state, metrics = functions.train_step(state, batch)
        all_metrics.append(jax.device_get(metrics))
    return jax.device_get(state), all_metrics


def assert_close(one, other):
    for ours, theirs in zip(one[1], other[1], strict=True):
        for name in ours:
            np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-5, err_msg=name)
    # Adam divides by the root of small numbers, so rounding affects weights more than losses.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-5),
        _without_key_bias(one[0].params),
        _without_key_bias(other[0].params),
    )


def _without_key_bias(params):
    # Its true gradient is 0, so Adam turns rounding errors into full steps.
    params = jax.tree.map(np.array, params)
    bias = params["dense"]["transformer"]["layers"]["attn"]["qkv"]["bias"]
    bias[:, 16:32] = 0
    return params


# The test that accumulation over two devices equals one large batch covers this too, with clipping.
@pytest.mark.slow
def test_clipped_steps_do_not_depend_on_the_devices():
    assert_close(run(CLIPPED, devices=4), run(CLIPPED))


@pytest.mark.parametrize("devices", [*(pytest.param(n, marks=pytest.mark.slow) for n in (2, 4)), 8])
def test_20_steps_do_not_depend_on_the_devices(devices):
    config = small.config(lr=LRConfig(dense_lr=1e-3, sparse_lr=1e-3))
    (one, losses), (other, others) = run(config, 20), run(config, 20, devices)
    for name in ("loss", "grad_norm"):
        now, then = [m[name] for m in others], [m[name] for m in losses]
        np.testing.assert_allclose(now, then, rtol=1e-5)
    for name, table in one.params["tables"].items():
        np.testing.assert_allclose(other.params["tables"][name], table, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("devices", "microbatches"),
    [
        pytest.param(1, 4, marks=pytest.mark.slow),
        pytest.param(1, 16, marks=pytest.mark.slow),
        (2, 4),
    ],
)
def test_accumulation_equals_the_large_batch(devices, microbatches):
    accumulated = run(CLIPPED, devices=devices, microbatches=microbatches)
    assert_close(accumulated, run(CLIPPED))


@pytest.mark.parametrize(
    ("devices", "microbatches"),
    [
        pytest.param(8, 1, marks=pytest.mark.slow),
        (2, 1),
        pytest.param(4, 2, marks=pytest.mark.slow),
    ],
)
def test_fsdp_changes_only_the_sharding_of_the_dense_part(devices, microbatches):
    config = dataclasses.replace(
        CLIPPED, train=dataclasses.replace(CLIPPED.train, dense_sharding="fsdp")
    )
    assert_close(run(config, devices=devices, microbatches=microbatches), run(CLIPPED))
    state = make_step_functions(StepSettings.of(config), make_mesh(jax.devices()[:devices])).init()
    kernel = state.params["dense"]["transformer"]["layers"]["ffn"]["up"]["kernel"]
    moment = state_of(state.opt_state, "dense")[0].mu["dense"]["transformer"]["layers"]["ffn"]["up"]
    for array in (kernel, moment["kernel"]):
        layers, size_in, size_out = array.shape
        shapes = {s.data.shape for s in array.addressable_shards}
        assert shapes == {(layers, size_in // devices, size_out)}


@pytest.mark.slow
@pytest.mark.slow
def test_steps_with_time_gaps_do_not_depend_on_devices_and_microbatches():
    model = dataclasses.replace(CLIPPED.model, time_bias=TimeGaps())
    config = dataclasses.replace(CLIPPED, model=model)
    one = run(config)
    assert_close(run(config, devices=4, microbatches=2), one)
    heads = one[0].params["dense"]["transformer"]["layers"]["attn"]["heads"]
    assert np.abs(heads["time_bias"]).max() > 1e-2


@pytest.mark.slow
def test_local_negatives_come_from_the_same_device():
    """Two devices with the same rows give the same as one alone; with global scope they do not."""
    half = small.batch(CLIPPED, ROWS, 0)
    twice = {name: np.concatenate([array, array]) for name, array in half.items()}
    loss = dataclasses.replace(CLIPPED.loss, mask_same_item=False)
    found = []
    for scope, devices, batch in (("local", 1, half), ("local", 2, twice), ("global", 2, twice)):
        config = small.config(loss=dataclasses.replace(loss, negative_scope=scope))
        mesh = make_mesh(jax.devices()[:devices])
        functions = make_step_functions(StepSettings.of(config), mesh)
        _, metrics = functions.train_step(functions.init(), put_batch(batch, 1, mesh))
        found.append([float(metrics[n]) for n in ("loss", "hit_rate", "grad_norm")])
    np.testing.assert_allclose(found[1], found[0], rtol=1e-5)
    assert found[2][0] > found[0][0] + 0.5


@pytest.mark.slow
def test_more_padding_changes_nothing():
    """The same sequences in longer rows give the same loss, gradient norm and updated weights."""
    longer = dataclasses.replace(
        CLIPPED, model=dataclasses.replace(CLIPPED.model, seq_len=small.SEQ_LEN + 3)
    )
    mesh = make_mesh(jax.devices()[:1])
    results = []
    for config in (CLIPPED, longer):
        batch = small.batch(CLIPPED, ROWS, 0)
        more = config.model.seq_len - small.SEQ_LEN
        batch["ids"] = np.pad(batch["ids"], ((0, 0), (0, more), (0, 0)), constant_values=-1)
        functions = make_step_functions(StepSettings.of(config), mesh)
        state, metrics = functions.train_step(functions.init(), put_batch(batch, 1, mesh))
        results.append(jax.device_get((state, [metrics])))
    assert_close(*results)


@pytest.mark.slow
def test_dropout_depends_only_on_seed_and_step():
    config = small.config()
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, dropout=0.3))
    one, other = run(config), run.__wrapped__(config)
    assert [m["loss"] for m in one[1]] == [m["loss"] for m in other[1]]
    reseeded = dataclasses.replace(config, train=dataclasses.replace(config.train, seed=7))
    assert [m["loss"] for m in run(reseeded)[1]] != [m["loss"] for m in one[1]]


def test_the_state_is_updated_in_place():
    config = small.config()
    mesh = make_mesh(jax.devices()[:2])
    functions = make_step_functions(StepSettings.of(config), mesh)
    state = functions.init()
    batch = put_batch(small.batch(config, ROWS, 0), 1, mesh)
    before = jax.tree.leaves(state)
    where = _addresses(state)
    state, _ = functions.train_step(state, batch)
    assert all(leaf.is_deleted() for leaf in before)
    assert _addresses(state) == where


def _addresses(state):
    moments = table_moments(state.opt_state)
    arrays = [*state.params["tables"].values(), *moments.values()]
    return [s.data.unsafe_buffer_pointer() for a in arrays for s in a.addressable_shards]


def test_unused_rows_and_their_moments_do_not_change():
    config = CLIPPED
    functions = make_step_functions(StepSettings.of(config), make_mesh(jax.devices()[:1]))
    start = jax.device_get(functions.init())
    state, _ = run(config)
    moments = table_moments(state.opt_state)
    for name, spec in table_specs(config.features, config.tables).items():
        asked = np.concatenate(
            [
                small.batch(config, ROWS, s)["ids"][..., id_columns(config.features)[f]].ravel()
                for s in range(4)
                for f in spec.features
            ]
        )
        asked = asked[asked >= 0]
        used = np.zeros(spec.rows, bool)
        used[asked % 256 * spec.segment_rows + asked // 256] = True
        before, after = start.params["tables"][name], state.params["tables"][name]
        np.testing.assert_array_equal(before[~used], after[~used])
        assert np.all(moments[name][~used] == 0)
        assert np.all(np.any(before[used] != after[used], axis=-1))


def test_tables_and_moments_are_sharded_by_rows():
    functions = make_step_functions(StepSettings.of(small.config()), make_mesh(jax.devices()[:4]))
    state = functions.init()
    moments = table_moments(state.opt_state)
    for tables in (state.params["tables"], moments):
        for table in tables.values():
            shapes = {s.data.shape for s in table.addressable_shards}
            assert shapes == {(table.shape[0] // 4, table.shape[1])}


def test_counts_exclude_padding():
    _, metrics = run(CLIPPED)
    length = small.batch(small.config(), ROWS, 0)["length"]
    assert metrics[0]["tokens"] == length.sum()
    assert metrics[0]["examples"] == (length > 0).sum()


def test_devices_that_do_not_divide_the_segments_are_refused():
    with pytest.raises(UserError, match="3 devices"):
        make_mesh(jax.devices()[:3])


@pytest.mark.slow
def test_dropout_of_events_needs_no_other_dropout():
    """Without dropout in the layers, dropout of events is still random in each step."""
    config = small.config()
    assert config.model.dropout == 0
    dropped = dataclasses.replace(
        config, model=dataclasses.replace(config.model, input_dropout=0.5)
    )
    functions = make_step_functions(StepSettings.of(dropped), mesh := make_mesh(jax.devices()[:1]))
    batch = put_batch(small.batch(config, ROWS, 0), 1, mesh)
    losses = []
    for step in (0, 0, 1):
        state = functions.init()
        state = state._replace(step=state.step + step)
        losses.append(float(functions.train_step(state, batch)[1]["loss"]))
    assert losses[0] == losses[1] != losses[2]
    assert abs(losses[0] - float(run(config)[1][0]["loss"])) > 1e-3
