"""Checkpoints with other numbers of devices, and the memory of a device meanwhile."""

import contextlib
import dataclasses
import threading
import time

import jax
import numpy as np
import small
from jobs_of import checkpoints_of
from saving import configured

from s2s_jax.cluster.mesh import make_mesh
from s2s_jax.config import FeatureConfig
from s2s_jax.embedding.sharded import ShardedTables
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
