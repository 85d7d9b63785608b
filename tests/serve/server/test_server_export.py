"""The server with a real export: the answers of the client, and no failure whatever a caller sends."""

import asyncio
import datetime
import json
import re
import shutil
import subprocess
import sys

import httpx
import hypothesis
import numpy as np
import pyarrow as pa
import pytest
import server_process
from fake_model import FakeModel, items_table
from hypothesis import strategies as st
from places import REPO
from server_process import until

import s2s_serve
from s2s_serve.errors import UserError
from s2s_serve.manifest import checksum_of
from s2s_serve.server.loading import load

ARROW = "application/vnd.apache.arrow.stream"


@pytest.fixture(scope="module")
def model(small_export):
    return s2s_serve.load(small_export.directory)


@pytest.fixture(scope="module")
def app(small_export):
    with server_process.app(small_export.directory, load=load) as made:
        yield made


def test_answers_are_those_of_the_client(app, model, small_export):
    rules = {"k": 5, "exclude": ["item 3"], "where": {"genre": ["even", "of 1"]}, "keep_seen": True}
    rows = small_export.rows[:20]
    answer = app.ask("POST", "/v1/recommend", json={"histories": rows, **rules})
    assert answer.status_code == 200, answer.text
    expected = model.recommend(rows, **rules)
    for found, wanted in zip(answer.json()["results"], expected, strict=True):
        assert found["items"] == wanted.items
        np.testing.assert_allclose(found["scores"], wanted.scores, rtol=1e-6)
        assert (found["unknown"], found["by"]) == (wanted.unknown, wanted.by)
    assert {each["by"] for each in answer.json()["results"]} == {"model", "popularity"}


def test_requests_that_are_joined_get_the_answers_of_single_ones(app, model, small_export):
    rows = small_export.rows[:30]

    async def together():
        async with app.client() as client:
            asked = [client.post("/v1/recommend", json={"histories": [row]}) for row in rows]
            return await asyncio.gather(*asked)

    before = app.metrics.batch_requests._sum.get()
    answers = asyncio.run(together())
    assert app.metrics.batch_requests._sum.get() - before == 30
    for row, answer in zip(rows, answers, strict=True):
        (wanted,) = model.recommend([row])
        (found,) = answer.json()["results"]
        # Sums of joined histories may be rounded in another order.
        np.testing.assert_allclose(found["scores"], wanted.scores, atol=2e-6)
        assert set(found["items"]) == set(wanted.items)


def test_tables_are_answered_as_lists(app, model, small_export):
    rows = small_export.rows[:10]
    table = pa.Table.from_pylist(rows)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    headers = {"Content-Type": ARROW, "Accept": ARROW}
    content = sink.getvalue().to_pybytes()
    answer = app.ask("POST", "/v1/recommend?k=4", content=content, headers=headers)
    assert answer.status_code == 200, answer.text
    found = pa.ipc.open_stream(answer.content).read_all()
    assert found["items"].to_pylist() == [each.items for each in model.recommend(rows, k=4)]
    answer = app.ask("POST", "/v1/encode", content=content, headers=headers)
    vectors = pa.ipc.open_stream(answer.content).read_all()["vector"].to_pylist()
    np.testing.assert_allclose(vectors, model.encode(rows), atol=1e-6)


def test_times_can_be_text_as_in_iso_8601(app, model, small_export):
    row = small_export.rows[9]
    stamps = [datetime.datetime.fromtimestamp(t, datetime.UTC) for t in row["timestamp"]]
    plain = [each.replace(tzinfo=None).isoformat() for each in stamps]
    east = datetime.timezone(datetime.timedelta(hours=5))
    (wanted,) = model.encode([row])
    for times in (
        plain,
        [t + "Z" for t in plain],
        [t.astimezone(east).isoformat() for t in stamps],
    ):
        asked = {"histories": [{**row, "timestamp": times}]}
        answer = app.ask("POST", "/v1/encode", json=asked)
        assert answer.status_code == 200, answer.text
        np.testing.assert_allclose(answer.json()["vectors"], [wanted], atol=1e-6)
    for wrong in ("noon", "2026-13-01"):
        asked = {"histories": [{**row, "timestamp": [*plain[:-1], wrong]}]}
        answer = app.ask("POST", "/v1/encode", json=asked)
        assert answer.status_code == 400
        place = f"histories[0].timestamp[{len(plain) - 1}]"
        assert answer.json()["error"].startswith(f"{place}: expected a time such as")


