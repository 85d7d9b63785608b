import dataclasses
import itertools
import json
import os
from collections import Counter

import grain
import numpy as np
import of_config
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from logs import write_log

from s2s_jax.config import Config, FeatureConfig, IOConfig, ModelConfig
from s2s_jax.data.batching import order, stripes
from s2s_jax.data.batching.dataset import HostSlice
from s2s_jax.data.batching.reader import Reader
from s2s_jax.data.logs import orc
from s2s_jax.errors import UserError

SEQ_LEN = 4
ROWS = 47
TYPES = {
    "item_id": pa.list_(pa.list_(pa.int64())),
    "tags": pa.list_(pa.list_(pa.int64())),
}


def make_row(number: int) -> dict:
    """A row that can be identified by its first item; its length is 1 to 4."""
    length = 1 + number % SEQ_LEN
    return {
        "item_id": [[1 + number * 10 + p] for p in range(length)],
        "tags": [[number] * (p % 3) for p in range(length)],
    }


def expected_row(number: int) -> tuple[int, list[int], list[list[int]]]:
    row = make_row(number)
    padding = SEQ_LEN - len(row["item_id"])
    items = [bag[0] for bag in row["item_id"]] + [-1] * padding
    tags = [bag + [-1] * (2 - len(bag)) for bag in row["tags"]] + [[-1, -1]] * padding
    return len(row["item_id"]), items, tags


@pytest.fixture(autouse=True, scope="module")
def _shards_of_few_stripes():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(order, "STRIPES_PER_SHARD", 4)
        yield


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    """Three files with stripes of 6 rows; the second file has a single row, another one has none."""
    directory = tmp_path_factory.mktemp("log")
    rows = [make_row(n) for n in range(ROWS)]
    write_log(directory / "a.orc", rows[:20], TYPES, stripe_rows=6)
    write_log(directory / "b.orc", rows[20:21], TYPES)
    write_log(directory / "c.orc", [], TYPES)
    write_log(directory / "d.orc", rows[21:], TYPES, stripe_rows=6)
    return directory


def make_config(data_paths, **io) -> Config:
    settings = {"shuffle_rows": 8, "thread_num": 0, "prefetch": 0, "seed": 5} | io
    return Config(
        io=IOConfig(data_paths=str(data_paths), **settings),
        features=(
            FeatureConfig(name="item_id", hash_bucket_size=100_000),
            FeatureConfig(name="tags", hash_bucket_size=1000, bag_size=2),
        ),
        model=ModelConfig(seq_len=SEQ_LEN),
    )


def take(reader: Reader, count: int) -> list[dict[str, np.ndarray]]:
    return [batch.arrays for batch in itertools.islice(reader, count)]


