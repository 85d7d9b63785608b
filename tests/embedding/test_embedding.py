"""Tables and look-up: layout, initial values, unique rows and bags, on 1 to 8 devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from hypothesis import given, settings
from hypothesis import strategies as st

from s2s_jax.cluster.mesh import make_mesh, row_sharded
from s2s_jax.config import FeatureConfig, TableConfig
from s2s_jax.embedding import lookup
from s2s_jax.embedding.tables import (
    NUM_SEGMENTS,
    TableSpec,
    init_table,
    rows_of_buckets,
    table_specs,
)


def spec(buckets, width=4, std=1.0):
    return TableSpec(name="t", buckets=buckets, emb_dim=width, init_std=std, features=("f",))


@pytest.mark.parametrize("buckets", [1, 8, 255, 256, 257, 2048, 100_003])
def test_each_bucket_has_a_row_of_its_own(buckets):
    made = spec(buckets)
    rows = np.asarray(rows_of_buckets(made, jnp.arange(buckets)))
    assert len(set(rows)) == buckets
    assert rows.min() >= 0
    assert rows.max() < made.rows
    assert made.rows % NUM_SEGMENTS == 0
    assert made.rows < buckets + NUM_SEGMENTS
    assert np.asarray(rows_of_buckets(made, jnp.asarray([-1])))[0] == made.rows


def test_small_ids_spread_over_all_devices():
    made = spec(1_000_000)
    rows = np.asarray(rows_of_buckets(made, jnp.arange(1024)))
    owners = np.bincount(rows // (made.rows // 8), minlength=8)
    assert np.all(owners == 128)


def test_features_share_tables_by_shard_name():
    specs = table_specs(small.config().features, small.config().tables)
    assert specs["item_id"].features == ("item_id", "tags")
    assert specs["behavior_id"].features == ("behavior_id",)
    (own,) = table_specs(
        [FeatureConfig(name="x", hash_bucket_size=5)], [TableConfig(name="x")]
    ).values()
    assert (own.name, own.buckets, own.emb_dim) == ("x", 5, 128)


@pytest.mark.parametrize("devices", [1, 2, 4, 8])
def test_initial_values_do_not_know_the_devices(devices):
    made = spec(100_000, width=8, std=0.02)
    sharding = row_sharded(make_mesh(jax.devices()[:devices]))
    table = jax.jit(init_table, static_argnums=0, out_shardings=sharding)(made, jax.random.key(3))
    assert {s.data.shape for s in table.addressable_shards} == {(made.rows // devices, 8)}
    values = np.asarray(table)
    expected = np.asarray(jax.jit(init_table, static_argnums=0)(made, jax.random.key(3)))
    np.testing.assert_array_equal(values, expected)
    # A normal distribution truncated at two standard deviations has .8796 of the standard deviation.
    assert np.abs(values).max() <= 2 * 0.02
    np.testing.assert_allclose(values.std(), 0.8796 * 0.02, rtol=0.01)
    np.testing.assert_allclose(values.mean(), 0, atol=1e-4)


def test_no_device_ever_makes_a_whole_table():
    """The memory of a device while it makes its shard is proportional to the shard."""
    made = spec(2**20, width=32)
    held = {}
    for devices in (1, 8):
        sharding = row_sharded(make_mesh(jax.devices()[:devices]))
        init = jax.jit(init_table, static_argnums=0, out_shardings=sharding)
        analysis = init.lower(made, jax.random.key(0)).compile().memory_analysis()
        assert analysis.output_size_in_bytes == made.rows * made.emb_dim * 4 // devices
        held[devices] = analysis.output_size_in_bytes + analysis.temp_size_in_bytes
    assert held[8] < 1.1 * held[1] / 8
    assert held[8] < made.rows * made.emb_dim * 4


@settings(max_examples=40)
@given(data=st.data(), buckets=st.sampled_from([1, 5, 300, 1000]))
def test_unique_rows_lead_back_to_each_id(data, buckets):
    made = TableSpec(name="t", buckets=buckets, emb_dim=3, init_std=1.0, features=("f", "g"))
    shape = st.integers(-1, buckets - 1)
    ids = {
        "f": np.array(data.draw(st.lists(shape, min_size=6, max_size=6)), np.int32).reshape(2, 3),
        "g": np.array(data.draw(st.lists(shape, min_size=4, max_size=4)), np.int32).reshape(2, 2),
    }
    unique = lookup.deduplicate(made, ids)
    rows = np.asarray(unique.rows_U)
    assert np.all(np.diff(rows) > 0), "ascending and distinct"
    inside = rows[rows < made.rows]
    asked = np.concatenate([i.reshape(-1) for i in ids.values()])
    expected = {b % 256 * made.segment_rows + b // 256 for b in asked.tolist() if b >= 0}
    assert set(inside.tolist()) == expected
    table = np.arange(made.rows * 3, dtype=np.float32).reshape(-1, 3) + 1
    gathered = np.asarray(lookup.read_rows(jnp.asarray(table), unique.rows_U))
    for name, buckets_of in ids.items():
        found = gathered[np.asarray(unique.places[name])]
        row = buckets_of % 256 * made.segment_rows + buckets_of // 256
        there = buckets_of >= 0
        np.testing.assert_array_equal(found[there], table[row[there]])
        assert np.all(found[~there] == 0)


@pytest.mark.parametrize("combiner", ["mean", "sum"])
@pytest.mark.parametrize("bag", [1, 3])
def test_bags_against_numpy(combiner, bag):
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(10, 4)).astype(np.float32)
    places = rng.integers(0, 10, size=(5, 2, bag))
    present = rng.random(size=places.shape) < 0.6
    present[0, 0] = False
    ours = np.asarray(lookup.combine(jnp.asarray(rows), places, present, combiner))
    for b in range(5):
        for position in range(2):
            chosen = rows[places[b, position][present[b, position]]]
            expected = chosen.sum(axis=0)
            if combiner == "mean":
                expected = expected / max(len(chosen), 1)
            np.testing.assert_allclose(ours[b, position], expected, rtol=1e-5, atol=1e-6)


def test_scatter_leaves_rows_outside_alone():
    table = jnp.zeros((4, 2))
    rows = jnp.asarray([1, 3, 6, 7])
    put = lookup.write_rows(table, rows, 2 * jnp.ones((4, 2)))
    np.testing.assert_array_equal(put[:, 1], [0, 2, 0, 2])
