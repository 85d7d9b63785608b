"""Rules and similar items name items by their own ids, also where ids share a bucket."""

import datetime
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from murmur import reference

from s2s_serve import Model, UnknownItemError, tensor_file
from s2s_serve.encoder import Encoded
from s2s_serve.encoding.feature import FeatureConfig
from s2s_serve.items import Items
from s2s_serve.search.searcher import Searcher
from s2s_serve.tensor_file import Layout

BUCKETS = 50
DAY = datetime.datetime(2026, 1, 1)
LOGS = {
    "whole numbers": (range(40), pa.int64(), range(-40, 400)),
    "text": ([f"é {n}" for n in range(40)], pa.large_string(), [f"é {n}" for n in range(400)]),
    "bytes": ([b"\xff%d" % n for n in range(40)], pa.binary(), [b"\xff%d" % n for n in range(400)]),
    "timestamp[us]": (
        [DAY + datetime.timedelta(hours=n) for n in range(40)],
        pa.timestamp("us"),
        [DAY + datetime.timedelta(hours=n) for n in range(400)],
    ),
}


def bucket(each):
    """The bucket of an id, in plain Python."""
    if isinstance(each, datetime.datetime):
        each = (each - datetime.datetime(1970, 1, 1)) // datetime.timedelta(microseconds=1)
    if isinstance(each, int):
        each = each.to_bytes(8, "little", signed=each < 2**63)
    return reference(each.encode() if isinstance(each, str) else each) % BUCKETS


def exported(directory, log, kind, kinds):
    """The items of a log: one for each bucket, named by the first id in it."""
    first = {}
    for each in log:
        first.setdefault(bucket(each), each)
    items = len(first)
    assert items < len(log), "some ids share a bucket"
    columns = {
        "item": pa.array(list(first.values()), kind),
        "code": pa.array(list(first), pa.int64()),
        "count": pa.array(range(items, 0, -1)),
        "trained": pa.array([True] * items),
    }
    directory.mkdir()
    pq.write_table(pa.table(columns), directory / "items.parquet")
    vectors_IE = np.random.default_rng(0).normal(size=(items, 4)).astype(np.float32)
    layout = {"vectors": Layout(np.dtype(np.float32), vectors_IE.shape)}
    tensor_file.write(directory / "vectors.safetensors", layout, {"vectors": [vectors_IE]})
    item = FeatureConfig(name="item_id", hash_type="murmur", hash_bucket_size=BUCKETS, emb_dim=4)
    manifest = SimpleNamespace(
        items=items,
        width=4,
        item=item,
        kinds=kinds,
        similarity="cosine",
        untrained="keep",
        index=None,
        filter_seen=False,
    )
    return Items(directory, manifest), manifest


@pytest.mark.parametrize("kind", LOGS)
def test_only_the_own_id_of_an_item_names_it(kind, tmp_path):
    log, data_type, asked = LOGS[kind]
    kinds = {"item_id": "text" if kind == "bytes" else kind}
    items, _ = exported(tmp_path / "v", log, data_type, kinds)
    own = items.ids.to_pylist()
    expected = [own.index(each) if each in own else -1 for each in asked]
    taken = {bucket(each) for each in own}
    assert sum(n < 0 and bucket(x) in taken for x, n in zip(asked, expected, strict=True)) > 200
    assert items.numbers_of(list(asked), "allow").tolist() == expected
    # Missing ids, and bags of one id or none, name no other item.
    bags = [[own[3]], [], None, [own[0]], [asked[-1]]]
    wanted = [3, -1, -1, 0, expected[-1]]
    assert items.numbers_of(bags, "allow").tolist() == wanted
    assert items.numbers_of([None, own[2], None], "allow").tolist() == [-1, 2, -1]


def test_bytes_may_be_given_as_text(tmp_path):
    log = [b"%d" % n for n in range(40)]
    items, _ = exported(tmp_path / "v", log, pa.binary(), {"item_id": "text"})
    own = items.ids.to_pylist()
    asked = [str(n) for n in range(200)]
    expected = [own.index(x.encode()) if x.encode() in own else -1 for x in asked]
    assert items.numbers_of(asked, "allow").tolist() == expected


def test_ids_of_another_kind_name_no_item(tmp_path):
    """Runs of before do not have the kinds of their ids, which are then not refused."""
    items, _ = exported(tmp_path / "v", range(40), pa.int64(), {})
    for asked in ([str(n) for n in range(200)], LOGS["timestamp[us]"][2]):
        assert set(items.numbers_of(asked, "allow").tolist()) == {-1}
    negative, _ = exported(tmp_path / "w", range(-40, 0), pa.int64(), {})
    # The same bits as negative numbers.
    asked = [2**64 + each for each in range(-40, 0)]
    assert set(negative.numbers_of(asked, "allow").tolist()) == {-1}
    assert negative.numbers_of(negative.ids.to_pylist(), "allow").tolist() == list(
        range(len(negative))
    )


@pytest.fixture
def model(tmp_path):
    """A model whose users all are a vector of ones."""
    items, manifest = exported(tmp_path / "v", range(40), pa.int64(), {"item_id": "whole numbers"})

    def encode(histories, _):
        users = len(histories)
        ones = np.ones(users, np.int64)
        none = np.full(users, -1, np.int32)
        return Encoded(np.ones((users, 4), np.float32), ones, none, 0 * ones)

    made = Model.__new__(Model)
    made._manifest, made._items, made._neighbours = manifest, items, None
    made._encoder = SimpleNamespace(encode=encode)
    made._searcher = Searcher(tmp_path / "v", manifest, items, "exact")
    return made


def test_rules_and_similar_items_are_about_the_named_item(model):
    own = model._items.ids.to_pylist()
    sharing = [n for n in range(400) if n not in own and bucket(n) in {bucket(x) for x in own}]

    def recommended(**rules):
        return sorted(model.recommend([{"item_id": [1]}], k=40, **rules)[0].items)

    assert recommended(exclude=sharing) == sorted(own)
    assert recommended(allow=sharing) == []
    assert recommended(exclude=[*sharing, own[4]]) == sorted({*own} - {own[4]})
    assert recommended(allow=[*sharing, own[4]]) == [own[4]]
    assert own[4] not in model.similar(own[4], 40).items
    for each in sharing[:5]:
        with pytest.raises(UnknownItemError, match=rf"items of the export, found {each}$"):
            model.similar(each)
