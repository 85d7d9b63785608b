"""Plain histories become the same rows as in a log."""

import datetime

import numpy as np
import of_config
import pyarrow as pa
import pytest
from logs import write_log

from s2s_jax.config import Config, FeatureConfig, ModelConfig
from s2s_jax.data.logs import orc
from s2s_jax.errors import UserError
from s2s_serve.encoding import blocks, features
from s2s_serve.encoding.plain_histories import HistorySource, to_rows

FEATURES = (
    FeatureConfig(name="item_id", hash_type="murmur", hash_bucket_size=0),
    FeatureConfig(name="tags", hash_type="murmur", hash_bucket_size=99, bag_size=3),
    FeatureConfig(name="gap", column="at", op="time_gap", hash_bucket_size=30),
    FeatureConfig(name="hour", column="at", op="hour_of_day", hash_bucket_size=24),
    FeatureConfig(
        name="price", op="bucketize", boundaries=(1.0, 5.0), hash_bucket_size=3, of_next=True
    ),
)
KINDS = {"item_id": "text", "tags": "whole numbers"}
HISTORIES = [
    {
        "item_id": ["a", "b", None, "b"],
        "tags": [1, [2, 3], [], None],
        "at": [100, 200, 90_000, None],
        "price": [0.5, 7, None, 2],
    },
    {"item_id": [], "tags": [], "at": None, "price": []},
    {"item_id": ["c"], "tags": None, "at": [5], "price": [1.0], "more": "does not matter"},
]


def decoded(rows, source):
    config = Config(features=FEATURES, model=ModelConfig(seq_len=3))
    block = of_config.decode(rows, source, 0, config)
    return blocks.positions_of(block), block.lengths_N


def given(histories, kinds=KINDS, used=FEATURES):
    return to_rows(histories, used, kinds)


def test_histories_are_decoded_like_rows_of_a_log(tmp_path):
    bag, text = pa.list_(pa.list_(pa.int64())), pa.list_(pa.string())
    types = {
        "item_id": text,
        "tags": bag,
        "at": pa.list_(pa.int64()),
        "price": pa.list_(pa.float64()),
    }
    written = [
        {name: history[name] for name in types}
        | {"tags": history["tags"] and [[t] if isinstance(t, int) else t for t in history["tags"]]}
        for history in HISTORIES
    ]
    file = orc.read_footer(write_log(tmp_path / "log.orc", written, types))
    stripe = orc.read_stripe(file, 0, features.column_names(FEATURES))
    rows = given(HISTORIES)
    found, expected = decoded(rows, HistorySource(rows.schema)), decoded(stripe, file)
    np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_array_equal(found[1], expected[1])
    assert expected[1].tolist() == [3, 0, 1]


def test_other_spellings_give_the_same_rows():
    other = [
        {
            "item_id": np.array(["a", "b", None, "b"], object),
            "tags": ([1], (2, 3), np.array([], np.int64), None),
            "gap": [100, 200, 90_000, None],
            "hour": (100, 200, 90_000, None),
            "price": (x for x in [0.5, 7, None, 2]),
        },
        *HISTORIES[1:],
    ]
    assert given(other).to_pylist() == given(HISTORIES).to_pylist()
    assert given(pa.Table.from_batches([given(HISTORIES)])).equals(given(HISTORIES))
    assert given([]).num_rows == 0


@pytest.mark.parametrize(
    "kind", ["timestamp[ns]", "timestamp[ms]", "timestamp[us, tz=UTC]", "date32[day]"]
)
def test_times_that_are_ids_take_the_type_of_the_log(kind):
    day = FeatureConfig(name="day", hash_bucket_size=10)
    rows = given([{"day": [datetime.datetime(2020, 1, 31)]}, {"day": []}], {"day": kind}, (day,))
    assert str(rows.schema.field("day").type.value_type) == kind


def test_large_numbers_are_unsigned():
    rows = given([{"item_id": [2**63, 5]}], {}, (FEATURES[0],))
    assert rows.column(0).to_pylist() == [[2**63, 5]]


def changed(**columns):
    return [HISTORIES[2] | columns]


NONE = pa.null()
PAIRS = [["a", "b"], None, ["b", None], ["c", "a"]]
EMPTY = [[], [], None, []]