def row_numbers(batch: dict[str, np.ndarray]) -> list[int]:
    """The rows of a batch in order; checks that each is complete and that padding comes last."""
    numbers = []
    for length, items, tags in zip(
        batch["length"].tolist(),
        batch["ids"][..., 0].tolist(),
        batch["ids"][..., 1:].tolist(),
        strict=True,
    ):
        if length == 0:
            assert set(items) == {-1}
            assert set(itertools.chain.from_iterable(tags)) == {-1}
            numbers.append(-1)
        else:
            numbers.append(items[0] // 10)
            assert (length, items, tags) == expected_row(numbers[-1])
    real = [n for n in numbers if n >= 0]
    assert numbers == real + [-1] * (len(numbers) - len(real))
    return real


def assert_equal(batches, others) -> None:
    assert len(batches) == len(others)
    for batch, other in zip(batches, others, strict=True):
        assert batch.keys() == other.keys()
        for key in batch:
            np.testing.assert_array_equal(batch[key], other[key], err_msg=key)


# Batches smaller and larger than shuffle blocks of 8, aligned with them or not; one of exactly all rows,
# and one of more.
@pytest.mark.parametrize("batch_rows", [1, 3, 8, 16, 20, ROWS, 60])
@pytest.mark.parametrize("shuffle", [True, False])
def test_every_row_once_an_epoch_and_padding_after_the_last(log, batch_rows, shuffle):
    reader = of_config.reader(make_config(log, shuffle=shuffle), batch_rows)
    assert reader.rows_per_epoch == ROWS
    assert reader.steps_per_epoch == -(-ROWS // batch_rows)
    orders = []
    for _ in range(3):
        batches = take(reader, reader.steps_per_epoch)
        assert {batch["length"].shape for batch in batches} == {(batch_rows,)}
        found = [row_numbers(batch) for batch in batches]
        sizes = [len(rows) for rows in found]
        assert sizes[:-1] == [batch_rows] * (len(sizes) - 1)
        orders.append(list(itertools.chain.from_iterable(found)))
        assert sorted(orders[-1]) == list(range(ROWS))
    if shuffle:
        assert len({tuple(order) for order in orders}) == 3
        assert list(range(ROWS)) not in orders
    else:
        assert orders == [list(range(ROWS))] * 3


@pytest.mark.parametrize("batch_rows", [3, 8, 20, ROWS])
def test_without_the_remainder_no_batch_is_partial(log, batch_rows):
    reader = of_config.reader(make_config(log, drop_remainder=True), batch_rows)
    assert reader.steps_per_epoch == ROWS // batch_rows
    missed = Counter()
    for _ in range(6):
        found = [row_numbers(batch) for batch in take(reader, reader.steps_per_epoch)]
        assert {len(rows) for rows in found} == {batch_rows}
        rows = list(itertools.chain.from_iterable(found))
        assert len(set(rows)) == len(rows) == ROWS // batch_rows * batch_rows
        missed.update(set(range(ROWS)) - set(rows))
    # Different epochs leave out different rows.
    assert not missed or max(missed.values()) < 6


def test_a_log_smaller_than_a_batch_whose_remainder_is_dropped(log):
    with pytest.raises(UserError, match=r"io\.drop_remainder: .*48 rows.*47"):
        of_config.reader(make_config(log, drop_remainder=True), ROWS + 1)


def test_seeds_differ_and_repeat(log):
    orders = []
    for seed in (1, 2, 1):
        reader = of_config.reader(make_config(log, seed=seed), 8)
        orders.append([row_numbers(batch) for batch in take(reader, 6)])
    assert orders[0] == orders[2] != orders[1]


@pytest.mark.parametrize(
    ("thread_num", "prefetch"), [(0, 3), (1, 0), (1, 1), (1, 4), (4, 1), (4, 4), (4, 16)]
)
def test_threads_and_prefetch_change_nothing(log, thread_num, prefetch):
    plain = take(of_config.reader(make_config(log), 5), 25)
    threaded = of_config.reader(make_config(log, thread_num=thread_num, prefetch=prefetch), 5)
    assert_equal(take(threaded, 25), plain)


def test_batches_can_be_asked_for_in_any_order(log):
    config = make_config(log)
    dataset = of_config.dataset(config, 5, of_config.index(config))
    plain = take(of_config.reader(config, 5), 25)
    order = np.random.default_rng(0).permutation(25).tolist()
    assert_equal([dataset[i].arrays for i in order], [plain[i] for i in order])


def test_every_stage_continues_from_a_checkpoint_as_grain_tests_it(log):
    for threads in (0, 2):
        config = make_config(log, thread_num=threads, drop_remainder=True)
        dataset = of_config.dataset(config, 5, of_config.index(config))
        options = grain.ReadOptions(num_threads=int(threads > 0), prefetch_buffer_size=2 * threads)
        stage = dataset.slice(slice(0, 12)).to_iter_dataset(options).map(lambda b: b.arrays)
        grain.experimental.assert_equal_output_after_checkpoint(stage)
        ahead = grain.experimental.ThreadPrefetchIterDataset(stage, prefetch_buffer_size=2)
        grain.experimental.assert_equal_output_after_checkpoint(ahead)


# ----------------------------------------------------------------------------------------- resume


@pytest.mark.parametrize(("thread_num", "prefetch"), [(0, 0), (1, 1), (4, 8)])
@pytest.mark.parametrize("drop_remainder", [False, True])
def test_a_restored_reader_continues_where_the_state_was_saved(
    log, thread_num, prefetch, drop_remainder
):
    config = make_config(log, drop_remainder=drop_remainder)
    plain = take(of_config.reader(config, 10), 24)
    threads = {"thread_num": thread_num, "prefetch": prefetch}
    config = make_config(log, drop_remainder=drop_remainder, **threads)
    saving = of_config.reader(config, 10)
    # Epochs have 5 or 4 batches; states from three epochs, including the start and the boundaries.
    for step in range(16):
        state = json.loads(json.dumps(saving.get_state()))
        restored = of_config.reader(config, 10)
        restored.set_state(state)
        assert_equal(take(restored, 8), plain[step : step + 8])
        assert_equal(take(saving, 1), [plain[step]])


def test_a_reader_can_go_back_and_forth(log):
    config = make_config(log, thread_num=2, prefetch=4)
    plain = take(of_config.reader(make_config(log), 10), 20)
    reader = of_config.reader(config, 10)
    early = reader.get_state()
    take(reader, 12)
    late = reader.get_state()
    take(reader, 3)
    for state, step in ((early, 0), (late, 12), (early, 0)):
        reader.set_state(state)
        assert reader.get_state() == state
        assert_equal(take(reader, 4), plain[step : step + 4])


@given(st.integers(1, 60), st.integers(1, 60), st.integers(0, 40), st.integers(0, 2**31))
@settings(max_examples=25)
def test_any_sizes_and_any_step(log, batch_rows, shuffle_rows, step, seed):
    config = make_config(log, shuffle_rows=shuffle_rows, seed=seed)
    reader = of_config.reader(config, batch_rows)
    before = take(reader, step)
    state = reader.get_state()
    after = take(reader, reader.steps_per_epoch)
    epochs = [row_numbers(batch) for batch in before + after]
    per_epoch = reader.steps_per_epoch
    for begin in range(0, len(epochs) - per_epoch + 1, per_epoch):
        rows = itertools.chain.from_iterable(epochs[begin : begin + per_epoch])
        assert sorted(rows) == list(range(ROWS))
    restored = of_config.reader(config, batch_rows)
    restored.set_state(state)
    assert_equal(take(restored, per_epoch), after)


def test_threads_may_change_at_a_restart(log):
    saving = of_config.reader(make_config(log, thread_num=4, prefetch=8), 10)
    take(saving, 7)
    restored = of_config.reader(make_config(log), 10)
    restored.set_state(saving.get_state())
    assert_equal(take(restored, 3), take(saving, 3))


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"shuffle": False}, "io.shuffle"),
        ({"shuffle_rows": 9}, "io.shuffle_rows"),
        ({"seed": 6}, "io.seed"),
        ({"shards": 3}, "io.shards"),
    ],
)
def test_changed_settings_are_refused_by_name(log, changes, name):
    state = of_config.reader(make_config(log), 10).get_state()
    with pytest.raises(UserError) as caught:
        of_config.reader(make_config(log, **changes), 10).set_state(state)
    assert str(caught.value).startswith(f"{name}: ")
    assert "\n" not in str(caught.value)


