"""Ids that are bytes or times, over HTTP: what an answer says can be sent back everywhere."""

import dataclasses
import datetime
import io
import json
from typing import NamedTuple

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import server_process
from evaluations import evaluating
from logs import write_log

import s2s_serve
from s2s_jax.cluster.mesh import make_mesh
from s2s_jax.config import FeatureConfig, LastEvents, TableConfig, validate
from s2s_jax.errors import UserError
from s2s_jax.jobs.export import Request, export
from s2s_jax.jobs.train import train
from s2s_serve.server.loading import load

ITEMS = 12
ARROW = "application/vnd.apache.arrow.stream"
NOON = datetime.datetime(2026, 1, 31, 12)
# Not UTF-8; the second, which is, begins like what is written for the first.
BYTES = [b"\xff\x00", rb"\xff00", *(f"item {n} é".encode() for n in range(ITEMS - 2))]
IN_JSON = [r"\xff00", r"\x5c7866663030", *(f"item {n} é" for n in range(ITEMS - 2))]
TIMES = [NOON + datetime.timedelta(hours=n, microseconds=n) for n in range(ITEMS)]


class Run(NamedTuple):
    app: server_process.App
    model: s2s_serve.Model
    ids: list
    texts: list[str]
    config: object


def trained(tmp, ids, kind):
    """A run whose items have such ids."""
    rows = [{"item_id": [ids[(user + n) % ITEMS] for n in range(6)]} for user in range(24)]
    write_log(tmp / "log/log.orc", rows, {"item_id": pa.list_(kind)})
    config = evaluating(tmp / "log", tmp / "run", split=LastEvents(events=1))
    feature = FeatureConfig(name="item_id", emb_dim=8, hash_type="murmur", hash_bucket_size=0)
    config = dataclasses.replace(
        config,
        features=(feature,),
        tables=(TableConfig(name="item_id", capacity=16, init_std=0.5),),
        loss=dataclasses.replace(config.loss, target_features=("item_id",)),
        train=dataclasses.replace(config.train, train_steps=1, save_steps=1),
    )
    validate(config)
    assert not train(config, make_mesh(jax.devices()[:1]))
    return config


@pytest.fixture(scope="module", params=["bytes", "times"])
def run(request, tmp_path_factory):
    tmp = tmp_path_factory.mktemp(request.param)
    is_bytes = request.param == "bytes"
    ids = BYTES if is_bytes else TIMES
    texts = IN_JSON if is_bytes else [each.isoformat() for each in TIMES]
    kind = pa.binary() if is_bytes else pa.timestamp("us")
    config = trained(tmp, ids, kind)
    table = pa.table({"item": pa.array(ids, kind), "made": pa.array(TIMES, pa.timestamp("ns"))})
    pq.write_table(table, tmp / "columns.parquet")
    export(config, Request(output=tmp / "export", item_columns=tmp / "columns.parquet", index="no"))
    model = s2s_serve.load(tmp / "export")
    with server_process.app(tmp / "export", load=load) as app:
        yield Run(app, model, ids, texts, config)