def test_similar_items_titles_and_the_card(app, model):
    answer = app.ask("POST", "/v1/similar", json={"item": "item 7", "k": 3}).json()
    assert answer["items"] == model.similar("item 7", 3).items
    unknown = app.ask("POST", "/v1/similar", json={"item": "item 7000"})
    assert unknown.status_code == 404
    assert "item 7000" in unknown.json()["error"]
    assert app.ask("POST", "/v1/similar", json={"item": 7}).status_code == 400
    (found,) = app.ask("GET", "/v1/items", params={"query": "title of 11"}).json()["items"]
    assert (found["item"], found["genre"]) == ("item 11", ["odd", "of 2"])
    card = app.ask("GET", "/v1/card").json()
    assert card["card"] == json.loads(json.dumps(model.card))
    assert card["features"] == list(model.features)


_IDS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=5),
    st.sampled_from(["item 3", "item 4", "1e3", "2020-01-01", ""]),
)
_ENTRIES = st.lists(st.one_of(_IDS, st.lists(_IDS, max_size=3)), max_size=4)
_COLUMNS = st.sampled_from(["item_id", "tags", "timestamp", "hour", "", "other"])
_GOOD = st.integers(0, 4).flatmap(
    lambda events: st.fixed_dictionaries(
        {
            "item_id": st.lists(
                st.sampled_from(["item 1", "item 2", "x", None]), min_size=events, max_size=events
            ),
            "tags": st.lists(
                st.lists(st.integers(-3, 2**63), max_size=5), min_size=events, max_size=events
            ),
            "timestamp": st.lists(
                st.integers(-(2**63), 2**63 - 1), min_size=events, max_size=events
            ),
        }
    )
)
_HISTORIES = st.one_of(_GOOD, st.dictionaries(_COLUMNS, st.one_of(st.none(), _ENTRIES)))
_RULES = st.fixed_dictionaries(
    {},
    optional={
        "k": st.integers(-1, 2000),
        "exclude": st.lists(_IDS, max_size=3),
        "allow": st.lists(st.one_of(_IDS, st.sampled_from(["item 1", "item 2"])), max_size=3),
        "where": st.dictionaries(
            st.sampled_from(["genre", "price", "title", "count", "no"]), st.lists(_IDS, max_size=3)
        ),
        "keep_seen": st.sampled_from([None, True, False]),
    },
)


@hypothesis.given(histories=st.lists(_HISTORIES, max_size=3), rules=_RULES, arrow=st.booleans())
@hypothesis.settings(max_examples=300, derandomize=True, database=None)
def test_whatever_is_sent_never_fails(app, histories, rules, arrow):
    content = json.dumps({"histories": histories, **rules}).encode()
    headers = {"Content-Type": "application/json", **({"Accept": ARROW} if arrow else {})}
    answer = app.ask("POST", "/v1/recommend", content=content, headers=headers)
    hypothesis.event(str(answer.status_code))
    assert answer.status_code in (200, 400), answer.text
    if answer.status_code == 400:
        assert list(answer.json()) == ["error"]
        assert "Traceback" not in answer.text


_ENDS = [0, -1, 2**63 - 1, -(2**63)]
_LEAVES = [
    pa.array(["item 1", "", None, "x" * 300]),
    pa.array(["item 1", "12", None, "2020-01-01"], pa.large_string()),
    pa.array([0, 1, None, 255], pa.uint8()),
    pa.array([0, 2**64 - 1, None, 2**63], pa.uint64()),
    pa.array(_ENDS),
    pa.array([0.5, float("nan"), None, 1e300]),
    pa.array([0.5, float("inf"), None, 0], pa.float32()),
    *(pa.array(_ENDS).cast(pa.timestamp(unit)) for unit in ("s", "ms", "us", "ns")),
    pa.array(_ENDS).cast(pa.timestamp("us", "UTC")),
    pa.array([0, -(2**31), None, 2**31 - 1], pa.date32()),
    pa.array(_ENDS).view(pa.date64()),
]