@pytest.mark.parametrize(
    ("column", "entries", "kind"),
    [
        ("tags", EMPTY, pa.list_(NONE)),
        ("tags", EMPTY, pa.large_list(NONE)),
        ("tags", EMPTY, pa.list_(pa.list_(NONE))),
        ("tags", [None] * 4, NONE),
        ("tags", [[None, None], [], [None, None], [None, None]], pa.list_(NONE)),
        ("tags", [[[], None], [], [[], []], [[None], []]], pa.list_(pa.list_(NONE))),
        ("at", EMPTY, pa.list_(NONE)),
        ("price", EMPTY, pa.list_(NONE)),
        ("item_id", EMPTY, pa.list_(NONE)),
        ("item_id", PAIRS, pa.list_(pa.string(), 2)),
        ("item_id", [[None, None], None, [None, None], [None, None]], pa.list_(NONE, 2)),
        ("tags", [[[1], [2]], [], [[3], [None]], [[4], [5]]], pa.list_(pa.list_(pa.int64(), 1))),
        ("tags", [[[1], [2]], None, [None, [3]], [[4], [5]]], pa.list_(pa.list_(pa.int8()), 2)),
    ],
)
@pytest.mark.parametrize("begin", [0, 1])
def test_columns_without_ids_and_lists_of_a_fixed_size_are_read_like_plain_ones(
    column, entries, kind, begin
):
    names = ("item_id", "tags", "at", "price")
    histories = [
        {name: [] for name in names} | {"item_id": ["a", "b"], column: each} for each in entries
    ]
    table = pa.Table.from_pylist(
        histories,
        pa.schema(
            {
                "item_id": pa.list_(pa.string()),
                "tags": pa.list_(pa.list_(pa.int64())),
                "at": pa.list_(pa.int64()),
                "price": pa.list_(pa.float64()),
                column: kind,
            }
        ),
    )
    assert table.schema.field(column).type == kind
    rows, expected = given(table.slice(begin)), given(histories[begin:])
    for found, wanted in zip(
        decoded(rows, HistorySource(rows.schema)),
        decoded(expected, HistorySource(expected.schema)),
        strict=True,
    ):
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize(
    ("histories", "words"),
    [
        (HISTORIES[0], ["expected a list of histories", "dict", "[history]"]),
        (["a"], ["row 0", "'a'", "item_id"]),
        ([HISTORIES[0], {"item_id": ["a"]}], ["row 1", "no tags", "only item_id"]),
        (changed(item_id="a"), ["row 0", "item_id", "str 'a'", "list"]),
        (changed(item_id=[5]), ["item_id", "whole numbers", "expected text"]),
        (changed(tags=["x"]), ["tags", "text", "expected whole numbers"]),
        ([*HISTORIES, *changed(tags=["x"])], ["row 3", "tags"]),
        (changed(tags=[[1, "x"]]), ["row 0", "tags"]),
        (changed(tags=[{"a": 1}]), ["tags"]),
        (changed(price=["cheap"]), ["price", "numbers", "bucketize"]),
        (changed(tags=[1.5]), ["tags", "double"]),
        (changed(tags=[2**64]), ["row 0", "tags"]),
        ([{k: v for k, v in HISTORIES[2].items() if k != "at"}], ["no at or gap or hour"]),
        (
            [{k: v for k, v in HISTORIES[2].items() if k != "at"} | {"gap": [1], "hour": [2]}],
            ["gap and hour differ", "give at"],
        ),
        (pa.table({"item_id": [["a"]]}), ["expected one column tags", "item_id"]),
    ],
)
def test_mistakes_are_reported_in_one_sentence(histories, words):
    with pytest.raises(UserError) as caught:
        given(histories)
    text = str(caught.value)
    assert text.startswith("histories: ")
    assert "\n" not in text
    for word in words:
        assert word in text, text


def test_lists_of_unequal_length_are_refused():
    rows = given([HISTORIES[1], *changed(price=[1.0, 2.0])])
    with pytest.raises(UserError, match=r"histories: row 1: .*price has 2 .*, item_id has 1"):
        decoded(rows, HistorySource(rows.schema))
