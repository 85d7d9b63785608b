"""Rows that items begin with: written to the right places, and kept by runs that continue."""

import dataclasses

import jax
import numpy as np
import pytest
import small
from growth import SMALLEST, rows_in_map
from jobs_of import assert_same_run, job, lines, one_device, saved_state

from s2s_jax.cluster.mesh import make_mesh
from s2s_jax.config import LastEvents, TableConfig, validate
from s2s_jax.embedding.tables import rows_of_buckets, table_specs
from s2s_jax.errors import UserError
from s2s_jax.jobs.initial_items import initial_items
from s2s_jax.jobs.train import train
from s2s_jax.training import initial_items as module
from s2s_jax.training.growth import GrowthPlan, max_load
from s2s_jax.training.initial_items import with_item_rows
from s2s_jax.training.step.functions import make_step_functions
from s2s_jax.training.step.optimizer import table_moments
from s2s_jax.training.step.settings import StepSettings

# Shapes: I items, D width of the item table.


def table_rows(config, state, ids):
    """The numbers of the table's rows of some ids."""
    spec = table_specs(config.features, config.tables)["item_id"]
    if spec.grows:
        return rows_in_map(state, "item_id", ids)
    return np.asarray(rows_of_buckets(spec, ids.astype(np.int32)))


@pytest.mark.parametrize(
    "devices", [1, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 4)), 8]
)
@pytest.mark.parametrize("grows", [False, True], ids=["buckets", "growing"])
def test_rows_are_written_where_ids_find_them(devices, grows, monkeypatch):
    monkeypatch.setattr(module, "_TOGETHER", 7)  # Several parts; the last one is not full.
    config = small.growing(small.config()) if grows else small.config()
    mesh = make_mesh(jax.devices()[:devices])
    rng = np.random.default_rng(0)
    ids = rng.permutation(300)[:100]
    rows_ID = rng.standard_normal((100, 8)).astype(np.float32)
    plan = GrowthPlan(config.features, config.tables)
    settings = StepSettings.of(config)
    functions = make_step_functions(settings, mesh, plan.capacities)
    before = jax.device_get(functions.init())
    encoded = small.to_words(ids)[:, None] if grows else ids.astype(np.int32)[:, None]
    state = with_item_rows(settings, mesh, plan, functions.init(), encoded, rows_ID)
    row_I = table_rows(config, state, ids)
    values = np.asarray(state.params["tables"]["item_id"])
    np.testing.assert_array_equal(values[row_I], rows_ID)
    others = np.setdiff1d(np.arange(len(values)), row_I)
    np.testing.assert_array_equal(values[others], before.params["tables"]["item_id"][others])
    # Nothing else changed: other tables, the dense part, moments, and how often ids were seen.
    moments = table_moments(state.opt_state)
    assert not any(np.asarray(x).any() for x in jax.tree.leaves(moments))
    np.testing.assert_array_equal(
        state.params["tables"]["behavior_id"], before.params["tables"]["behavior_id"]
    )
    jax.tree.map(np.testing.assert_array_equal, state.params["dense"], before.params["dense"])
    if grows:
        assert int(state.maps["item_id"].rows_S.sum()) == 100
        assert not np.asarray(state.maps["item_id"].count_R).any()
    # The state can take a step, with the shardings that it should have.
    jax.tree.map(
        lambda leaf, expected: (
            leaf.sharding.is_equivalent_to(expected.sharding, leaf.ndim) or 1 / 0
        ),
        state,
        functions.abstract,
    )


def test_a_log_without_pairs_begins_with_random_rows():
    config, mesh = small.growing(small.config()), one_device()
    plan, settings = GrowthPlan(config.features, config.tables), StepSettings.of(config)
    functions = make_step_functions(settings, mesh, plan.capacities)
    nothing = np.zeros((0, 1, 2), np.int32), np.zeros((0, 8), np.float32)
    state = with_item_rows(settings, mesh, plan, functions.init(), *nothing)
    jax.tree.map(np.testing.assert_array_equal, state, functions.init())


