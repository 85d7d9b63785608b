"""Shares of items counted from the batches so far: the sketch, steps and runs, compared with NumPy.

Shapes: M events, U distinct items, K ids of a bag.
"""

import collections
import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from jobs_of import assert_same_run, checkpoints_of, saved_state
from pyarrow import orc
from sampling import ROWS, configured, expected_loss

from s2s_jax.cluster.mesh import make_mesh
from s2s_jax.jobs.train import train
from s2s_jax.training.step import item_stream
from s2s_jax.training.step.batches import put_batch
from s2s_jax.training.step.functions import make_step_functions
from s2s_jax.training.step.item_stream import counted, empty_stream, item_keys, shares
from s2s_jax.training.step.settings import StepSettings

STREAM = {"log_q": "stream"}


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    directory = tmp_path_factory.mktemp("log") / "log"
    small.write_log(directory, 90)
    return directory


@pytest.fixture
def no_catalogue(monkeypatch):
    def collect(*_: Any) -> None:
        raise AssertionError("the log is not to be read beforehand")

    monkeypatch.setattr("s2s_jax.data.items.catalogue.collect", collect)


@functools.partial(jax.jit, static_argnums=3)
def count(stream, id_M, there_M, most_events):
    return counted(stream, item_keys(id_M[:, None], there_M, 1), most_events)


@jax.jit
def share(stream, id_U):
    return shares(stream, item_keys(id_U[:, None], jnp.ones(id_U.shape, bool), 1))


def stream_of(*batches, cells=item_stream.CELLS, most_events=item_stream.MOST_EVENTS):
    stream = empty_stream(cells)
    for id_M, there_M in batches:
        stream = count(stream, id_M, there_M, most_events)
    return stream


def test_few_items_are_counted_exactly_and_empty_keys_are_not_counted():
    rng = np.random.default_rng(0)
    batches = [(rng.integers(0, 50, 400, dtype=np.int32), rng.random(400) < 0.7) for _ in range(3)]
    stream = stream_of(*batches)
    events = np.concatenate([id_M[there_M] for id_M, there_M in batches])
    assert int(stream.events) == len(events)
    count_U = np.bincount(events, minlength=60)
    found = share(stream, np.arange(60, dtype=np.int32))
    np.testing.assert_allclose(found, count_U / len(events), rtol=1e-6)
    assert (np.asarray(found[50:]) == 0).all()


def test_counts_of_many_items_are_never_too_low_and_rarely_much_too_high():
    """The error of the sketch with many items: 20,000 in rows of 4,096 cells."""
    rng = np.random.default_rng(1)
    cells = 4096
    # Ids in a regular pattern, with Zipf frequencies.
    p_U = 1 / np.arange(1, 20_001)
    batches = [
        (64 * rng.choice(20_000, 20_000, p=p_U / p_U.sum()).astype(np.int32), np.ones(20_000, bool))
        for _ in range(4)
    ]
    events = np.concatenate([id_M for id_M, _ in batches])
    id_U, count_U = np.unique(events, return_counts=True)
    estimate_U = np.asarray(share(stream_of(*batches, cells=cells), id_U)) * len(events)
    over_U = estimate_U - count_U
    assert over_U.min() > -0.01
    assert np.mean(over_U > np.e / cells * len(events)) < np.exp(-item_stream.ROWS)
    # Conservative updates: without them, the sketch would overcount several times as much.
    assert 0.01 < over_U.mean() < 0.4 * plain_excess(id_U, count_U, cells).mean()


def plain_excess(id_U, count_U, cells):
    """The excess in the smallest cell of each item, without conservative updates, in NumPy."""
    cell_RU = np.random.default_rng(2).integers(cells, size=(item_stream.ROWS, len(id_U)))
    in_cell = [np.bincount(cell_U, count_U, minlength=cells)[cell_U] for cell_U in cell_RU]
    return np.min(in_cell, axis=0) - count_U


def test_counts_are_halved_before_a_batch_when_there_are_many():
    def batch(**count_of):
        pairs = [np.full(n, int(item[1:]), np.int32) for item, n in count_of.items()]
        return np.concatenate(pairs), np.ones(sum(count_of.values()), bool)

    first, second, third = batch(i1=60, i2=41, i3=1), batch(i1=10, i4=92), batch(i3=50, i4=52)
    events = [102, 51 + 102, 76 + 102]
    counts = [[60, 41, 1, 0], [30 + 10, 20, 0, 92], [20, 10, 50, 46 + 52]]
    for number in (1, 2, 3):
        stream = stream_of(*[first, second, third][:number], most_events=101)
        assert int(stream.events) == events[number - 1]
        found = share(stream, np.arange(1, 5, dtype=np.int32)) * events[number - 1]
        np.testing.assert_allclose(found, counts[number - 1], rtol=1e-6)
    assert int(stream_of(first, second, most_events=102).events) == 204