def test_changed_files_are_refused(tmp_path):
    rows = [make_row(n) for n in range(20)]

    def write(directory, *parts):
        for name, begin, end in parts:
            write_log(tmp_path / directory / name, rows[begin:end], TYPES, stripe_rows=5)
        return make_config(tmp_path / directory)

    state = of_config.reader(write("saved", ("a.orc", 0, 10), ("b.orc", 10, 20)), 4).get_state()
    # The files may have been moved.
    of_config.reader(write("moved", ("a.orc", 0, 10), ("b.orc", 10, 20)), 4).set_state(state)
    changed = [
        (write("fewer", ("a.orc", 0, 10)), "b.orc is missing"),
        (write("renamed", ("a.orc", 0, 10), ("x.orc", 10, 20)), "b.orc is missing"),
        (write("longer", ("a.orc", 0, 10), ("b.orc", 5, 20)), "b.orc has changed"),
        (write("others", ("a.orc", 1, 11), ("b.orc", 10, 20)), "a.orc has changed"),
        (
            write("more", ("a.orc", 0, 10), ("b.orc", 10, 20), ("c.orc", 0, 5)),
            "1 files .* were added",
        ),
    ]
    write_log(tmp_path / "stripes" / "a.orc", rows[:10], TYPES, stripe_rows=2)
    changed.append((write("stripes", ("b.orc", 10, 20)), "a.orc has changed"))
    for config, what in changed:
        with pytest.raises(UserError, match=rf"^io\.data_paths: .*{what}"):
            of_config.reader(config, 4).set_state(state)