def test_tables_have_room_before_the_first_step():
    config = small.growing(small.config())
    plan = GrowthPlan(config.features, config.tables)
    assert plan.make_room("item_id", 3 * SMALLEST) == 3 * SMALLEST
    capacity = plan.capacities["item_id"]
    assert 3 * SMALLEST <= max_load(capacity) * capacity < 6 * SMALLEST
    plan.begin_with("item_id", 3 * SMALLEST, 0)
    metrics = {
        "table/item_id/rows": 3 * SMALLEST + 5,
        "table/item_id/dropped": 0,
        "table/item_id/capacity": capacity,
    }
    plan.update(1, metrics)
    assert plan.capacities["item_id"] == capacity, "the first step brings only 5 new ids"
    limited = small.growing(small.config(), max_capacity=2 * SMALLEST)
    plan = GrowthPlan(limited.features, limited.tables)
    assert plan.make_room("item_id", 3 * SMALLEST) == int(max_load(2 * SMALLEST) * 2 * SMALLEST)
    assert plan.capacities["item_id"] == 2 * SMALLEST
    # A table of buckets has room for all.
    assert GrowthPlan(small.config().features, small.config().tables).make_room("item_id", 9) == 9


def with_neighbours(config, **settings):
    config = small.with_table(config, "item_id", init="neighbours", init_std=0.3, **settings)
    return dataclasses.replace(
        config, eval=dataclasses.replace(config.eval, split=LastEvents(events=2))
    )


@pytest.mark.parametrize(
    "grows",
    [pytest.param(False, id="buckets"), pytest.param(True, marks=pytest.mark.slow, id="growing")],
)
def test_a_run_begins_with_the_vectors_and_continues_exactly(grows, tmp_path):
    small.write_log(tmp_path / "log", 200)
    started = job(tmp_path / "log", tmp_path / "straight", log_steps=1, train_steps=6)
    config = with_neighbours(small.growing(started) if grows else started)
    ids, rows_ID = initial_items(config)
    np.testing.assert_allclose(np.sqrt((rows_ID**2).mean(axis=1)), 0.3, rtol=1e-5)
    # With learning rates of 0, rows stay as they began.
    still = dataclasses.replace(
        config,
        lr=dataclasses.replace(config.lr, dense_lr=0.0, sparse_lr=0.0),
        train=dataclasses.replace(
            config.train, output_dir=str(tmp_path / "still"), train_steps=1, save_steps=1
        ),
    )
    assert not train(still, one_device())
    state, _ = saved_state(still, 1)
    numbers = ids[:, 0, 0] if grows else ids[:, 0]
    row_I = table_rows(config, state, numbers)
    np.testing.assert_array_equal(state.params["tables"]["item_id"][row_I], rows_ID)
    # A run in two parts is the same run.
    assert not train(config, one_device())
    parts = dataclasses.replace(
        config, train=dataclasses.replace(config.train, output_dir=str(tmp_path / "parts"))
    )
    first = dataclasses.replace(parts, train=dataclasses.replace(parts.train, train_steps=3))
    assert not train(first, one_device())
    assert not train(parts, one_device())
    assert_same_run(config, parts, step=6)
    assert lines(tmp_path / "parts")[0]["step"] == 1


@pytest.mark.parametrize(
    ("table", "settings", "message"),
    [
        ("behavior_id", {}, "tables.behavior_id.init: expected normal"),
        ("item_id", {"admit_after": 2}, "tables.item_id.admit_after: expected 1, because init is"),
        ("item_id", {"evict_below": 2}, "tables.item_id.evict_below: expected 0, because init is"),
    ],
)
def test_tables_that_cannot_begin_with_neighbours(table, settings, message):
    config = small.growing(small.config())
    with pytest.raises(UserError, match=message):
        validate(small.with_table(config, table, init="neighbours", **settings))


def test_random_rows_are_the_default():
    assert TableConfig(name="item_id").init == "normal"
    assert initial_items(small.config()) is None