@pytest.mark.parametrize("words", [1, 2])
def test_keys_of_bags_depend_on_every_word_and_its_order(words):
    rng = np.random.default_rng(3)
    bag_UK = np.unique(rng.integers(-1, 3, (500, 3 * words), dtype=np.int32), axis=0)
    ids = bag_UK if words == 1 else bag_UK.reshape(len(bag_UK), 3, 2)
    there = np.ones(len(ids), bool)
    keys = np.asarray(jax.jit(item_keys, static_argnums=2)(ids, there, words))
    assert len(np.unique(keys, axis=0)) == len(bag_UK) > 60
    assert len(np.unique(keys[:, 0] % 2**20)) > 0.99 * len(bag_UK)


def two_steps(config, devices, microbatches):
    """Takes two steps, compares their losses with NumPy, and returns the stream after them."""
    mesh = make_mesh(jax.devices()[:devices])
    functions = make_step_functions(StepSettings.of(config), mesh)
    state, batches = functions.init(), []
    for step in range(2):
        batches.append(small.batch(config, ROWS, step))
        expected = expected_loss(config, functions, state, batches[-1], mesh, [], batches)
        sent = put_batch(batches[-1], microbatches, mesh)
        state, metrics = functions.train_step(state, sent)
        np.testing.assert_allclose(metrics["loss"], expected, rtol=2e-5)
    return jax.device_get(state.stream)


def test_steps_of_two_devices_against_numpy(log, tmp_path):
    stream = two_steps(configured(log, tmp_path, **STREAM), devices=2, microbatches=2)
    assert stream.events == sum(
        small.batch(small.config(), ROWS, n)["length"].sum() for n in (0, 1)
    )


def test_a_batch_without_pairs_keeps_all_numbers_finite(log, tmp_path):
    config = configured(log, tmp_path, **STREAM)
    mesh = make_mesh(jax.devices()[:1])
    functions = make_step_functions(StepSettings.of(config), mesh)
    batch = small.batch(small.config(), 4, 0)
    batch["length"] = np.zeros_like(batch["length"])
    state, metrics = functions.train_step(functions.init(), put_batch(batch, 1, mesh))
    assert float(metrics["loss"]) == 0
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.device_get(state.params)))


@pytest.mark.slow
def test_the_stream_does_not_depend_on_devices(log, tmp_path):
    config = configured(log, tmp_path, **STREAM)
    one = two_steps(config, 1, 1)
    for devices, microbatches in ((1, 4), (2, 2), (4, 1)):
        other = two_steps(config, devices, microbatches)
        jax.tree.map(np.testing.assert_array_equal, other, one)


@pytest.mark.slow
def test_a_run_reads_no_catalogue_and_continues_as_if_never_stopped(log, tmp_path, no_catalogue):
    def run(name, steps):
        config = configured(log, tmp_path / name, **STREAM)
        settings = dataclasses.replace(config.train, train_steps=steps, save_steps=100)
        config = dataclasses.replace(config, train=settings)
        assert not train(config, make_mesh(jax.devices()[:1]))
        return config

    # An epoch, so that every row was read once.
    run("stopped", 7)
    continued, straight = run("stopped", 12), run("straight", 12)
    assert_same_run(continued, straight, step=12)
    state, _ = saved_state(continued, 12)
    rows = [
        row for path in log.glob("*.orc") for row in orc.read_table(path)["item_id"].to_pylist()
    ]
    count_of = collections.Counter(item for row in rows for (item,) in row[-small.SEQ_LEN :])
    id_U, count_U = (np.array(list(x), np.int32) for x in (count_of.keys(), count_of.values()))
    assert state.stream.events == count_U.sum()
    np.testing.assert_allclose(share(state.stream, id_U), count_U / count_U.sum(), rtol=1e-6)


class Before(NamedTuple):
    """The state in versions without a stream."""

    step: Any
    params: Any
    opt_state: Any
    maps: Any


def test_older_checkpoints_are_restored(log, tmp_path, monkeypatch):
    config = configured(log, tmp_path)
    functions = make_step_functions(StepSettings.of(config), make_mesh(jax.devices()[:1]))
    rng = np.random.default_rng(0)
    state = jax.tree.map(
        lambda x: jax.device_put((99 * rng.random(x.shape)).astype(x.dtype), x.sharding),
        functions.abstract,
    )
    assert state.stream == {}
    checkpoints = checkpoints_of(config)
    monkeypatch.setattr(type(state), "saved_parts", lambda state: Before(*state[:4]))
    checkpoints.save(1, state, {})
    checkpoints.wait()
    monkeypatch.undo()
    restored = checkpoints.restore(1, functions.abstract)
    checkpoints.close()
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, restored, state)
