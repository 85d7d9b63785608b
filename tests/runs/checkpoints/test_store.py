"""Checkpoints with other numbers of devices, and the memory of a device meanwhile."""

import contextlib
import dataclasses
import threading
import time

import jax
import numpy as np
import pytest
import small
from jobs_of import checkpoints_of
from orbax.checkpoint._src.arrays.subchunking import choose_chunk_shape
from saving import configured

from s2s_jax.cluster.mesh import make_mesh
from s2s_jax.config import FeatureConfig
from s2s_jax.embedding.sharded import ShardedTables
from s2s_jax.runs.checkpoints import store
from s2s_jax.runs.checkpoints.saved_array import SavedArray, keys_of_arrays
from s2s_jax.training.step.batches import put_batch
from s2s_jax.training.step.functions import make_step_functions
from s2s_jax.training.step.settings import StepSettings

ROWS = 16


def take_steps(config, functions, mesh, state, steps):
    losses = []
    for step in steps:
        batch = put_batch(small.batch(config, ROWS, step), 1, mesh)
        state, metrics = functions.train_step(state, batch)
        losses.append(float(metrics["loss"]))
    return state, losses


def embeddings_of_all_ids(config, mesh, state):
    """Every bucket of every feature, looked up on a mesh as for a batch."""
    tables = ShardedTables(config.features, config.tables, mesh)
    ids = {}
    for feature in config.features:
        bucket = np.arange(-(-feature.hash_bucket_size // 8) * 8, dtype=np.int32)
        bucket[feature.hash_bucket_size :] = -1
        ids[feature.name] = np.tile(bucket.reshape(1, 8, -1, 1), feature.bag_size)

    @jax.jit
    def embed(values, ids):
        found = tables.look_up(values, {}, ids)
        first = jax.tree.map(lambda x: x[0], (found.places, ids))
        return tables.embed(found.rows, *first)

    return jax.device_get(embed(state.params["tables"], ids))


def test_saved_on_8_devices_and_continued_on_2_and_on_1(tmp_path):
    straight = configured(tmp_path)
    mesh = make_mesh(jax.devices()[:8])
    functions = make_step_functions(StepSettings.of(straight), mesh)
    _, expected = take_steps(straight, functions, mesh, functions.init(), range(9))
    config = configured(tmp_path, "fsdp")
    losses, saved, looked_up = [], None, None
    for begin, devices in ((0, 8), (3, 2), (6, 1)):
        mesh = make_mesh(jax.devices()[:devices])
        functions = make_step_functions(StepSettings.of(config), mesh)
        with contextlib.closing(checkpoints_of(config)) as checkpoints:
            if begin == 0:
                state = functions.init()
            else:
                state = checkpoints.restore(begin, functions.abstract)
                jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), saved)
                now = embeddings_of_all_ids(config, mesh, state)
                jax.tree.map(np.testing.assert_array_equal, now, looked_up)
            shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
            assert shardings == jax.tree.map(lambda leaf: leaf.sharding, functions.abstract)
            state, more = take_steps(config, functions, mesh, state, range(begin, begin + 3))
            losses += more
            saved, looked_up = jax.device_get(state), embeddings_of_all_ids(config, mesh, state)
            checkpoints.save(begin + 3, state, {})
    np.testing.assert_allclose(losses, expected, rtol=1e-5)


class Sampler:
    """Continuously samples the largest part of an array that a device holds."""

    def __enter__(self):
        self.largest, self._done = 0, threading.Event()
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._done.set()
        self._thread.join()

    def _sample(self):
        while not self._done.is_set():
            self.look()
            time.sleep(0.002)

    def look(self):
        for array in jax.live_arrays():
            with contextlib.suppress(RuntimeError):  # The array was deleted meanwhile.
                shape = array.sharding.shard_shape(array.shape)
                self.largest = max(self.largest, int(np.prod(shape)) * array.dtype.itemsize)