def asked(run, path, **body):
    answer = run.app.ask("POST", path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_recommended_ids_can_be_sent_back(run):
    text_of = dict(zip(run.ids, run.texts, strict=True))
    history = [{"item_id": run.texts[:3]}]
    (wanted,) = run.model.recommend([{"item_id": run.ids[:3]}], k=ITEMS, keep_seen=True)
    assert sorted(wanted.items) == sorted(run.ids)
    (found,) = asked(run, "/v1/recommend", histories=history, k=ITEMS, keep_seen=True)["results"]
    assert found["items"] == [text_of[each] for each in wanted.items]
    assert found["unknown"] == 0
    best = found["items"]
    rules = {"exclude": best[:2], "keep_seen": True, "k": ITEMS}
    (left,) = asked(run, "/v1/recommend", histories=history, **rules)["results"]
    assert left["items"] == best[2:]
    rules = {"allow": best[3:5], "keep_seen": True}
    (left,) = asked(run, "/v1/recommend", histories=history, **rules)["results"]
    assert left["items"] == best[3:5]
    for id_, text in zip(run.ids, run.texts, strict=True):
        near = asked(run, "/v1/similar", item=text, k=4)["items"]
        assert near == [text_of[each] for each in run.model.similar(id_, 4).items]


def test_bags_with_one_id_are_read_too(run):
    bags = asked(run, "/v1/encode", histories=[{"item_id": [[text] for text in run.texts]}])
    np.testing.assert_allclose(bags["vectors"], run.model.encode([{"item_id": run.ids}]), atol=1e-6)


def test_items_are_found_and_described(run):
    def found(**query):
        answer = run.app.ask("GET", "/v1/items", params=query)
        assert answer.status_code == 200, answer.text
        return answer.json()["items"]

    for text in run.texts:
        (item,) = found(items=json.dumps([text]))
        assert item["item"] == text
    for text in run.texts[2:]:
        assert text in [each["item"] for each in found(query=text)]
    assert {each["item"] for each in found()} == set(run.texts)
    assert [each["item"] for each in found(items=json.dumps(["abc", 7, *run.texts[::-1]]))] == [
        *run.texts[::-1]
    ]
    assert found(query="nothing has this") == []


def test_columns_of_times_are_shown_and_filtered_as_text(run):
    (item,) = run.app.ask("GET", "/v1/items", params={"items": json.dumps([run.texts[5]])}).json()[
        "items"
    ]
    assert item["made"] == TIMES[5].isoformat()
    rules = {"where": {"made": [item["made"]]}, "keep_seen": True}
    (left,) = asked(run, "/v1/recommend", histories=[{"item_id": []}], **rules)["results"]
    assert left["items"] == [run.texts[5]]


def test_arrow_has_ids_as_in_the_log(run):
    sink = io.BytesIO()
    kind = run.model.items.schema.field("item").type
    table = pa.table({"item_id": pa.array([run.ids[:3]], pa.list_(kind))})
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    headers = {"Content-Type": ARROW, "Accept": ARROW}
    answer = run.app.ask("POST", "/v1/recommend", content=sink.getvalue(), headers=headers)
    assert answer.status_code == 200, answer.text
    found = pa.ipc.open_stream(answer.content).read_all()["items"]
    assert found.type == pa.list_(kind)
    (wanted,) = run.model.recommend(table)
    assert found.to_pylist() == [wanted.items]


def test_what_is_no_time_is_told(run):
    body = {"histories": [{"item_id": []}], "exclude": [run.texts[0], "noon"]}
    answer = run.app.ask("POST", "/v1/recommend", json=body)
    similar = run.app.ask("POST", "/v1/similar", json={"item": "noon"})
    if isinstance(run.ids[0], bytes):
        assert (answer.status_code, similar.status_code) == (200, 404)
    else:
        assert (answer.status_code, similar.status_code) == (400, 400)
        assert answer.json()["error"].startswith("exclude[1]: expected a time such as")
        assert similar.json()["error"].startswith("item: expected a time such as")


def test_an_unknown_id_is_told_as_it_was_asked(run):
    answer = run.app.ask("POST", "/v1/similar", json={"item": "2020-01-01"})
    assert answer.status_code == 404
    assert answer.json()["error"] == "item: expected an item of the export, found '2020-01-01'"


def test_times_that_no_answer_can_hold_are_refused(tmp_path):
    nanoseconds = np.datetime64(NOON, "ns") + np.arange(ITEMS) * np.timedelta64(500, "ns")
    config = trained(tmp_path, list(nanoseconds), pa.timestamp("ns"))
    with pytest.raises(
        UserError, match=r"item_id: .*microseconds, found 2026-01-31 12:00:00\.0000005"
    ):
        export(config, Request(output=tmp_path / "export", index="no"))
    assert not list(tmp_path.glob("export/versions/*"))