@pytest.mark.parametrize("leaf", _LEAVES, ids=lambda leaf: str(leaf.type))
@pytest.mark.parametrize("bags", [False, True])
@pytest.mark.parametrize("large", [False, True])
def test_whatever_table_is_sent_never_fails(app, leaf, bags, large):
    good = {
        "item_id": pa.array([["item 1", "x"], ["item 2", None]]),
        "tags": pa.array([[[1], []], [None, [2, 3]]]),
        "timestamp": pa.array([[1, 2], [3, 4]]),
    }
    lists = pa.LargeListArray if large else pa.ListArray
    entries = lists.from_arrays([0, 1, 2, 2, 4], leaf) if bags else leaf
    odd = lists.from_arrays([0, 2, 4], entries)
    for column in good:
        table = pa.table({**good, column: odd})
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        content = sink.getvalue().to_pybytes()
        answer = app.ask("POST", "/v1/recommend", content=content, headers={"Content-Type": ARROW})
        assert answer.status_code in (200, 400), (column, answer.text)


@hypothesis.given(item=_IDS, k=st.integers(0, 50))
@hypothesis.settings(max_examples=50, derandomize=True, database=None)
def test_whatever_item_is_asked_never_fails(app, item, k):
    content = json.dumps({"item": item, "k": k}).encode()
    headers = {"Content-Type": "application/json"}
    answer = app.ask("POST", "/v1/similar", content=content, headers=headers)
    assert answer.status_code in (200, 400, 404), answer.text


@pytest.mark.parametrize("command", [["s2s_serve"], ["s2s_jax", "serve"]], ids=lambda c: c[0])
def test_the_command_serves_an_export_until_a_signal(small_export, model, command):
    started = subprocess.Popen(
        [sys.executable, "-m", *command, str(small_export.directory), "--port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(REPO)},
    )
    try:
        assert started.stdout is not None
        line = started.stdout.readline()
        place = re.fullmatch(r"version 1 of (.*) answers at (http://127\.0\.0\.1:\d+)\n", line)
        assert place is not None, line
        assert place[1] == str(small_export.directory)
        row = small_export.rows[9]
        answer = httpx.post(f"{place[2]}/v1/recommend", json={"histories": [row]}, timeout=20)
        assert answer.json()["results"][0]["items"] == model.recommend([row])[0].items
        started.terminate()
        out, err = started.communicate(timeout=20)
    finally:
        started.kill()
    assert (started.returncode, out, err) == (0, "", "")


def test_a_directory_without_an_export_is_told(tmp_path):
    words = [sys.executable, "-m", "s2s_serve", str(tmp_path), "--port", "0"]
    env = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(REPO)}
    ended = subprocess.run(words, capture_output=True, text=True, env=env, check=False, timeout=60)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith(f"error: {tmp_path}/current.json: expected the number")
    assert ended.stderr.count("\n") == 1


def test_a_version_that_cannot_answer_is_refused(monkeypatch, tmp_path):
    class Broken(FakeModel):
        items = items_table()

        def recommend(self, histories, **rules):
            raise UserError("tower.onnx: no")

    monkeypatch.setattr(s2s_serve, "load", lambda *_, **__: Broken())
    with pytest.raises(UserError, match=r"tower.onnx: no"):
        load(tmp_path)


def test_a_damaged_new_version_is_refused_by_name(small_export, tmp_path):
    directory = tmp_path / "export"
    shutil.copytree(small_export.directory, directory)
    with server_process.app(directory, load=load) as app:
        newer = directory / "versions" / "2"
        shutil.copytree(directory / "versions" / "1", newer)
        manifest = json.loads((newer / "manifest.json").read_text()) | {"version": 2}
        manifest["checksum"] = checksum_of(manifest)
        (newer / "manifest.json").write_text(json.dumps(manifest))
        whole = (newer / "vectors.safetensors").read_bytes()
        (newer / "vectors.safetensors").write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        beside = directory / "current.tmp"
        beside.write_text('{"version": 2}')
        beside.rename(directory / "current.json")
        until(lambda: app.versions.failure)
        assert "vectors.safetensors" in app.versions.failure
        assert app.ask("GET", "/readyz").json()["version"] == 1
        # Repaired, and named again.
        (newer / "vectors.safetensors").write_bytes(whole)
        beside.write_text('{"version": 2}')
        beside.rename(directory / "current.json")
        until(lambda: app.model.version == 2)
