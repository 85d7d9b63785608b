import dataclasses
import datetime
import math
import struct
from pathlib import Path

import numpy as np
import of_config
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from murmur import reference

from s2s_jax.config import Config, FeatureConfig, IOConfig, ModelConfig
from s2s_jax.data.logs.orc import OrcFile
from s2s_jax.errors import UserError
from s2s_serve.encoding import blocks, features

PATH = Path("logs/part-0.orc")
BUCKETS = 1000


def make_config(columns: tuple[FeatureConfig, ...], seq_len: int, **io) -> Config:
    return Config(features=columns, model=ModelConfig(seq_len=seq_len), io=IOConfig(**io))


def file_of(batch: pa.RecordBatch) -> OrcFile:
    return OrcFile(PATH, 100, batch.schema, (batch.num_rows,), "")


def bucket(value, feature: FeatureConfig) -> int:
    if isinstance(value, str):
        number = reference(value.encode())
    elif feature.hash_type == "murmur":
        number = reference(struct.pack("<Q", value % 2**64))
    else:
        number = value % 2**64
    return number % feature.hash_bucket_size


def slow_batch(rows: list[dict], batch_rows: int, config: Config) -> dict[str, np.ndarray]:
    """The expected results of `decode` and `to_dense`, in plain Python."""
    seq_len = config.model.seq_len
    width = sum(feature.bag_size for feature in config.features)
    batch = {
        "length": np.zeros(batch_rows, np.int32),
        "ids": np.full((batch_rows, seq_len, width), -1, np.int32),
    }
    for n, row in enumerate(rows):
        positions = max(len(row[f.column_name] or []) for f in config.features)
        kept = list(range(positions))
        kept = kept[-seq_len:] if config.io.truncate_side == "left" else kept[:seq_len]
        batch["length"][n] = len(kept)
        first_column = 0
        for feature in config.features:
            bags = row[feature.column_name] or [None] * positions
            for at, position in enumerate(kept):
                shown = position + feature.of_next
                ids = slow_ids(bags, shown, feature) if shown < positions else []
                batch["ids"][n, at, first_column : first_column + len(ids)] = ids
            first_column += feature.bag_size
    return batch


def slow_ids(bags: list, position: int, feature: FeatureConfig) -> list[int]:
    values = entries(bags[position])
    if feature.op == "id":
        return [bucket(value, feature) for value in values]
    if feature.op == "bucketize":
        return [sum(limit <= value for limit in feature.boundaries) for value in values]
    return [slow_time(bags, position, value, feature) for value in values]


def entries(bag) -> list:
    bag = bag if isinstance(bag, list) else [bag]
    return [v for v in bag if v is not None and not (isinstance(v, float) and math.isnan(v))]


