"""Growing tables, compared with a dict: no id is lost or shares a row, on any number of devices."""

import functools
import statistics
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from jax.sharding import PartitionSpec

from s2s_jax.cluster.mesh import DATA_AXIS, make_mesh, row_sharded
from s2s_jax.config import FeatureConfig, TableConfig
from s2s_jax.embedding import claiming, id_keys, id_map
from s2s_jax.embedding.sharded import ShardedTables, Stored
from s2s_jax.embedding.tables import NUM_SEGMENTS, SLOTS, usable_capacity
from s2s_jax.training.growth import max_load

WIDTH = 2
FEATURE = FeatureConfig(name="f", emb_dim=WIDTH, hash_bucket_size=0)
GROWING = TableConfig(name="f", capacity=1, init_std=1.0)
EVICTING = TableConfig(name="f", capacity=1, max_capacity=1, init_std=1.0)
ADMITTING = TableConfig(name="f", capacity=1, admit_after=3, init_std=1.0)
SMALLEST = NUM_SEGMENTS * SLOTS


def initial(ids):
    """The initial rows of ids, transcribed to NumPy in float64."""

    def scramble(x):
        x = (x ^ (x >> 16)) * 0x85EBCA6B & 0xFFFFFFFF
        x = (x ^ (x >> 13)) * 0xC2B2AE35 & 0xFFFFFFFF
        return x ^ (x >> 16)

    seed = zlib.crc32(b"0 f")
    ids = np.array(ids, np.uint64)
    low, high = ids & np.uint64(0xFFFFFFFF), ids >> np.uint64(32)
    first, second = id_keys.keys_of(low.astype(np.uint32), high.astype(np.uint32))
    rows = []
    normal = statistics.NormalDist()
    edge = normal.cdf(2) - normal.cdf(-2)
    for a, b in zip(first.tolist(), second.tolist(), strict=True):
        row = []
        for column in range(WIDTH):
            bits = scramble(b ^ scramble((column * 0x9E3779B9 + seed) & 0xFFFFFFFF))
            bits = scramble(a ^ bits)
            uniform = ((bits >> 8) + 0.5) / 2**24
            row.append(normal.inv_cdf(normal.cdf(-2) + uniform * edge))
        rows.append(row)
    return np.array(rows).reshape(-1, WIDTH)