@pytest.mark.slow
def test_no_device_ever_holds_a_whole_table(tmp_path):
    rows, width, devices = 2**17, 8, 8
    config = configured(tmp_path)
    features = (
        FeatureConfig(name="item_id", emb_dim=width, hash_bucket_size=rows),
        *(dataclasses.replace(f, shard_name=None) for f in config.features[1:]),
    )
    config = dataclasses.replace(config, features=features)
    mesh = make_mesh(jax.devices()[:devices])
    functions = make_step_functions(StepSettings.of(config), mesh)
    batch = put_batch(small.batch(config, ROWS, 0), 1, mesh)
    # The moments, two for each weight, are one array.
    table, others = rows * width * 4, 2**18
    largest = 2 * table // devices + others
    for compiled in (functions.init.lower().compile(), None):
        compiled = compiled or functions.train_step.lower(functions.abstract, batch).compile()
        memory = compiled.memory_analysis()
        assert memory.temp_size_in_bytes <= 3 * table // devices + others < table
        assert memory.output_size_in_bytes <= 3 * table // devices + others
    with Sampler() as sampler, contextlib.closing(checkpoints_of(config)) as checkpoints:
        state, _ = functions.train_step(functions.init(), batch)
        checkpoints.save(1, state, {})
        checkpoints.wait()
        state = checkpoints.restore(1, functions.abstract)
        sampler.look()
    assert 2 * table // devices <= sampler.largest <= largest


def chunk_bytes_of(path, config, devices):
    """The bytes of a chunk of a table and of its moments, in a checkpoint of the first state."""
    config = dataclasses.replace(
        config, train=dataclasses.replace(config.train, output_dir=str(path))
    )
    functions = make_step_functions(StepSettings.of(config), make_mesh(jax.devices()[:devices]))
    with contextlib.closing(checkpoints_of(config)) as checkpoints:
        checkpoints.save(1, functions.init(), {})
    state, found = path / "checkpoints/1/state", {}
    for keys in keys_of_arrays(state):
        if keys[-2:] != ("tables", "item_id"):
            continue
        array = SavedArray(state, keys)
        chunk = array._array.chunk_layout.read_chunk.shape
        found[".".join(keys)] = np.prod(chunk, dtype=int) * array.dtype.itemsize
    return found


@pytest.mark.parametrize("devices", [pytest.param(1, marks=pytest.mark.slow), 4])
@pytest.mark.parametrize("segment_rows", [1031, 1024])
def test_a_prime_number_of_rows_is_not_stored_in_tiny_chunks(
    tmp_path, monkeypatch, segment_rows, devices
):
    """A segment is larger than a chunk, and with a prime number of rows, it has no large parts."""
    monkeypatch.setattr(store, "_CHUNK_BYTES", 2**14)
    monkeypatch.setattr(store, "_LEAST_SHARE", 1)
    feature = FeatureConfig(name="item_id", emb_dim=8, hash_bucket_size=256 * segment_rows)
    loss = dataclasses.replace(small.config().loss, target_features=("item_id",))
    config = small.config(features=(feature,), tables=(), loss=loss)
    found = chunk_bytes_of(tmp_path, config, devices)
    segment_bytes = segment_rows * 8 * 4
    expected = segment_bytes if segment_rows == 1031 else 2**14
    assert found["params.tables.item_id"] == expected
    assert len(found) > 1
    assert min(found.values()) >= 2**14


def test_the_estimate_of_chunks_is_what_orbax_chooses():
    for part in [(256 * 1031, 128), (64 * 1031, 16), (5003, 5003), (12, 18), (2, 997, 512)]:
        for largest in (2**14, 2**20, 2**26):
            chosen = choose_chunk_shape(part, part, np.dtype(np.float32), largest)
            assert store._chunk_bytes(part, 4, largest) == 4 * np.prod(chosen, dtype=int)
    assert store._chunk_bytes((), 4, 2**14) == 4


@pytest.mark.parametrize(
    "name", ["x%20y", "x?y", *(pytest.param(n, marks=pytest.mark.slow) for n in ("a#b", "x y"))]
)
def test_arrays_are_read_from_directories_of_any_name(tmp_path, name):
    """Beside them are directories with the names that a URL would stand for, of other runs."""
    values = {}
    for seed, each in enumerate((name, {"x%20y": "x y", "x y": "x%20y"}.get(name, name[0]))):
        config = configured(tmp_path / each)
        config = dataclasses.replace(config, train=dataclasses.replace(config.train, seed=seed))
        functions = make_step_functions(StepSettings.of(config), make_mesh(jax.devices()[:1]))
        with contextlib.closing(checkpoints_of(config)) as checkpoints:
            checkpoints.save(1, state := functions.init(), {})
        values[each] = np.asarray(state.params["tables"]["behavior_id"])
    array = SavedArray(tmp_path / name / "checkpoints/1/state", ("params", "tables", "behavior_id"))
    np.testing.assert_array_equal(array.read(0, array.shape[0]), values[name])
