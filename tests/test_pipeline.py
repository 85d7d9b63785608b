import dataclasses
import itertools
import json
from collections import Counter

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from logs import write_log

from s2s_jax.config import Config, FeatureConfig, IOConfig, ModelConfig
from s2s_jax.data.pipeline import BatchDataset, Reader, index_files
from s2s_jax.errors import UserError

SEQ_LEN = 4
ROWS = 47
TYPES = {
    "item_id": pa.list_(pa.list_(pa.int64())),
    "tags": pa.list_(pa.list_(pa.int64())),
}


def make_row(number: int) -> dict:
    """A row that can be told by its first item; its length is 1 to 4."""
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


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    """Three files with stripes of 6 rows; the second has a single row, another has none."""
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
    return list(itertools.islice(reader, count))


def row_numbers(batch: dict[str, np.ndarray]) -> list[int]:
    """The rows of a batch in order, each checked to be whole; padding must come last."""
    numbers = []
    for length, items, tags in zip(
        batch["length"].tolist(),
        batch["ids/item_id"][..., 0].tolist(),
        batch["ids/tags"].tolist(),
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


# Batches smaller and larger than windows of 8, that end with them and that do not; one of all rows,
# one of more.
@pytest.mark.parametrize("batch_rows", [1, 3, 8, 16, 20, ROWS, 60])
@pytest.mark.parametrize("shuffle", [True, False])
def test_every_row_once_an_epoch_and_padding_after_the_last(log, batch_rows, shuffle):
    reader = Reader(make_config(log, shuffle=shuffle), batch_rows)
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
    reader = Reader(make_config(log, drop_remainder=True), batch_rows)
    assert reader.steps_per_epoch == ROWS // batch_rows
    missed = Counter()
    for _ in range(6):
        found = [row_numbers(batch) for batch in take(reader, reader.steps_per_epoch)]
        assert {len(rows) for rows in found} == {batch_rows}
        rows = list(itertools.chain.from_iterable(found))
        assert len(set(rows)) == len(rows) == ROWS // batch_rows * batch_rows
        missed.update(set(range(ROWS)) - set(rows))
    # Other rows are left out in other epochs.
    assert not missed or max(missed.values()) < 6


def test_a_log_smaller_than_a_batch_whose_remainder_is_dropped(log):
    with pytest.raises(UserError, match=r"io\.drop_remainder: .*48 rows.*47"):
        Reader(make_config(log, drop_remainder=True), ROWS + 1)


def test_seeds_differ_and_repeat(log):
    orders = []
    for seed in (1, 2, 1):
        reader = Reader(make_config(log, seed=seed), 8)
        orders.append([row_numbers(batch) for batch in take(reader, 6)])
    assert orders[0] == orders[2] != orders[1]


@pytest.mark.parametrize(
    ("thread_num", "prefetch"), [(0, 3), (1, 0), (1, 1), (1, 4), (4, 1), (4, 4), (4, 16)]
)
def test_threads_and_prefetch_change_nothing(log, thread_num, prefetch):
    plain = take(Reader(make_config(log), 5), 25)
    threaded = Reader(make_config(log, thread_num=thread_num, prefetch=prefetch), 5)
    assert_equal(take(threaded, 25), plain)


def test_batches_can_be_asked_for_in_any_order(log):
    config = make_config(log)
    dataset = BatchDataset(index_files(config), config, 5)
    plain = take(Reader(config, 5), 25)
    order = np.random.default_rng(0).permutation(25).tolist()
    assert_equal([dataset[i] for i in order], [plain[i] for i in order])


# ----------------------------------------------------------------------------------------- resume


@pytest.mark.parametrize(("thread_num", "prefetch"), [(0, 0), (1, 1), (4, 8)])
@pytest.mark.parametrize("drop_remainder", [False, True])
def test_a_restored_reader_goes_on_where_the_state_was_saved(
    log, thread_num, prefetch, drop_remainder
):
    config = make_config(log, drop_remainder=drop_remainder)
    plain = take(Reader(config, 10), 24)
    threads = {"thread_num": thread_num, "prefetch": prefetch}
    config = make_config(log, drop_remainder=drop_remainder, **threads)
    saving = Reader(config, 10)
    # Epochs have 5 or 4 batches; states of three of them, also before the first and at boundaries.
    for step in range(16):
        state = json.loads(json.dumps(saving.get_state()))
        restored = Reader(config, 10)
        restored.set_state(state)
        assert_equal(take(restored, 8), plain[step : step + 8])
        assert_equal([next(saving)], [plain[step]])


def test_a_reader_can_go_back_and_forth(log):
    config = make_config(log, thread_num=2, prefetch=4)
    plain = take(Reader(make_config(log), 10), 20)
    reader = Reader(config, 10)
    early = reader.get_state()
    take(reader, 12)
    late = reader.get_state()
    take(reader, 3)
    for state, step in ((early, 0), (late, 12), (early, 0)):
        reader.set_state(state)
        assert reader.get_state() == state
        assert_equal(take(reader, 4), plain[step : step + 4])


@given(st.integers(1, 60), st.integers(1, 60), st.integers(0, 40), st.integers(0, 2**31))
@settings(deadline=None, max_examples=25)
def test_any_sizes_and_any_step(log, batch_rows, shuffle_rows, step, seed):
    config = make_config(log, shuffle_rows=shuffle_rows, seed=seed)
    reader = Reader(config, batch_rows)
    before = take(reader, step)
    state = reader.get_state()
    after = take(reader, reader.steps_per_epoch)
    epochs = [row_numbers(batch) for batch in before + after]
    per_epoch = reader.steps_per_epoch
    for begin in range(0, len(epochs) - per_epoch + 1, per_epoch):
        rows = itertools.chain.from_iterable(epochs[begin : begin + per_epoch])
        assert sorted(rows) == list(range(ROWS))
    restored = Reader(config, batch_rows)
    restored.set_state(state)
    assert_equal(take(restored, per_epoch), after)


def test_threads_may_change_at_a_restart(log):
    saving = Reader(make_config(log, thread_num=4, prefetch=8), 10)
    take(saving, 7)
    restored = Reader(make_config(log), 10)
    restored.set_state(saving.get_state())
    assert_equal(take(restored, 3), take(saving, 3))


@pytest.mark.parametrize(
    ("changes", "rows", "name"),
    [
        ({"shuffle": False}, 10, "io.shuffle"),
        ({"shuffle_rows": 9}, 10, "io.shuffle_rows"),
        ({"seed": 6}, 10, "io.seed"),
        ({"drop_remainder": True}, 10, "io.drop_remainder"),
        ({}, 11, "rows of a global batch"),
    ],
)
def test_changed_settings_are_refused_by_name(log, changes, rows, name):
    state = Reader(make_config(log), 10).get_state()
    with pytest.raises(UserError) as caught:
        Reader(make_config(log, **changes), rows).set_state(state)
    assert str(caught.value).startswith(f"{name}: ")
    assert "\n" not in str(caught.value)


def test_changed_files_are_refused(tmp_path):
    rows = [make_row(n) for n in range(20)]

    def write(directory, *parts):
        for name, begin, end in parts:
            write_log(tmp_path / directory / name, rows[begin:end], TYPES, stripe_rows=5)
        return make_config(tmp_path / directory)

    state = Reader(write("saved", ("a.orc", 0, 10), ("b.orc", 10, 20)), 4).get_state()
    # The same files may lie elsewhere.
    Reader(write("moved", ("a.orc", 0, 10), ("b.orc", 10, 20)), 4).set_state(state)
    changed = [
        write("fewer", ("a.orc", 0, 10)),
        write("more", ("a.orc", 0, 10), ("b.orc", 10, 20), ("c.orc", 0, 5)),
        write("renamed", ("a.orc", 0, 10), ("x.orc", 10, 20)),
        write("longer", ("a.orc", 0, 10), ("b.orc", 5, 20)),
    ]
    write_log(tmp_path / "stripes" / "a.orc", rows[:10], TYPES, stripe_rows=2)
    changed.append(write("stripes", ("b.orc", 10, 20)))
    swapped = f"{tmp_path / 'saved' / 'b.orc'},{tmp_path / 'saved' / 'a.orc'}"
    changed.append(make_config(swapped))
    for config in changed:
        with pytest.raises(UserError, match=r"^io\.data_paths: .*other files"):
            Reader(config, 4).set_state(state)


# ---------------------------------------------------------------------------------- broken logs


def test_logs_that_cannot_be_read_are_refused_at_once(tmp_path, log):
    write_log(tmp_path / "empty.orc", [], TYPES)
    with pytest.raises(UserError, match="has no rows"):
        Reader(make_config(tmp_path / "empty.orc"), 4)
    (tmp_path / "broken.orc").write_bytes(b"ORC")
    with pytest.raises(UserError, match=r"broken\.orc"):
        Reader(make_config(f"{log},{tmp_path / 'broken.orc'}"), 4)
    write_log(tmp_path / "other.orc", [{"item_id": [[1]]}])
    with pytest.raises(UserError, match=r"other\.orc: no column tags"):
        Reader(make_config(f"{log},{tmp_path / 'other.orc'}"), 4)


THREADS = pytest.mark.parametrize(("thread_num", "prefetch"), [(0, 0), (1, 1), (4, 8)])


def read_until_refused(reader: Reader) -> tuple[list[int], str]:
    rows: list[int] = []
    with pytest.raises(UserError) as caught:  # noqa: PT012
        for _ in range(100):
            rows += row_numbers(next(reader))
    assert "\n" not in str(caught.value)
    return rows, str(caught.value)


@THREADS
def test_a_damaged_stripe_in_the_middle(tmp_path, thread_num, prefetch):
    rows = [make_row(n) for n in range(300)]
    write_log(tmp_path / "a.orc", rows[:100], TYPES)
    path = write_log(tmp_path / "b.orc", rows[100:], TYPES, compression="zstd")
    config = make_config(tmp_path, shuffle=False, thread_num=thread_num, prefetch=prefetch)
    reader = Reader(config, 10)
    content = bytearray(path.read_bytes())
    content[3 : len(content) // 2] = b"\xff" * (len(content) // 2 - 3)
    path.write_bytes(content)
    rows, message = read_until_refused(reader)
    # The last window before the damage ends at row 96; batches of 10 end before that.
    assert rows == list(range(90))
    assert message.startswith(f"{path}: stripe 0 cannot be read")


@THREADS
def test_bad_rows_in_the_middle_are_named(tmp_path, thread_num, prefetch):
    rows = [make_row(n) for n in range(50)]
    rows[33] = {"item_id": [[1], [2]], "tags": [[1]]}
    path = write_log(tmp_path / "a.orc", rows, TYPES, stripe_rows=7)
    config = make_config(tmp_path, shuffle=False, thread_num=thread_num, prefetch=prefetch)
    found, message = read_until_refused(Reader(config, 4))
    assert found == list(range(32))
    assert message.startswith(f"{path}: row 33: features disagree in length")


@THREADS
def test_a_file_that_vanishes(tmp_path, thread_num, prefetch):
    rows = [make_row(n) for n in range(200)]
    write_log(tmp_path / "a.orc", rows[:100], TYPES)
    path = write_log(tmp_path / "b.orc", rows[100:], TYPES)
    config = make_config(tmp_path, shuffle=False, thread_num=thread_num, prefetch=prefetch)
    reader = Reader(config, 10)
    path.unlink()
    found, message = read_until_refused(reader)
    assert found == list(range(90))
    assert message.startswith(f"{path}: cannot be opened")


def test_settings_that_do_not_say_what_is_read_are_no_part_of_the_state(log):
    config = make_config(log)
    state = Reader(config, 10).get_state()
    other = dataclasses.replace(
        config, model=dataclasses.replace(config.model, seq_len=SEQ_LEN + 3)
    )
    Reader(other, 10).set_state(state)