def test_files_listed_in_another_order_are_read_in_the_saved_one(tmp_path):
    for name, begin in (("a", 0), ("b", 10)):
        rows = [make_row(n) for n in range(begin, begin + 10)]
        write_log(tmp_path / f"{name}.orc", rows, TYPES, stripe_rows=5)
    saving = of_config.reader(make_config(tmp_path), 4)
    take(saving, 2)
    swapped = of_config.reader(make_config(f"{tmp_path / 'b.orc'},{tmp_path / 'a.orc'}"), 4)
    swapped.set_state(saving.get_state())
    assert_equal(take(swapped, 12), take(saving, 12))


def test_new_files_take_part_from_the_next_epoch_on(tmp_path):
    """This is optional and reported; the current epoch ends with the files it began with."""
    for name, begin in (("b", 0), ("c", 10)):
        rows = [make_row(n) for n in range(begin, begin + 10)]
        write_log(tmp_path / f"{name}.orc", rows, TYPES, stripe_rows=5)
    saving = of_config.reader(make_config(tmp_path), 4)
    take(saving, 7)
    state = json.loads(json.dumps(saving.get_state()))
    rest = take(saving, 3)
    # The new file comes first in the directory.
    rows = [make_row(n) for n in range(20, 27)]
    write_log(tmp_path / "a.orc", rows, TYPES, stripe_rows=5)
    reader = of_config.reader(make_config(tmp_path, new_files="next_epoch"), 4)
    reader.set_state(state)
    assert len(reader.notes) == 1
    assert "a.orc" in reader.notes[0]
    assert "epoch 2" in reader.notes[0]
    assert reader.steps_until(3) == 3 + 7
    assert_equal(take(reader, 1), rest[:1])
    # Saved and restored again in the epoch without the new file.
    again = of_config.reader(make_config(tmp_path, new_files="next_epoch"), 4)
    again.set_state(reader.get_state())
    assert_equal(take(again, 2), rest[1:])
    epoch = [row_numbers(batch) for batch in take(again, 7)]
    assert sorted(itertools.chain.from_iterable(epoch)) == list(range(27))
    # From now on, the new file is like any other.
    settled = of_config.reader(make_config(tmp_path), 4)
    settled.set_state(again.get_state())
    assert settled.notes == []
    assert_equal(take(settled, 9), take(again, 9))


def test_new_files_take_part_in_an_epoch_that_has_not_begun(tmp_path):
    """A run of one epoch is continued with the files of the next day."""
    write_log(tmp_path / "a.orc", [make_row(n) for n in range(10)], TYPES, stripe_rows=5)
    saving = of_config.reader(make_config(tmp_path), 5)
    take(saving, 2)
    state = json.loads(json.dumps(saving.get_state()))
    write_log(tmp_path / "b.orc", [make_row(n) for n in range(10, 25)], TYPES, stripe_rows=5)
    reader = of_config.reader(make_config(tmp_path, new_files="next_epoch"), 5)
    reader.set_state(state)
    assert "epoch 1 " in reader.notes[0]
    assert reader.steps_until(2) == 5
    epoch = [row_numbers(batch) for batch in take(reader, 5)]
    assert sorted(itertools.chain.from_iterable(epoch)) == list(range(25))


# ------------------------------------------------------------------- hosts, shards, batch sizes


@pytest.fixture(scope="module")
def long_log(tmp_path_factory):
    """65 stripes in 5 files, enough for 16 shards."""
    directory = tmp_path_factory.mktemp("long")
    for file in range(5):
        rows = [make_row(n) for n in range(file * 39, file * 39 + 39)]
        write_log(directory / f"{file}.orc", rows, TYPES, stripe_rows=3)
    return directory


LONG_ROWS = 5 * 39