class Table:
    """A growing table on some devices."""

    def __init__(self, settings, devices, capacity=SMALLEST):
        self.settings, self.step = settings, 0
        self._place(devices, capacity)
        values = jnp.zeros((capacity, WIDTH))
        moments = jnp.zeros((capacity, 2 * WIDTH))
        maps = self.tables.empty_maps()
        sharding = row_sharded(self.mesh)
        averages = {"f": jnp.zeros((capacity, WIDTH + 1))}
        stored = Stored({"f": values}, {"f": moments}, maps, averages)
        self.stored = jax.device_put(stored, sharding)

    def _place(self, devices, capacity):
        self.devices, self.capacity = devices, capacity
        self.mesh = make_mesh(jax.devices()[:devices])
        self.tables, self._admit, self._look_up, self._evict = functions(
            self.settings, devices, capacity
        )

    def move(self, devices):
        """Moves the table to other devices, as a checkpoint does."""
        stored = jax.device_get(self.stored)
        self._place(devices, self.capacity)
        self.stored = jax.device_put(stored, row_sharded(self.mesh))

    def grow(self):
        self.stored = doubling(self.devices)(self.stored)
        self._place(self.devices, 2 * self.capacity)

    def batch(self, ids):
        """A batch of ids, with a fixed shape for each number of ids."""
        size = -(-len(ids) // 8) * 8
        words = np.full((size, 2), -1, np.int32)
        words[: len(ids)] = small.to_words(np.asarray(ids, np.uint64).view(np.int64))
        return {"f": words.reshape(1, 8, -1, 1, 2)}

    def admit(self, ids):
        self.step += 1
        self.stored, rows, row = self._admit(self.stored, self.batch(ids), np.int32(self.step))
        return np.asarray(rows)[: len(ids)], np.asarray(row)[: len(ids)]

    def look_up(self, ids):
        rows, row = self._look_up(self.stored, self.batch(ids))
        return np.asarray(rows)[: len(ids)], np.asarray(row)[: len(ids)]

    def evict(self, unseen_for):
        self.stored = self._evict(self.stored, np.int32(self.step), unseen_for)

    def scale(self, factor):
        values_RD = self.stored.values["f"] * factor
        averages_RA = jnp.concatenate([values_RD, jnp.ones_like(values_RD[:, :1])], axis=1)
        self.stored = self.stored._replace(values={"f": values_RD}, averages={"f": averages_RA})

    def check_averages(self):
        """Averages are those of the same id, or empty for an id that is new since the last `scale`."""
        stored = jax.device_get(self.stored)
        there_R = (np.asarray(stored.maps["f"].keys_R2) != id_keys.EMPTY).any(axis=1)
        values_RD, averages_RA = (x["f"][there_R] for x in (stored.values, stored.averages))
        new_R = averages_RA[:, -1] == 0
        assert not averages_RA[new_R].any()
        np.testing.assert_array_equal(averages_RA[~new_R, :-1], values_RD[~new_R])
        return new_R.sum()

    def total(self, name):
        return int(np.asarray(getattr(self.stored.maps["f"], name)).sum())


@functools.cache
def doubling(devices):
    spec, segments = PartitionSpec(DATA_AXIS), NUM_SEGMENTS // devices

    def grown(stored):
        def rows(x):
            return id_map.doubled_rows(x, segments)

        return Stored(
            {"f": rows(stored.values["f"])},
            {"f": rows(stored.moments["f"])},
            {"f": id_map.doubled(stored.maps["f"])},
            {"f": rows(stored.averages["f"])},
        )

    mesh = make_mesh(jax.devices()[:devices])
    return jax.jit(jax.shard_map(grown, mesh=mesh, in_specs=spec, out_specs=spec))


@functools.cache
def functions(settings, devices, capacity):
    mesh = make_mesh(jax.devices()[:devices])
    tables = ShardedTables((FEATURE,), (settings,), mesh, {"f": capacity})
    spec = PartitionSpec(DATA_AXIS)

    def answers(found, ids):
        """The embedding of each id, and its row in the table; -1 if it has none."""

        def row_of(rows_U, place):
            row = rows_U[place]
            return jnp.where(row < capacity, row, -1)

        places = found.places["f"][0]
        row = jax.shard_map(row_of, mesh=mesh, in_specs=spec, out_specs=spec)(
            found.needed["f"].rows_U, places
        )
        rows = tables.embed(found.rows, {"f": places}, {"f": ids["f"][0]})["f"]
        return rows.reshape(-1, WIDTH), row.reshape(-1)

    def admit(stored, ids, step):
        stored, found = tables.admit(stored, ids, step)
        return stored, *answers(found, ids)

    def look_up(stored, ids):
        return answers(tables.look_up(stored.values, stored.maps, ids), ids)

    def evict(stored, step, unseen_for):
        def on_device(of_table, step):
            return id_map.evicted(of_table, step, unseen_for, 0)

        mapped = jax.shard_map(
            on_device, mesh=mesh, in_specs=(spec, PartitionSpec()), out_specs=spec
        )
        return stored._replace(maps={"f": mapped(stored.maps["f"], step)})

    return tables, jax.jit(admit), jax.jit(look_up), jax.jit(evict, static_argnums=2)


def test_keys_are_a_permutation_that_keeps_the_empty_key():
    rng = np.random.default_rng(0)
    low, high = rng.integers(0, 2**32, (2, 1000), dtype=np.uint32)
    first, second = id_keys.keys_of(low, high)
    back_low, back_high = id_keys.ids_of(first, second)
    np.testing.assert_array_equal(back_low, low)
    np.testing.assert_array_equal(back_high, high)
    none = np.full(1, 2**32 - 1, np.uint32)
    assert [w.tolist() for w in id_keys.keys_of(none, none)] == [[2**32 - 1]] * 2
    assert jnp.asarray(low).dtype == id_keys.keys_of(jnp.asarray(low), jnp.asarray(high))[0].dtype


def test_initial_rows_are_a_truncated_normal_of_the_id_alone():
    rng = np.random.default_rng(0)
    keys = rng.integers(0, 2**32, (20_000, 2), dtype=np.uint32)
    rows = np.asarray(id_keys.initial_rows(7, 0.02, jnp.asarray(keys), 16))
    assert np.abs(rows).max() <= 0.04
    np.testing.assert_allclose(rows.std(), 0.8796 * 0.02, rtol=0.01)
    np.testing.assert_allclose(rows.mean(axis=0), 0, atol=1e-3)
    correlation = np.corrcoef(rows.T) - np.eye(16)
    assert np.abs(correlation).max() < 0.04
    table = Table(GROWING, 2)
    ids = rng.integers(0, 2**63, 40)
    np.testing.assert_allclose(table.admit(ids)[0], initial(ids), atol=2e-5)


KINDS = {
    "random": lambda n: np.random.default_rng(0).integers(0, 2**64, n, dtype=np.uint64),
    "consecutive": lambda n: np.arange(n, dtype=np.uint64),
    "multiples of 2^32": lambda n: np.arange(n, dtype=np.uint64) << np.uint64(32),
    "same low word": lambda n: (np.arange(n, dtype=np.uint64) << np.uint64(32)) + np.uint64(12345),
    "negative": lambda n: np.uint64(2**64 - 2) - np.arange(n, dtype=np.uint64),
}


def fill(table, ids, batch):
    """Inserts all ids and grows; returns the load before each growth."""
    loads = []
    for begin in range(0, len(ids), batch):
        part = ids[begin : begin + batch]
        _, row = table.admit(part)
        while (row < 0).any():
            loads.append(table.total("rows_S") / table.capacity)
            table.grow()
            _, row = table.admit(part)
        if table.total("rows_S") > 0.85 * table.capacity:
            loads.append(table.total("rows_S") / table.capacity)
            table.grow()
    return loads


def check_all(table, ids, batch):
    rows = np.concatenate([table.look_up(ids[b : b + batch])[1] for b in range(0, len(ids), batch)])
    assert (rows >= 0).all(), "lost"
    assert len(np.unique(rows)) == len(ids), "shared"
    assert table.total("rows_S") == len(ids)


@pytest.mark.parametrize(
    ("kind", "count", "devices"),
    [
        pytest.param("random", 2**18, 1, marks=pytest.mark.slow),
        pytest.param("random", 2**17, 4, marks=pytest.mark.slow),
        ("consecutive", 2**17, 1),
        ("multiples of 2^32", 2**17, 1),
        ("same low word", 2**17, 1),
        pytest.param("negative", 2**17, 2, marks=pytest.mark.slow),
        pytest.param("random", 10_000_000, 1, marks=pytest.mark.slow),
        pytest.param("consecutive", 10_000_000, 1, marks=pytest.mark.slow),
    ],
)
def test_no_id_is_lost_or_shared_while_the_table_grows(kind, count, devices):
    ids = KINDS[kind](count)
    table = Table(GROWING, devices, capacity=2**17)
    loads = fill(table, ids, 2**13)
    assert all(load >= 0.85 for load in loads), loads
    assert table.capacity >= count
    check_all(table, ids, 2**13)
    assert (table.look_up(KINDS[kind](count + 4096)[count:])[1] < 0).all()


def test_rows_do_not_depend_on_the_devices():
    rng = np.random.default_rng(0)
    batches = [rng.integers(0, 2**64, 256, dtype=np.uint64) for _ in range(12)]
    maps = []
    for devices in (1, 2, 8):
        table = Table(GROWING, devices)
        for ids in batches:
            table.admit(ids)
        maps.append(jax.device_get(table.stored))
    for other in maps[1:]:
        jax.tree.map(np.testing.assert_array_equal, other, maps[0])


def test_full_tables_give_the_rows_of_the_oldest_to_new_ids():
    table = Table(EVICTING, 2)
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 2**64, 3 * SMALLEST, dtype=np.uint64)
    for begin in range(0, len(ids), 1024):
        rows, row = table.admit(ids[begin : begin + 1024])
        assert (row >= 0).all(), "the newest always find a place"
        np.testing.assert_allclose(rows, initial(ids[begin : begin + 1024]), atol=2e-5)
    _, row = table.look_up(ids[-1024:])
    assert (row >= 0).all()
    kept = np.array([(table.look_up(part)[1] >= 0).mean() for part in np.split(ids, 12)])
    assert (np.diff(kept) >= 0).all(), "older ids go first"
    assert kept[0] < 0.1
    there = round(kept.sum() * len(ids) / 12)
    assert table.total("rows_S") == there <= SMALLEST
    assert table.total("evicted_S") == len(ids) - there
    assert table.total("dropped_S") == 0