def slow_time(bags: list, position: int, value, feature: FeatureConfig) -> int:
    per_second = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}[feature.time_unit]
    if feature.op == "time_gap":
        before = entries(bags[position - 1]) if position else []
        if not before:
            return 0
        seconds = (int(value) - int(before[0])) // per_second
        gap = 2 + seconds.bit_length() - 1 if seconds >= 1 else 1
        return min(gap, feature.hash_bucket_size - 1)
    zone = datetime.timezone(datetime.timedelta(hours=feature.utc_offset_hours))
    epoch = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
    there = (epoch + datetime.timedelta(seconds=int(value) // per_second)).astimezone(zone)
    return there.hour if feature.op == "hour_of_day" else there.weekday()


def assert_same(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> None:
    assert found.keys() == wanted.keys()
    for key in wanted:
        assert found[key].dtype == np.int32
        assert found[key].shape == wanted[key].shape
        np.testing.assert_array_equal(found[key], wanted[key], err_msg=key)


# --------------------------------------------------------------------------------- random rows

INTEGERS = {
    pa.int8(): (-(2**7), 2**7 - 1),
    pa.int16(): (-(2**15), 2**15 - 1),
    pa.int32(): (-(2**31), 2**31 - 1),
    pa.int64(): (-(2**63), 2**63 - 1),
    pa.uint8(): (0, 2**8 - 1),
    pa.uint64(): (0, 2**64 - 1),
}
TEXTS = [pa.string(), pa.large_string()]


@st.composite
def logs(draw):
    """Features, their Arrow types, and rows whose columns agree in length."""
    columns, types, values = [], {}, {}
    for i in range(draw(st.integers(1, 3))):
        element = draw(st.sampled_from([*INTEGERS, *TEXTS]))
        if element in INTEGERS:
            hash_type = draw(st.sampled_from([None, "murmur"]))
            value = st.integers(*INTEGERS[element])
        else:
            hash_type = "murmur"
            value = st.text(max_size=12)
        bag_size = draw(st.integers(1, 3))
        wrap = draw(st.sampled_from([pa.list_, pa.large_list]))
        bagged = bag_size > 1 or draw(st.booleans())
        value = st.none() | value
        if bagged:
            # Nulls in a bag do not count, so there may be more of them.
            bag = st.lists(value, max_size=bag_size) | st.lists(st.none(), max_size=5)
            value = st.none() | bag
        columns.append(
            FeatureConfig(
                name=f"f{i}",
                hash_type=hash_type,
                hash_bucket_size=BUCKETS,
                bag_size=bag_size,
                of_next=draw(st.booleans()),
            )
        )
        types[f"f{i}"] = wrap(pa.list_(element)) if bagged else wrap(element)
        values[f"f{i}"] = value
    rows = []
    for length in draw(st.lists(st.integers(0, 7), max_size=6)):
        row = {
            name: draw(st.lists(v, min_size=length, max_size=length)) for name, v in values.items()
        }
        for name in draw(st.sets(st.sampled_from(sorted(types)))):
            row[name] = draw(st.sampled_from([None, []]))
        rows.append(row)
    return tuple(columns), types, rows


def record_batch(rows: list[dict], types: dict[str, pa.DataType]) -> pa.RecordBatch:
    return pa.RecordBatch.from_arrays(
        [pa.array([row[name] for row in rows], t) for name, t in types.items()], list(types)
    )


def dense(block: blocks.Block, rows: int, config: Config) -> dict[str, np.ndarray]:
    return blocks.to_dense([blocks.pack(block)], rows, config.model.seq_len)


@given(logs(), st.integers(2, 8), st.sampled_from(["left", "right"]), st.data())
@settings(max_examples=250)
def test_decode_and_pad_do_as_plain_python(log, seq_len, side, data):
    columns, types, rows = log
    config = make_config(columns, seq_len, truncate_side=side)
    batch = record_batch(rows, types)
    features.check_schema(file_of(batch), columns)
    start = data.draw(st.integers(0, len(rows)))
    stop = data.draw(st.integers(start, len(rows)))
    decoded = of_config.decode(batch.slice(start, stop - start), file_of(batch), start, config)
    rows = rows[start:stop]
    # pack() may ask for each row at most once, as windows do.
    chosen = data.draw(st.permutations(range(len(rows))))
    chosen = chosen[: data.draw(st.integers(0, len(rows)))]
    batch_rows = len(chosen) + data.draw(st.integers(0, 2))
    found = dense(blocks.choose(decoded, np.array(chosen, np.int64)), batch_rows, config)
    assert_same(found, slow_batch([rows[i] for i in chosen], batch_rows, config))


@given(logs(), st.integers(2, 8), st.sampled_from(["left", "right"]), st.integers(0, 6))
@settings(max_examples=60)
def test_concatenated_parts_are_as_one(log, seq_len, side, cut):
    columns, types, rows = log
    config = make_config(columns, seq_len, truncate_side=side)
    batch = record_batch(rows, types)
    parts = [
        of_config.decode(part, file_of(batch), 0, config)
        for part in (batch.slice(0, cut), batch.slice(cut))
    ]
    found = dense(blocks.concatenate(parts), len(rows), config)
    assert_same(found, slow_batch(rows, len(rows), config))
    packed = [blocks.pack(part) for part in parts]
    found = blocks.to_dense(packed, len(rows) + 1, config.model.seq_len)
    assert_same(found, slow_batch(rows, len(rows) + 1, config))


TIMES = [pa.int64(), pa.int32(), pa.string(), pa.timestamp("s"), pa.timestamp("ns")]


@given(
    st.sampled_from(["time_gap", "hour_of_day", "day_of_week"]),
    st.sampled_from(TIMES),
    st.sampled_from([-9.5, 0.0, 5.75]),
    st.lists(st.lists(st.none() | st.integers(-(2**31), 2**31 - 1), max_size=9), max_size=5),
    st.booleans(),
    st.integers(2, 6),
)
@settings(max_examples=200)
def test_time_features_do_as_plain_python(op, element, offset, times, bagged, seq_len):
    unit = element.unit if pa.types.is_timestamp(element) else "s"
    scale = 10**9 if unit == "ns" else 1
    rows = [
        {"t": [time if time is None else time * scale + scale // 3 for time in row]}
        for row in times
    ]
    if bagged:
        rows = [{"t": [[time] for time in row["t"]]} for row in rows]
    feature = FeatureConfig(
        name="t", op=op, hash_bucket_size=28, time_unit=unit, utc_offset_hours=offset
    )
    config = make_config((feature,), seq_len)
    shown = element
    if element == pa.string():
        rows_in = [{"t": [_as_text(time) for time in row["t"]]} for row in rows]
    else:
        rows_in = rows
    batch = record_batch(rows_in, {"t": pa.list_(pa.list_(shown) if bagged else shown)})
    features.check_schema(file_of(batch), (feature,))
    found = dense(of_config.decode(batch, file_of(batch), 0, config), len(rows), config)
    assert_same(found, slow_batch(rows, len(rows), config))


def _as_text(time):
    if isinstance(time, list):
        return [_as_text(one) for one in time]
    return None if time is None else str(time)


def test_time_gaps_of_known_lengths():
    """From one second to a year, in log2; with times as text, and a column read by two features."""
    times = [100, 100, 101, 103, 163, 3763, 90163, 31626163]
    row = {"timestamp": [[str(t)] for t in times]}
    batch = record_batch([row], {"timestamp": pa.list_(pa.list_(pa.string()))})
    gap = FeatureConfig(name="gap", column="timestamp", op="time_gap", hash_bucket_size=40)
    hour = FeatureConfig(name="hour", column="timestamp", op="hour_of_day", hash_bucket_size=24)
    config = make_config((gap, hour), 8)
    ids = dense(of_config.decode(batch, file_of(batch), 0, config), 1, config)["ids"][0]
    # 60 s is in [2^5, 2^6), an hour in [2^11, 2^12), a day in [2^16, 2^17), and a year in [2^24, 2^25).
    assert ids[:, 0].tolist() == [0, 1, 2, 3, 7, 13, 18, 26]
    assert ids[:, 1].tolist() == [0, 0, 0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize("hash_type", [None, "murmur"])
@pytest.mark.parametrize(
    "element", [pa.timestamp("s"), pa.timestamp("us", "UTC"), pa.date32()], ids=str
)
def test_times_as_ids_are_the_numbers_that_stand_for_them(element, hash_type):
    numbers = [0, 7, 1511544070]
    column = FeatureConfig(name="a", hash_type=hash_type, hash_bucket_size=BUCKETS)
    config = make_config((column,), 4)
    storage = pa.int32() if pa.types.is_date32(element) else pa.int64()
    values = pa.array(numbers, storage).cast(element)
    lists = pa.ListArray.from_arrays(pa.array([0, 3], pa.int32()), values)
    batch = pa.RecordBatch.from_arrays([lists], ["a"])
    features.check_schema(file_of(batch), (column,))
    found = dense(of_config.decode(batch, file_of(batch), 0, config), 1, config)
    assert_same(found, slow_batch([{"a": numbers}], 1, config))


@given(
    st.sampled_from([pa.float64(), pa.float32(), pa.int64(), pa.uint8()]),
    st.lists(st.lists(st.none() | st.integers(0, 200), max_size=6), max_size=5),
    st.sets(st.floats(-50, 250, width=32), min_size=1, max_size=5),
)
@settings(max_examples=100)
def test_bucketize_does_as_plain_python(element, numbers, limits):
    if pa.types.is_floating(element):
        numbers = [
            [math.nan if n == 200 else n if n is None else n / 2 for n in row] for row in numbers
        ]
    limits = tuple(sorted(map(float, limits)))
    feature = FeatureConfig(name="a", op="bucketize", boundaries=limits, hash_bucket_size=9)
    config = make_config((feature,), 5)
    rows = [{"a": row} for row in numbers]
    batch = record_batch(rows, {"a": pa.list_(element)})
    features.check_schema(file_of(batch), (feature,))
    found = dense(of_config.decode(batch, file_of(batch), 0, config), len(rows), config)
    assert_same(found, slow_batch(rows, len(rows), config))


def test_dictionaries_of_strings_hash_as_their_strings():
    texts = ["pv", "cart", "", "pv", None, "a longer behaviour", "cart"]
    values = pa.array(texts).dictionary_encode().slice(1)
    lists = pa.ListArray.from_arrays(pa.array([0, 2, 6], pa.int32()), values)
    feature = FeatureConfig(name="a", hash_type="murmur", hash_bucket_size=BUCKETS)
    config = make_config((feature,), 4)
    batch = pa.RecordBatch.from_arrays([lists], ["a"])
    found = dense(of_config.decode(batch, file_of(batch), 0, config), 2, config)
    assert_same(found, slow_batch([{"a": texts[1:3]}, {"a": texts[3:]}], 2, config))


@pytest.mark.parametrize("hash_type", [None, "murmur"])
@pytest.mark.parametrize("element", INTEGERS, ids=str)
def test_the_ends_of_integer_types(element, hash_type):
    low, high = INTEGERS[element]
    values = [low, low + 1, 0, 5, high // 2 + 3, high - 1, high]
    column = FeatureConfig(name="a", hash_type=hash_type, hash_bucket_size=BUCKETS)
    config = make_config((column,), len(values))
    for row in ({"a": values}, {"a": [None, *values[1:]]}):
        batch = record_batch([row], {"a": pa.list_(element)})
        decoded = of_config.decode(batch, file_of(batch), 0, config)
        found = dense(decoded, 1, config)
        assert_same(found, slow_batch([row], 1, config))


def test_values_hidden_under_null_lists_are_not_seen():
    # A null list may still span values in its child array.
    inner = pa.ListArray.from_arrays(pa.array([0, 1, 2, 4, 5]), pa.array([10, 20, 30, 31, 40]))
    inner = pa.Array.from_buffers(
        inner.type, 4, [pa.py_buffer(b"\x0d"), inner.buffers()[1]], children=[inner.values]
    )
    outer = pa.Array.from_buffers(
        pa.list_(inner.type),
        3,
        [pa.py_buffer(b"\x05"), pa.array([0, 1, 2, 4], pa.int32()).buffers()[1]],
        children=[inner],
    )
    assert outer.to_pylist() == [[[10]], None, [[30, 31], [40]]]
    column = FeatureConfig(name="a", hash_bucket_size=BUCKETS, bag_size=2)
    config = make_config((column,), 3)
    batch = pa.RecordBatch.from_arrays([outer], ["a"])
    decoded = of_config.decode(batch, file_of(batch), 0, config)
    found = dense(decoded, 3, config)
    assert_same(found, slow_batch([{"a": x} for x in outer.to_pylist()], 3, config))


def test_truncation_keeps_the_newest_or_the_oldest():
    column = FeatureConfig(name="a", hash_bucket_size=BUCKETS)
    batch = record_batch([{"a": [1, 2, 3, 4, 5]}], {"a": pa.list_(pa.int64())})
    for side, kept in (("left", [3, 4, 5]), ("right", [1, 2, 3])):
        config = make_config((column,), 3, truncate_side=side)
        rows = of_config.decode(batch, file_of(batch), 0, config)
        ids = dense(rows, 1, config)["ids"]
        assert ids[0, :, 0].tolist() == kept


# -------------------------------------------------------------------------------------- refusals


def refusal(call, *arguments) -> str:
    with pytest.raises(UserError) as caught:
        call(*arguments)
    assert str(PATH) in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


A = FeatureConfig(name="a", hash_bucket_size=BUCKETS)
B = FeatureConfig(name="b", hash_bucket_size=BUCKETS, bag_size=2)
TYPES = {"a": pa.list_(pa.int64()), "b": pa.list_(pa.list_(pa.int64()))}


def test_disagreeing_lengths():
    rows = [{"a": [1], "b": [[1]]}, {"a": None, "b": [[1]]}, {"a": [1, 2], "b": [[1], [2], []]}]
    batch = record_batch(rows, TYPES)
    message = refusal(of_config.decode, batch, file_of(batch), 70, make_config((A, B), 2))
    assert "row 72" in message
    assert "b has 3 positions" in message
    assert "a has 2" in message


def test_overfull_bag():
    rows = [
        {"a": [1], "b": [[1, None, 2]]},
        {"a": [], "b": []},
        {"a": [1] * 3, "b": [[4, 5, 6], [], [7, 8, 9, 10]]},
    ]
    batch = record_batch(rows, TYPES)
    message = refusal(of_config.decode, batch, file_of(batch), 5, make_config((A, B), 2))
    assert "row 7, column b" in message
    assert "holds 4 ids, expected at most 2" in message
    # Truncated positions do not count.
    config = make_config((A, B), 2, truncate_side="right")
    assert "holds 3 ids" in refusal(of_config.decode, batch, file_of(batch), 5, config)
    of_config.decode(batch.slice(0, 2), file_of(batch), 5, config)
    first = record_batch([{"a": [1] * 3, "b": [[4, 5, 6], [7], []]}], TYPES)
    found = dense(of_config.decode(first, file_of(first), 0, make_config((A, B), 2)), 1, config)
    assert found["ids"].tolist() == [[[1, 7, -1], [1, -1, -1]]]
    of_config.decode(batch.slice(0, 2), file_of(batch), 5, config)


def test_several_times_where_truncation_drops_them():
    """Only kept positions must respect bag_size; earlier ones are represented by their first time."""
    rows = [{"a": [[1, 9], [5, 7, 8], [], [69]]}, {"a": [[1, 2], [100], [108]]}]
    batch = record_batch(rows, {"a": pa.list_(pa.list_(pa.int64()))})
    feature = FeatureConfig(name="a", op="time_gap", hash_bucket_size=40)
    config = make_config((feature,), 2)
    found = dense(of_config.decode(batch, file_of(batch), 0, config), 2, config)
    # Nothing is before 69; 99 seconds are between 1 and 100, and 8 between 100 and 108.
    assert found["ids"][..., 0].tolist() == [[-1, 0], [2 + 6, 2 + 3]]
    message = refusal(of_config.decode, batch, file_of(batch), 0, make_config((feature,), 3))
    assert "row 0, column a: a position holds 3 ids, expected at most 1" in message


def test_sequences_too_long_where_length_is_checked():
    batch = record_batch([{"a": [1, 2]}, {"a": None}, {"a": [1, 2, 3]}], {"a": TYPES["a"]})
    config = make_config((A,), 2, check_length=True)
    of_config.decode(batch.slice(0, 2), file_of(batch), 0, config)
    message = refusal(of_config.decode, batch.slice(1), file_of(batch), 1, config)
    assert "row 2 has 3 positions, expected at most 2 (model.seq_len)" in message
    of_config.decode(batch, file_of(batch), 0, make_config((A,), 3, check_length=True))


@pytest.mark.parametrize(
    "column_type",
    [
        pa.int64(),
        pa.string(),
        pa.list_(pa.float64()),
        pa.list_(pa.list_(pa.bool_())),
        pa.list_(pa.list_(pa.list_(pa.int64()))),
        pa.list_(pa.struct([("x", pa.int64())])),
        pa.map_(pa.string(), pa.int64()),
    ],
    ids=str,
)
def test_other_types(column_type):
    file = OrcFile(PATH, 1, pa.schema([("a", column_type)]), (1,), "")
    message = refusal(features.check_schema, file, (A,))
    assert "column a: expected list<T> or list<list<T>>" in message
    assert str(column_type) in message


def test_missing_columns():
    file = OrcFile(PATH, 1, pa.schema([("x", pa.int64()), ("a", TYPES["a"])]), (1,), "")
    message = refusal(features.check_schema, file, (A, B))
    assert "no column b (features.1.name)" in message
    assert "x, a" in message
    empty = OrcFile(PATH, 1, pa.schema([]), (1,), "")
    assert "no columns" in refusal(features.check_schema, empty, (A,))


@pytest.mark.parametrize("element", [pa.string(), pa.large_string(), pa.binary()], ids=str)
def test_strings_need_a_hash(element):
    file = OrcFile(PATH, 1, pa.schema([("a", pa.list_(element))]), (1,), "")
    message = refusal(features.check_schema, file, (A,))
    assert "column a" in message
    assert "features.0.hash_type" in message
    features.check_schema(file, (dataclasses.replace(A, hash_type="murmur"),))


@pytest.mark.parametrize(
    ("op", "element"),
    [("bucketize", pa.string()), ("time_gap", pa.float64()), ("hour_of_day", pa.bool_())],
    ids=str,
)
def test_ops_refuse_types_they_cannot_take(op, element):
    feature = FeatureConfig(name="a", op=op, boundaries=(1.0,), hash_bucket_size=40)
    file = OrcFile(PATH, 1, pa.schema([("a", pa.list_(element))]), (1,), "")
    assert f"(features.0.op is {op})" in refusal(features.check_schema, file, (feature,))


def test_text_that_is_no_time_is_named():
    rows = [{"a": [["1"], ["2"]]}, {"a": [[], ["2017-11-25"]]}]
    batch = record_batch(rows, {"a": pa.list_(pa.list_(pa.string()))})
    feature = FeatureConfig(name="a", op="time_gap", hash_bucket_size=40)
    message = refusal(of_config.decode, batch, file_of(batch), 10, make_config((feature,), 4))
    assert "row 11, column a" in message
    assert "'2017-11-25'" in message


def test_ids_of_tables_that_grow_keep_all_their_64_bits():
    """Low and high word of each id; hashes have 63 bits; -1 means no id, so the id -1 is replaced."""
    columns = (
        FeatureConfig(name="item", hash_bucket_size=0, bag_size=2),
        FeatureConfig(name="text", hash_bucket_size=0, hash_type="murmur"),
        FeatureConfig(name="bucket", hash_bucket_size=10),
    )
    numbers = [[[2**40 + 5, -7], [], [-1]], [[-(2**63)]]]
    texts = [[["a"], ["bc"], []], [[""]]]
    batch = pa.record_batch(
        {
            "item": pa.array(numbers, pa.list_(pa.list_(pa.int64()))),
            "text": pa.array(texts, pa.list_(pa.list_(pa.string()))),
            "bucket": pa.array([[[13], [3], [4]], [[5]]], pa.list_(pa.list_(pa.int64()))),
        }
    )
    config = make_config(columns, seq_len=3)
    where = features.id_columns(columns)
    assert where == {"item": slice(0, 4), "text": slice(4, 6), "bucket": slice(6, 7)}
    block = of_config.decode(batch, file_of(batch), 0, config)
    ids = blocks.to_dense([block], 2, 3)["ids"]

    def numbers_of(name, row, position):
        pairs = ids[row, position, where[name]].reshape(-1, 2).astype(np.int64)
        return [(int(high) % 2**32 << 32) + int(low) % 2**32 for low, high in pairs]

    none = 2**64 - 1
    assert numbers_of("item", 0, 0) == [2**40 + 5, 2**64 - 7]
    assert numbers_of("item", 0, 1) == [none, none]
    instead, after = numbers_of("item", 0, 2)
    assert after == none != instead
    assert numbers_of("item", 1, 0) == [2**63, none]
    assert numbers_of("item", 1, 1) == [none, none]
    for position, text in enumerate((b"a", b"bc")):
        assert numbers_of("text", 0, position) == [reference(text) % 2**63]
    assert numbers_of("text", 0, 2) == [none]
    np.testing.assert_array_equal(ids[:, :, 6], [[3, 3, 4], [5, -1, -1]])