@given(st.sampled_from([1, 4, 8, 16]), st.data())
@settings(max_examples=4)
def test_hosts_and_batch_sizes_come_and_go_and_each_row_is_seen_once_an_epoch(
    long_log, shards, data
):
    """Stops and resumes at random points, with other numbers of hosts and other batch sizes."""
    config = make_config(long_log, shards=shards, shuffle_rows=16)
    reference = of_config.reader(config, 1)
    expected = [row_numbers(batch)[0] for batch in take(reference, 3 * LONG_ROWS)]
    state, seen = of_config.reader(config, 8).get_state(), []
    while len(seen) < 2 * LONG_ROWS:
        hosts = data.draw(st.sampled_from([1, 2, 4, 8]))
        batch_rows = hosts * data.draw(st.integers(1, 5))
        readers = [
            of_config.reader(config, batch_rows, HostSlice(host, hosts)) for host in range(hosts)
        ]
        for reader in readers:
            reader.set_state(state)
        for _ in range(data.draw(st.integers(1, 12))):
            if len(seen) >= 2 * LONG_ROWS:
                break
            rows = [row_numbers(take(reader, 1)[0]) for reader in readers]
            merged = list(itertools.chain.from_iterable(rows))
            begin = len(seen)
            assert sorted(merged) == sorted(expected[begin : begin + len(merged)])
            seen += merged
        states = [json.dumps(reader.get_state()) for reader in readers]
        assert len(set(states)) == 1
        state = json.loads(states[0])
    assert sorted(seen[:LONG_ROWS]) == sorted(seen[LONG_ROWS : 2 * LONG_ROWS])
    assert sorted(seen[:LONG_ROWS]) == list(range(LONG_ROWS))


@pytest.mark.parametrize("hosts", [1, 2, 4, 8])
@pytest.mark.parametrize("layout", ["dense", "flat"])
def test_the_global_batch_is_the_same_on_any_number_of_hosts(long_log, hosts, layout):
    config = make_config(long_log, layout=layout, batch_size=2)
    whole = of_config.reader(config, 16)
    readers = [of_config.reader(config, 16, HostSlice(host, hosts)) for host in range(hosts)]
    for _ in range(2 * whole.steps_per_epoch):
        expected = take(whole, 1)[0]
        parts = [take(reader, 1)[0] for reader in readers]
        for key, array in expected.items():
            np.testing.assert_array_equal(np.concatenate([p[key] for p in parts]), array)