def test_ids_of_a_step_keep_their_rows_in_every_round():
    """Two devices ask one owner in two rounds: first for new ids, then for old ids in their buckets."""
    rng = np.random.default_rng(0)

    def ids_in(segments, count):
        first = rng.choice(segments, count).astype(np.uint32) << np.uint32(24)
        first += rng.integers(0, 2**24, count, dtype=np.uint32)
        low, high = id_keys.ids_of(first, rng.integers(0, 2**32, count, dtype=np.uint32))
        return low.astype(np.uint64) | high.astype(np.uint64) << np.uint64(32)

    table = Table(EVICTING, 4)
    contested = np.arange(32, 42)  # 16 rows each, all owned by the first device.
    old = ids_in(contested, 96)
    table.admit(old)
    table.admit(ids_in(contested, 96))
    table.scale(3.0)
    rows, row = table.look_up(old)
    kept = old[row >= 0]
    assert len(kept) >= 50
    none = np.full(256, 2**64 - 1, np.uint64)
    parts = [none.copy() for _ in range(4)]
    parts[0][:] = ids_in(contested, 256)
    parts[1][:200] = ids_in(np.arange(32), 200)
    parts[1][200:250] = kept[:50]
    rows, _ = table.admit(np.concatenate(parts))
    np.testing.assert_allclose(rows[256 + 200 : 256 + 250], 3 * initial(kept[:50]), atol=6e-5)
    assert table.check_averages() > 100


