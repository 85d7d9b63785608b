import dataclasses
import struct
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_hashing import reference

from s2s_jax.config import Config, FeatureConfig, IOConfig, ModelConfig
from s2s_jax.data import features
from s2s_jax.data.orc import OrcFile
from s2s_jax.errors import UserError

PATH = Path("logs/part-0.orc")
BUCKETS = 1000


def make_config(columns: tuple[FeatureConfig, ...], seq_len: int, **io) -> Config:
    return Config(features=columns, model=ModelConfig(seq_len=seq_len), io=IOConfig(**io))


def file_of(batch: pa.RecordBatch) -> OrcFile:
    return OrcFile(PATH, 100, batch.schema, (batch.num_rows,))


def bucket(value, feature: FeatureConfig) -> int:
    if isinstance(value, str):
        number = reference(value.encode())
    elif feature.hash_type == "murmur":
        number = reference(struct.pack("<Q", value % 2**64))
    else:
        number = value % 2**64
    return number % feature.hash_bucket_size


def slow_batch(rows: list[dict], batch_rows: int, config: Config) -> dict[str, np.ndarray]:
    """What `decode` and `densify` should return, in plain Python."""
    seq_len = config.model.seq_len
    batch = {"length": np.zeros(batch_rows, np.int32)}
    for feature in config.features:
        shape = (batch_rows, seq_len, feature.bag_size)
        batch[f"ids/{feature.name}"] = np.full(shape, -1, np.int32)
    for n, row in enumerate(rows):
        positions = max(len(row[f.name] or []) for f in config.features)
        kept = list(range(positions))
        kept = kept[-seq_len:] if config.io.truncate_side == "left" else kept[:seq_len]
        batch["length"][n] = len(kept)
        for feature in config.features:
            bags = row[feature.name] or [None] * positions
            for at, position in enumerate(kept):
                bag = bags[position]
                ids = bag if isinstance(bag, list) else [bag]
                ids = [value for value in ids if value is not None]
                for k, value in enumerate(ids):
                    batch[f"ids/{feature.name}"][n, at, k] = bucket(value, feature)
    return batch


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
    """Features, their Arrow types, and rows that agree in length."""
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
            # Nulls in a bag do not count, so it may hold more of them.
            bag = st.lists(value, max_size=bag_size) | st.lists(st.none(), max_size=5)
            value = st.none() | bag
        columns.append(
            FeatureConfig(
                name=f"f{i}", hash_type=hash_type, hash_bucket_size=BUCKETS, bag_size=bag_size
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


@given(logs(), st.integers(2, 8), st.sampled_from(["left", "right"]), st.data())
@settings(deadline=None, max_examples=250)
def test_decode_and_densify_do_as_plain_python(log, seq_len, side, data):
    columns, types, rows = log
    config = make_config(columns, seq_len, truncate_side=side)
    batch = record_batch(rows, types)
    features.check_schema(file_of(batch), columns)
    start = data.draw(st.integers(0, len(rows)))
    stop = data.draw(st.integers(start, len(rows)))
    decoded = features.decode(batch.slice(start, stop - start), file_of(batch), start, config)
    rows = rows[start:stop]
    chosen = data.draw(st.lists(st.integers(0, len(rows) - 1), max_size=5)) if rows else []
    batch_rows = len(chosen) + data.draw(st.integers(0, 2))
    found = features.densify(decoded, np.array(chosen, np.int64), batch_rows, config)
    assert_same(found, slow_batch([rows[i] for i in chosen], batch_rows, config))


@given(logs(), st.integers(2, 8), st.sampled_from(["left", "right"]), st.integers(0, 6))
@settings(deadline=None, max_examples=60)
def test_concatenated_parts_are_as_one(log, seq_len, side, cut):
    columns, types, rows = log
    config = make_config(columns, seq_len, truncate_side=side)
    batch = record_batch(rows, types)
    parts = [
        features.decode(part, file_of(batch), 0, config)
        for part in (batch.slice(0, cut), batch.slice(cut))
    ]
    joined = features.concatenate(parts)
    found = features.densify(joined, np.arange(len(rows)), len(rows), config)
    assert_same(found, slow_batch(rows, len(rows), config))


@pytest.mark.parametrize("hash_type", [None, "murmur"])
@pytest.mark.parametrize("element", INTEGERS, ids=str)
def test_the_ends_of_integer_types(element, hash_type):
    low, high = INTEGERS[element]
    values = [low, low + 1, 0, 5, high // 2 + 3, high - 1, high]
    column = FeatureConfig(name="a", hash_type=hash_type, hash_bucket_size=BUCKETS)
    config = make_config((column,), len(values))
    for row in ({"a": values}, {"a": [None, *values[1:]]}):
        batch = record_batch([row], {"a": pa.list_(element)})
        decoded = features.decode(batch, file_of(batch), 0, config)
        found = features.densify(decoded, np.array([0]), 1, config)
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
    decoded = features.decode(batch, file_of(batch), 0, config)
    found = features.densify(decoded, np.arange(3), 3, config)
    assert_same(found, slow_batch([{"a": x} for x in outer.to_pylist()], 3, config))


def test_truncation_keeps_the_newest_or_the_oldest():
    column = FeatureConfig(name="a", hash_bucket_size=BUCKETS)
    batch = record_batch([{"a": [1, 2, 3, 4, 5]}], {"a": pa.list_(pa.int64())})
    for side, kept in (("left", [3, 4, 5]), ("right", [1, 2, 3])):
        config = make_config((column,), 3, truncate_side=side)
        rows = features.decode(batch, file_of(batch), 0, config)
        ids = features.densify(rows, np.array([0]), 1, config)["ids/a"]
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
    message = refusal(features.decode, batch, file_of(batch), 70, make_config((A, B), 2))
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
    message = refusal(features.decode, batch, file_of(batch), 5, make_config((A, B), 2))
    assert "row 7, column b" in message
    assert "holds 4 ids, expected at most 2" in message
    # The positions that are truncated do not count.
    config = make_config((A, B), 2, truncate_side="right")
    assert "holds 3 ids" in refusal(features.decode, batch, file_of(batch), 5, config)
    features.decode(batch.slice(0, 2), file_of(batch), 5, config)


def test_sequences_too_long_where_length_is_checked():
    batch = record_batch([{"a": [1, 2]}, {"a": None}, {"a": [1, 2, 3]}], {"a": TYPES["a"]})
    config = make_config((A,), 2, check_length=True)
    features.decode(batch.slice(0, 2), file_of(batch), 0, config)
    message = refusal(features.decode, batch.slice(1), file_of(batch), 1, config)
    assert "row 2 has 3 positions, expected at most 2 (model.seq_len)" in message
    features.decode(batch, file_of(batch), 0, make_config((A,), 3, check_length=True))


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
        pa.list_(pa.timestamp("ns")),
    ],
    ids=str,
)
def test_other_types(column_type):
    file = OrcFile(PATH, 1, pa.schema([("a", column_type)]), (1,))
    message = refusal(features.check_schema, file, (A,))
    assert "column a: expected list<T> or list<list<T>>" in message
    assert str(column_type) in message


def test_missing_columns():
    file = OrcFile(PATH, 1, pa.schema([("x", pa.int64()), ("a", TYPES["a"])]), (1,))
    message = refusal(features.check_schema, file, (A, B))
    assert "no column b (features.1.name)" in message
    assert "x, a" in message
    empty = OrcFile(PATH, 1, pa.schema([]), (1,))
    assert "no columns" in refusal(features.check_schema, empty, (A,))


@pytest.mark.parametrize("element", [pa.string(), pa.large_string(), pa.binary()], ids=str)
def test_strings_need_a_hash(element):
    file = OrcFile(PATH, 1, pa.schema([("a", pa.list_(element))]), (1,))
    message = refusal(features.check_schema, file, (A,))
    assert "column a" in message
    assert "features.0.hash_type" in message
    features.check_schema(file, (dataclasses.replace(A, hash_type="murmur"),))