def test_hosts_read_only_their_shards(long_log, monkeypatch):
    """With 8 shards, each of 4 hosts decodes its two shards and, at borders, a stripe of a neighbour."""
    config = make_config(long_log, shards=8)
    read = []
    monkeypatch.setattr(orc, "read_stripe", lambda *a: read.append(a[:2]) or READ_STRIPE(*a))
    for host in range(4):
        read.clear()
        reader = of_config.reader(config, 8, HostSlice(host, 4))
        take(reader, LONG_ROWS // 8)
        assert 16 <= len(read) <= 20


READ_STRIPE = orc.read_stripe


def test_badly_sized_stripes_are_reported_with_the_command_that_fixes_them(long_log, monkeypatch):
    """Positions are taken from the statistics of the footers."""
    positions = sum(1 + n % SEQ_LEN for n in range(LONG_ROWS))
    assert sum(f.positions for f in of_config.index(make_config(long_log)).files) == positions
    assert of_config.reader(make_config(long_log), 4).notes == []
    monkeypatch.setattr(stripes, "_ERRATIC_POSITIONS", 5)
    (note,) = of_config.reader(make_config(long_log), 4).notes
    assert "huge stripes: " in note
    assert note.endswith(f"s2s convert {long_log} --format orc --output DIR")


def test_the_memory_that_is_stated_bounds_what_is_held(long_log):
    config = make_config(long_log, shards=4, shuffle_rows=16, thread_num=0)
    reader = of_config.reader(config, 4)
    take(reader, 3 * reader.steps_per_epoch)
    held_blocks = reader._dataset._blocks._blocks.values()
    held = sum(block.result().block.values_PC.nbytes for block in held_blocks)
    assert 0 < held <= reader.held_bytes


# ------------------------------------------------------------------------------------ the cache


def test_the_cache_gives_the_same_batches_without_the_files(log, tmp_path, monkeypatch):
    plain = take(of_config.reader(make_config(log), 5), 22)
    config = make_config(log, cache=str(tmp_path / "cache"), thread_num=2)
    assert_equal(take(of_config.reader(config, 5), 22), plain)

    def refuse(*_):
        raise AssertionError("read although it is cached")

    monkeypatch.setattr(orc, "read_stripe", refuse)
    assert_equal(take(of_config.reader(config, 5), 22), plain)


def test_a_cache_made_for_other_settings_or_files_is_not_used(tmp_path):
    rows = [make_row(n) for n in range(20)]
    path = write_log(tmp_path / "log" / "a.orc", rows, TYPES)
    cache = str(tmp_path / "cache")
    for changes in ({}, {"truncate_side": "right"}):
        config = make_config(path.parent, cache=cache, **changes)
        for seq_len in (SEQ_LEN, 2):
            config = dataclasses.replace(config, model=ModelConfig(seq_len=seq_len))
            uncached = dataclasses.replace(config, io=dataclasses.replace(config.io, cache=None))
            for _ in range(2):
                assert_equal(
                    take(of_config.reader(config, 5), 4), take(of_config.reader(uncached, 5), 4)
                )
    assert len(list((tmp_path / "cache").iterdir())) == 4
    # The same name, table size and number of rows, but other contents.
    write_log(path, [make_row(n) for n in range(20, 40)], TYPES)
    config = make_config(path.parent, cache=cache)
    assert_equal(
        take(of_config.reader(config, 5), 4), take(of_config.reader(make_config(path.parent), 5), 4)
    )


def orders(rows, directory, cache=None):
    """A log of one uncompressed file; logs of different `rows` only differ in the order of events."""
    path = write_log(directory / "a.orc", rows, {"item_id": TYPES["item_id"]})
    features = (FeatureConfig(name="item_id", hash_bucket_size=99),)
    io = IOConfig(data_paths=str(path), cache=cache, thread_num=0, shuffle=False)
    return Config(io=io, features=features, model=ModelConfig(seq_len=8))


def events(config):
    return next(of_config.reader(config, 40)).arrays["ids"][..., 0].tolist()


def shuffled_events(seed):
    rng = np.random.default_rng(seed)
    return [[[int(item)] for item in rng.permutation(50)[:8]] for _ in range(40)]


def test_a_file_with_other_orders_of_events_is_another_one(tmp_path):
    """Footers have sums, minima and maxima, which do not depend on the order of events."""
    rows = [{"item_id": row} for row in shuffled_events(0)]
    back = [{"item_id": row["item_id"][::-1]} for row in rows]
    cache = str(tmp_path / "cache")
    first, second = (
        orders(each, tmp_path / name, cache) for each, name in ((rows, "a"), (back, "b"))
    )
    indices = [of_config.index(config) for config in (first, second)]
    assert len({index.files[0].fingerprint for index in indices}) == 1, "or this tests nothing"
    for _ in range(2):
        for config, of in ((first, rows), (second, back)):
            assert events(config) == [[i for (i,) in row["item_id"]] for row in of]
    # Rewritten in place, with the same time of modification.
    times = os.stat(first.io.data_paths)
    orders(back, tmp_path / "a", cache)
    os.utime(first.io.data_paths, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert events(first) == events(second)
    # A run continues, since the file may have been damaged and repaired, but it warns.
    state = of_config.reader(orders(rows, tmp_path / "a"), 4).get_state()
    reader = of_config.reader(orders(back, tmp_path / "a"), 4)
    reader.set_state(state)
    (note,) = [note for note in reader.notes if "other bytes" in note]
    assert "a.orc" in note


def test_a_copy_of_a_log_is_the_same_log(tmp_path):
    config = orders([{"item_id": row} for row in shuffled_events(0)], tmp_path / "a")
    state = of_config.reader(config, 4).get_state()
    path = write_log(
        tmp_path / "b" / "a.orc",
        [{"item_id": r} for r in shuffled_events(0)],
        {"item_id": TYPES["item_id"]},
    )
    os.utime(path, ns=(0, 1))
    moved = dataclasses.replace(config, io=dataclasses.replace(config.io, data_paths=str(path)))
    of_config.reader(moved, 4).set_state(state)
    # Older checkpoints only have names and footers.
    state["files"] = [each[:2] for each in state["files"]]
    reader = of_config.reader(moved, 4)
    reader.set_state(state)
    assert reader.notes == []


@pytest.mark.parametrize(
    ("hashed", "kinds"),
    [
        ("murmur", (pa.int64(), pa.string())),
        ("farm", (pa.string(), pa.int32())),
        (None, (pa.int64(), pa.timestamp("ns"))),
    ],
)
def test_an_id_is_not_read_as_text_here_and_as_a_number_there(tmp_path, hashed, kinds):
    """Otherwise the same id would have two table rows."""
    for name, kind in zip("ab", kinds, strict=True):
        value = "12" if kind == pa.string() else 12
        write_log(tmp_path / f"{name}.orc", [{"x": [[value]]}], {"x": pa.list_(pa.list_(kind))})
    feature = FeatureConfig(name="item_id", column="x", hash_type=hashed, hash_bucket_size=9)
    config = Config(io=IOConfig(data_paths=str(tmp_path)), features=(feature,))
    with pytest.raises(UserError, match=r"b\.orc: column x holds .*, expected .* as in .*a\.orc"):
        of_config.index(config)
    alone = dataclasses.replace(config, io=IOConfig(data_paths=str(tmp_path / "a.orc")))
    other = dataclasses.replace(config, io=IOConfig(data_paths=str(tmp_path / "b.orc")))
    saved = of_config.reader(alone, 1).get_state()["kinds"]
    of_config.check_kinds(of_config.index(alone).files, saved, config)
    with pytest.raises(UserError, match=r"b\.orc: column x holds .* as trained"):
        of_config.check_kinds(of_config.index(other).files, saved, config)


def test_kinds_of_ids_are_not_widths_nor_units(tmp_path):
    for number, kind in enumerate((pa.int8(), pa.int64())):
        write_log(tmp_path / "w" / f"{number}.orc", [{"x": [12]}], {"x": pa.list_(kind)})
    item = FeatureConfig(name="item_id", column="x", hash_type="farm", hash_bucket_size=9)
    of_config.index(Config(io=IOConfig(data_paths=str(tmp_path / "w")), features=(item,)))
    for number, kind in enumerate((pa.string(), pa.int64())):
        value = "12" if kind == pa.string() else 12
        write_log(tmp_path / "t" / f"{number}.orc", [{"x": [value]}], {"x": pa.list_(kind)})
    hour = FeatureConfig(name="hour", column="x", op="hour_of_day", hash_bucket_size=24)
    of_config.index(Config(io=IOConfig(data_paths=str(tmp_path / "t")), features=(hour,)))


def test_large_files_are_distinguished_by_bytes_from_all_over(tmp_path, monkeypatch):
    monkeypatch.setattr(orc, "_SAMPLE_BYTES", 256)
    rows = [{"item_id": row} for row in shuffled_events(0)]
    plain = of_config.index(orders(rows, tmp_path / "a")).files[0]
    assert plain.size > 256
    again = of_config.index(orders(rows, tmp_path / "a")).files[0]
    back = [{"item_id": row["item_id"][::-1]} for row in rows]
    other = of_config.index(orders(back, tmp_path / "a")).files[0]
    assert plain.sample == again.sample != other.sample


def test_a_damaged_cache_is_made_anew(log, tmp_path):
    config = make_config(log, cache=str(tmp_path))
    plain = take(of_config.reader(config, 5), 10)
    files = sorted(tmp_path.rglob("*.arrow"))
    assert len(files) == 10
    sound = [file.read_bytes() for file in files]
    files[0].write_bytes(b"")
    files[1].write_bytes(sound[1][: len(sound[1]) // 2])
    files[2].write_bytes(sound[3])
    files[4].unlink()
    assert_equal(take(of_config.reader(config, 5), 10), plain)
    assert [file.read_bytes() for file in files] == sound


def test_a_cache_that_cannot_be_written(log, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"^io\.cache: .* cannot be written"):
        of_config.reader(make_config(log, cache=str(tmp_path / "file")), 5)


# ---------------------------------------------------------------------------------- broken logs


def test_logs_that_cannot_be_read_are_refused_at_once(tmp_path, log):
    write_log(tmp_path / "empty.orc", [], TYPES)
    with pytest.raises(UserError, match="has no rows"):
        of_config.reader(make_config(tmp_path / "empty.orc"), 4)
    (tmp_path / "broken.orc").write_bytes(b"ORC")
    with pytest.raises(UserError, match=r"broken\.orc"):
        of_config.reader(make_config(f"{log},{tmp_path / 'broken.orc'}"), 4)
    write_log(tmp_path / "other.orc", [{"item_id": [[1]]}])
    with pytest.raises(UserError, match=r"other\.orc: no column tags"):
        of_config.reader(make_config(f"{log},{tmp_path / 'other.orc'}"), 4)


THREADS = pytest.mark.parametrize(("thread_num", "prefetch"), [(0, 0), (1, 1), (4, 8)])


def read_until_refused(reader: Reader) -> tuple[list[int], str]:
    rows: list[int] = []
    with pytest.raises(UserError) as caught:  # noqa: PT012
        for _ in range(100):
            rows += row_numbers(next(reader).arrays)
    assert "\n" not in str(caught.value)
    return rows, str(caught.value)


@THREADS
def test_a_damaged_stripe_in_the_middle(tmp_path, thread_num, prefetch):
    rows = [make_row(n) for n in range(300)]
    write_log(tmp_path / "a.orc", rows[:100], TYPES)
    path = write_log(tmp_path / "b.orc", rows[100:], TYPES, compression="zstd")
    config = make_config(tmp_path, shuffle=False, thread_num=thread_num, prefetch=prefetch)
    reader = of_config.reader(config, 10)
    content = bytearray(path.read_bytes())
    content[3 : len(content) // 2] = b"\xff" * (len(content) // 2 - 3)
    path.write_bytes(content)
    rows, message = read_until_refused(reader)
    # The first shuffle block is the first stripe.
    assert rows == list(range(100))
    assert message.startswith(f"{path}: stripe 0 cannot be read")


@THREADS
def test_bad_rows_in_the_middle_are_named(tmp_path, thread_num, prefetch):
    rows = [make_row(n) for n in range(50)]
    rows[33] = {"item_id": [[1], [2]], "tags": [[1]]}
    path = write_log(tmp_path / "a.orc", rows, TYPES, stripe_rows=7)
    config = make_config(tmp_path, shuffle=False, thread_num=thread_num, prefetch=prefetch)
    found, message = read_until_refused(of_config.reader(config, 4))
    # Windows are two stripes of 7 rows; the third has the bad row.
    assert found == list(range(28))
    assert message.startswith(f"{path}: row 33: features disagree in length")


@THREADS
def test_a_file_that_vanishes(tmp_path, thread_num, prefetch):
    rows = [make_row(n) for n in range(200)]
    write_log(tmp_path / "a.orc", rows[:100], TYPES)
    path = write_log(tmp_path / "b.orc", rows[100:], TYPES)
    config = make_config(tmp_path, shuffle=False, thread_num=thread_num, prefetch=prefetch)
    reader = of_config.reader(config, 10)
    path.unlink()
    found, message = read_until_refused(reader)
    assert found == list(range(100))
    assert message.startswith(f"{path}: cannot be opened")


@THREADS
def test_a_stripe_that_cannot_be_read_is_skipped_by_choice(tmp_path, thread_num, prefetch):
    """Its rows have no weight and are counted; all others are read; unreadable files are listed."""
    rows = [make_row(n) for n in range(70)]
    rows[33] = {"item_id": [[1], [2]], "tags": [[1]]}
    path = write_log(tmp_path / "a.orc", rows, TYPES, stripe_rows=7)
    (tmp_path / "b.orc").write_bytes(b"ORC" + bytes(100))
    settings = {"on_error": "skip_stripe", "thread_num": thread_num, "prefetch": prefetch}
    reader = of_config.reader(make_config(tmp_path, **settings), 4)
    (unreadable,) = reader.skipped_files
    assert (unreadable.file, unreadable.stripe) == (str(tmp_path / "b.orc"), None)
    for _ in range(2):
        found, lost, skipped = [], 0, set()
        for batch in itertools.islice(reader, reader.steps_per_epoch):
            length = batch.arrays["length"]
            assert np.all(batch.arrays["ids"][length == 0] == -1)
            found += (batch.arrays["ids"][length > 0, 0, 0] // 10).tolist()
            lost += batch.skipped_rows
            skipped |= set(batch.skipped)
            assert bool(batch.skipped) == bool(batch.skipped_rows)
        assert sorted(found) == [*range(28), *range(35, 70)]
        assert lost == 7
        (stripe,) = skipped
        assert (stripe.file, stripe.stripe, stripe.rows) == (str(path), 4, 7)
        assert "row 33: features disagree in length" in stripe.reason


def test_settings_that_do_not_affect_reading_are_not_in_the_state(log):
    config = make_config(log)
    state = of_config.reader(config, 10).get_state()
    other = dataclasses.replace(
        config, model=dataclasses.replace(config.model, seq_len=SEQ_LEN + 3)
    )
    of_config.reader(other, 10).set_state(state)