def test_ids_that_find_no_place_keep_their_initial_value_and_are_counted():
    table = Table(GROWING, 1)
    count = round(1.1 * SMALLEST / 8) * 8
    ids = np.random.default_rng(0).integers(0, 2**64, count, dtype=np.uint64)
    rows, row = table.admit(ids)
    lost = row < 0
    assert lost.sum() == len(ids) - table.total("rows_S") == table.total("dropped_S") > 0
    np.testing.assert_allclose(rows, initial(ids), atol=2e-5)
    table.scale(3.0)
    rows, _ = table.look_up(ids)
    assert np.all(rows[lost] == 0)
    np.testing.assert_allclose(rows[~lost], 3 * initial(ids[~lost]), atol=6e-5)
    table.grow()
    rows, row = table.admit(ids)
    assert (row >= 0).all(), "tried again"
    expected = np.where(lost[:, None], 1, 3) * initial(ids)
    np.testing.assert_allclose(rows, expected, atol=6e-5)
    assert table.check_averages() == lost.sum()


def test_ids_are_admitted_after_so_many_sightings():
    table = Table(ADMITTING, 2)
    ids = np.arange(100, dtype=np.uint64)
    rows, row = table.admit(ids)
    assert (row < 0).all()
    np.testing.assert_allclose(rows, initial(ids), atol=2e-5)
    _, row = table.admit(np.repeat(ids[:50], 2))
    assert (row >= 0).all(), "three sightings in two steps"
    _, row = table.admit(np.append(ids[50:], ids[:50]))
    assert (row[:50] < 0).all()
    table.grow()
    _, row = table.admit(np.append(ids[50:], ids[:50]))
    assert (row >= 0).all()
    assert table.total("dropped_S") == 0


class Machine(RuleBasedStateMachine):
    """Random calls, compared with a dict of the scale of each id's row and when the id was seen."""

    ids = st.lists(st.integers(0, 200).map(lambda i: (i * 0x9E3779B97F4A7C15) % 2**64), max_size=24)

    @initialize(devices=st.sampled_from([1, 2, 4]))
    def begin(self, devices):
        self.table = Table(GROWING, devices)
        self.factor: dict[int, float] = {}
        self.seen: dict[int, int] = {}

    def expect(self, rows, ids):
        expected = np.array([[self.factor.get(i, 0.0)] for i in ids]).reshape(-1, 1) * initial(ids)
        np.testing.assert_allclose(rows, expected, rtol=1e-4, atol=1e-4)

    @rule(ids=ids)
    def insert(self, ids):
        ids = (ids + [2**64 - 1] * 24)[:24]  # The rest are missing ids.
        rows, row = self.table.admit(ids)
        for i in ids:
            if i != 2**64 - 1:
                self.factor.setdefault(i, 1.0)
                self.seen[i] = self.table.step
        assert all((r >= 0) == (i != 2**64 - 1) for r, i in zip(row, ids, strict=True))
        self.expect(rows, ids)

    @rule(ids=ids)
    def find(self, ids):
        ids = (ids + [2**64 - 1] * 24)[:24]
        rows, row = self.table.look_up(ids)
        assert [r >= 0 for r in row] == [i in self.factor for i in ids]
        self.expect(rows, ids)

    @rule(factor=st.sampled_from([0.5, 2.0]))
    def train(self, factor):
        self.table.scale(factor)
        self.factor = {i: f * factor for i, f in self.factor.items()}

    @rule(unseen_for=st.integers(1, 3))
    def evict(self, unseen_for):
        self.table.evict(unseen_for)
        for i, seen in list(self.seen.items()):
            if self.table.step - seen > unseen_for:
                del self.factor[i], self.seen[i]

    @rule()
    def grow(self):
        if self.table.capacity < 4 * SMALLEST:
            self.table.grow()

    @rule(devices=st.sampled_from([1, 2, 4]))
    def save_and_restore(self, devices):
        self.table.move(devices)

    @invariant()
    def counts(self):
        assert self.table.total("rows_S") == len(self.factor)
        self.table.check_averages()


TestMachine = Machine.TestCase
TestMachine.settings = settings(
    max_examples=3,
    stateful_step_count=20,
    suppress_health_check=list(HealthCheck),
)


@pytest.mark.slow
def test_counts_of_dropped_and_evicted_ids_stop_before_they_wrap_around():
    of_table = id_map.empty_map(SMALLEST, 1)
    most = 2**31 - 1
    keys = np.random.default_rng(0).integers(0, 2**32, (2 * SMALLEST, 2), dtype=np.uint32)

    def claim(of_table, part, step, evict):
        unique = id_keys.unique_keys(jnp.asarray(part))
        policy = claiming.Policy(1, evict)
        make = lambda attached, *_: attached  # noqa: E731
        return claiming.find_or_claim(
            of_table, unique, jnp.int32(0), jnp.int32(step), policy, (), make
        ).id_map

    near = jnp.full(NUM_SEGMENTS, most - 1)
    of_table = claim(of_table._replace(dropped_S=near), keys, 1, evict=False)
    assert set(np.asarray(of_table.dropped_S)) == {most}
    robbed = claim(of_table._replace(evicted_S=near), keys[:SMALLEST] + 1, 2, evict=True)
    assert set(np.asarray(robbed.evicted_S)) == {most}
    # A count that has wrapped around before.
    swept = id_map.evicted(of_table._replace(evicted_S=-near), jnp.int32(9), 1, 0)
    assert set(np.asarray(swept.evicted_S)) == {most}


def test_small_tables_grow_before_a_segment_overflows():
    """Simulates the fullest of 256 segments, at the load at which a table grows."""
    rng = np.random.default_rng(0)
    for capacity in (SMALLEST, 2**13, 2**14, 2**16, 2**17):
        ids = round(max_load(capacity) * capacity)
        fullest = [np.bincount(rng.integers(0, 256, ids)).max() for _ in range(50)]
        assert np.mean(np.array(fullest) <= capacity // 256) > 0.9
    assert max_load(2**17) == 0.85


def test_capacities_are_powers_of_two():
    assert [usable_capacity(n) for n in (1, 4096, 4097, 2**17, 10**6)] == [
        4096,
        4096,
        8192,
        2**17,
        2**20,
    ]
