"""The routes: answers, metrics, the token, and one sentence for each mistake of a caller."""

import json
import typing

import numpy as np
import pyarrow as pa
import pytest
import server_process
from fake_model import ITEMS, publish

import s2s_serve

JSON = "application/json"
ARROW = "application/vnd.apache.arrow.stream"


@pytest.fixture(scope="module")
def app(tmp_path_factory):
    directory = tmp_path_factory.mktemp("export")
    publish(directory, 1)
    limits = {"max_histories": 4, "max_events": 6, "max_k": 50, "max_body": 1}
    limits["max_rule_values"] = 20
    with server_process.app(directory, **limits) as made:
        yield made


def stream(table, options=None):
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema, options=options) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def post(app, path, content, kind=JSON, accept=JSON, **more):
    content = content if isinstance(content, bytes) else json.dumps(content).encode()
    headers = {"Content-Type": kind, "Accept": accept}
    return app.ask("POST", path, content=content, headers=headers, **more)


# ------------------------------------------------------------------------------- answers


def test_recommend_answers_each_history(app):
    histories = [{"item_id": [120]}, {"item_id": []}, {"item_id": [7, [130, 131], None]}]
    asked = {"histories": histories, "k": 2, "exclude": [121], "allow": [122, 123, 132, 100]}
    answer = post(app, "/v1/recommend", asked)
    assert answer.status_code == 200
    assert answer.json() == {
        "version": 1,
        "results": [
            {"items": [122, 123], "scores": [1.5, 1 + 1 / 3], "unknown": 0, "by": "model"},
            {"items": [100, 122], "scores": [1.5, 1 + 1 / 3], "unknown": 0, "by": "popularity"},
            {"items": [132, 100], "scores": [1.5, 1 + 1 / 3], "unknown": 1, "by": "model"},
        ],
    }


def test_similar_and_encode(app):
    answer = post(app, "/v1/similar", {"item": 150, "k": 2})
    assert answer.json() == {"version": 1, "items": [149, 151], "scores": [0.99, 0.99]}
    answer = post(app, "/v1/encode", {"histories": [{"item_id": [1, 2]}, {"item_id": []}]})
    assert answer.json() == {"version": 1, "vectors": [[2, 1], [0, 1]]}


@pytest.mark.parametrize("large", [False, True])
def test_arrow_in_and_out(app, large):
    lists = pa.large_list if large else pa.list_
    column = pa.array([[120], None, [7, 131, 130]], lists(pa.int64()))
    query = {"k": "2", "exclude": "[121]", "keep_seen": "true"}
    answer = post(
        app, "/v1/recommend", stream(pa.table({"item_id": column})), ARROW, ARROW, params=query
    )
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == ARROW
    found = pa.ipc.open_stream(answer.content).read_all()
    assert found.schema.metadata == {b"version": b"1"}
    assert found.schema.types[:2] == [pa.list_(pa.int64()), pa.list_(pa.float32())]
    assert found["items"].to_pylist() == [[122, 123], [100, 101], [131, 132]]
    assert found["unknown"].to_pylist() == [0, 0, 1]
    assert found["by"].to_pylist() == ["model", "popularity", "model"]


def test_arrow_in_and_json_out_and_the_reverse(app):
    table = pa.table({"item_id": [[120]]})
    answer = post(app, "/v1/recommend", stream(table), ARROW, params={"k": "1"})
    assert answer.json()["results"][0]["items"] == [121]
    answer = post(app, "/v1/encode", {"histories": [{"item_id": [1, 2]}]}, accept=ARROW)
    found = pa.ipc.open_stream(answer.content).read_all()
    np.testing.assert_array_equal(found["vector"].to_pylist(), [[2, 1]])


def test_answers_without_items_keep_their_type(app):
    table = pa.table({"item_id": [[120]]})
    answer = post(app, "/v1/recommend", stream(table), ARROW, ARROW, params={"allow": "[]"})
    found = pa.ipc.open_stream(answer.content).read_all()
    assert found.schema.field("items").type == pa.list_(pa.int64())
    assert found["items"].to_pylist() == [[]]


def test_items_are_found_by_the_beginning_of_an_id_and_a_part_of_a_title(app):
    def found(**query):
        return [each["item"] for each in app.ask("GET", "/v1/items", params=query).json()["items"]]

    assert found(query="15", limit=3) == [115, 150, 151]
    assert found(query="amé") == [101]
    assert found(query="MOVIE 19") == list(range(190, 200))
    assert found(limit=2) == ITEMS[:2]
    assert found(query="nothing has this") == []
    assert found(items='[150, 7, 120, "150", 99999999999999999999]') == [150, 120]


@pytest.mark.parametrize(
    "limit", ["0", "101", "-1", "x", "", "²", "00000000199999", "000000001" + 5000 * "0"]
)
def test_a_wrong_limit_is_told(app, limit):
    answer = app.ask("GET", "/v1/items", params={"limit": limit})
    assert answer.status_code == 400
    assert answer.json()["error"] == f"limit: expected 1 to 100, found {limit[:40]}".strip()


def test_what_ranks_is_described_as_the_client_answers(app):
    fields = app.ask("GET", "/openapi.json").json()["components"]["schemas"]["Recommendation"]
    known = typing.get_args(typing.get_type_hints(s2s_serve.Recommendation)["by"])
    assert fields["properties"]["by"]["enum"] == sorted(known)


def test_the_card_and_the_states(app):
    card = app.ask("GET", "/v1/card").json()
    assert card["features"] == ["item_id", "cate"]
    assert (card["card"]["items"], card["title"]) == (100, "title")
    assert card["columns"] == ["count", "trained", "title", "cate"]
    assert app.ask("GET", "/healthz").json() == {"alive": True}
    assert app.ask("GET", "/readyz").json() == {"ready": True, "version": 1, "failure": None}


def test_metrics_count_what_happened(tmp_path):
    publish(tmp_path, 3)
    with server_process.app(tmp_path) as app:
        post(app, "/v1/recommend", {"histories": [{"item_id": [1, 2, 120]}, {"item_id": []}]})
        post(app, "/v1/recommend", b"no")
        app.ask("GET", "/some/thing")
        answer = app.ask("GET", "/metrics")
        assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
        lines = answer.text.splitlines()
    for line in (
        's2s_serve_requests_total{route="/v1/recommend",status="200"} 1.0',
        's2s_serve_requests_total{route="/v1/recommend",status="400"} 1.0',
        's2s_serve_requests_total{route="other",status="404"} 1.0',
        's2s_serve_request_seconds_count{route="/v1/recommend"} 2.0',
        "s2s_serve_batch_histories_sum 2.0",
        "s2s_serve_batch_requests_count 1.0",
        "s2s_serve_unknown_events_total 2.0",
        's2s_serve_answers_total{by="popularity"} 1.0',
        "s2s_serve_model_version 3.0",
        's2s_serve_reloads_total{result="loaded"} 1.0',
        's2s_serve_reloads_total{result="failed"} 0.0',
    ):
        assert line in lines


# ------------------------------------------------------------------------------- mistakes

ONE = {"histories": [{"item_id": [120]}]}
DEEP = b'{"histories":[{"item_id":' + b"[" * 50_000
MISTAKES = [
    (b"no", "body: expected JSON"),
    (b"", "body: expected JSON"),
    (b"\xff", "body: expected JSON"),
    (b"[]", "body: expected object, found array"),
    (b"{}", "body: object missing required field histories"),
    (b'{"histories":[{"item_id":[NaN]}]}', "body: expected JSON"),
    (b'{"histories":[{"item_id":[1e999]}]}', "number out of range"),
    (b'{"histories":[{"item_id":["\\ud800"]}]}', "body: expected JSON"),
    (DEEP, "histories[0][...][0][0]: expected int or float or str or null, found array"),
    ({"histories": []}, "histories: expected array of length >= 1"),
    ({"histories": 1}, "histories: expected array, found int"),
    ({"histories": [{"item_id": 1}]}, "expected array or null, found int"),
    ({"histories": [{"item_id": [{}]}]}, "histories[0][...][0]: expected"),
    ({"histories": [{"item_id": [True]}]}, "found bool"),
    ({"histories": [{"cate": [1]}]}, "histories: row 0 has no item_id"),
    ({**ONE, "histories": ONE["histories"] * 5}, "histories: expected at most 4, found 5"),
    ({"histories": [{}, {"item_id": [1] * 7}]}, "histories[1].item_id: expected at most 6 events"),
    ({**ONE, "k": 0}, "k: expected int >= 1"),
    ({**ONE, "k": -1}, "k: expected int >= 1"),
    ({**ONE, "k": 51}, "k: expected at most 50, found 51"),
    ({**ONE, "k": 10**30}, "k: expected at most 50, found 1000"),
    ({**ONE, "k": 1.5}, "k: expected int, found float"),
    ({**ONE, "k": "1"}, "k: expected int, found str"),
    ({**ONE, "top": 1}, "body: object contains unknown field top"),
    ({**ONE, "exclude": 1}, "exclude: expected array or null, found int"),
    (
        {**ONE, "exclude": [2**64]},
        "exclude: expected integers of 64 bits, found 18446744073709551616",
    ),
    (
        {**ONE, "exclude": [1] * 8, "allow": [2] * 8, "where": {"genre": [3] * 4, "colour": []}},
        "exclude, allow and where: expected at most 20 ids and values, found 21",
    ),
    ({**ONE, "exclude": [1] * 21}, "expected at most 20 ids and values, found 21"),
    ({**ONE, "allow": ["x"] * 21}, "expected at most 20 ids and values, found 21"),
    ({**ONE, "where": {"genre": [1] * 21}}, "expected at most 20 ids and values, found 21"),
    ({**ONE, "allow": [-(2**63) - 1]}, "allow: expected integers of 64 bits"),
    ({**ONE, "where": {"genre": [2**70]}}, "where.genre: expected integers of 64 bits"),
    ({**ONE, "where": {"colour": [1]}}, "where: expected genre, found colour"),
    ({**ONE, "where": [1]}, "where: expected object or null, found array"),
]


def test_as_many_ids_in_rules_as_allowed_are_answered(app):
    rules = {"exclude": [121] * 9, "allow": [121, 122] * 5, "where": {"genre": [1]}}
    (result,) = post(app, "/v1/recommend", {**ONE, **rules}).json()["results"]
    assert result["items"] == [122]
    many = {"exclude": json.dumps([121] * 21)}
    answer = post(app, "/v1/recommend", stream(pa.table({"item_id": [[120]]})), ARROW, params=many)
    assert (answer.status_code, "at most 20" in answer.json()["error"]) == (400, True)


@pytest.mark.parametrize(("body", "sentence"), MISTAKES, ids=lambda each: str(each)[:40])
def test_a_mistake_is_one_sentence(app, body, sentence):
    answer = post(app, "/v1/recommend", body)
    assert answer.status_code == 400, answer.text
    assert list(answer.json()) == ["error"]
    assert sentence in answer.json()["error"]
    assert "\n" not in answer.json()["error"]
    assert len(answer.json()["error"]) < 320


def test_other_statuses(app):
    def status(method, path, **request):
        answer = app.ask(method, path, **request)
        assert list(answer.json()) == ["error"]
        return answer.status_code

    assert status("GET", "/nothing") == 404
    assert status("POST", "/v1/recommend/") == 404
    assert status("GET", "/v1/recommend") == 405
    assert status("DELETE", "/v1/similar") == 405
    assert status("OPTIONS", "/v1/recommend") == 405
    allowed = app.ask("PUT", "/v1/card").headers["allow"]
    assert sorted(allowed.split(", ")) == ["GET", "HEAD"]
    plain = {"content": b"{}", "headers": {"Content-Type": "text/plain"}}
    assert status("POST", "/v1/recommend", **plain) == 415
    assert status("POST", "/v1/recommend", content=b"{}") == 415
    assert status("POST", "/v1/similar", content=b"", headers={"Content-Type": ARROW}) == 415
    packed = {"content": b"{}", "headers": {"Content-Type": JSON, "Content-Encoding": "gzip"}}
    assert status("POST", "/v1/recommend", **packed) == 415
    assert status("GET", "/v1/items?limit=0") == 400
    assert status("GET", "/v1/items?limit=x") == 400
    assert status("GET", "/v1/items?limit=²") == 400
    assert status("GET", "/v1/items?items=1") == 400
    assert status("GET", f"/v1/items?items={list(range(1001))}") == 400


def test_rules_beside_a_body_in_json_are_refused(app):
    answer = post(app, "/v1/recommend?k=5", {"histories": [{"item_id": [120]}]})
    assert answer.status_code == 400
    assert answer.json()["error"] == "k: expected in the body, found a query parameter"


def test_a_body_that_is_too_large_is_not_read(app):
    assert post(app, "/v1/recommend", b" " * (2**20 + 1)).status_code == 413
    sent = []

    async def parts():
        for number in range(100):
            sent.append(number)
            yield b" " * 2**17

    # Without a length that could be believed.
    answer = app.ask("POST", "/v1/recommend", content=parts(), headers={"Content-Type": JSON})
    assert answer.status_code == 413
    assert len(sent) < 12


def test_an_unknown_item_is_404(app):
    for item in (7, -1):
        answer = post(app, "/v1/similar", {"item": item})
        assert answer.status_code == 404
        assert answer.json()["error"] == f"item: expected an item of the export, found {item!r}"
    assert post(app, "/v1/similar", {"item": "150"}).status_code == 400
    assert post(app, "/v1/similar", {"item": 2**64}).status_code == 400
    assert post(app, "/v1/similar", {"item": 150, "k": 51}).status_code == 400


ZSTD = pa.ipc.IpcWriteOptions(compression="zstd")
DICTIONARY = pa.ListArray.from_arrays([0, 1], pa.array(["a"]).dictionary_encode())
GOOD = pa.table({"item_id": [[120, 121]]})


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "expected a stream of Arrow"),
        (b"no", "expected a stream of Arrow"),
        (stream(GOOD)[:200], "expected a stream of Arrow"),
        (stream(GOOD, ZSTD), "without compression"),
        (stream(pa.table({"item_id": [120]})), "item_id: expected lists of ids"),
        (stream(pa.table({"item_id": [[True]]})), "item_id: expected lists of ids"),
        (stream(pa.table({"item_id": [{"a": 1}]})), "item_id: expected lists of ids"),
        (stream(pa.table({"item_id": [[[[1]]]]})), "item_id: expected lists of ids"),
        (stream(pa.table({"item_id": DICTIONARY})), "without dictionaries"),
        (stream(pa.table({"item_id": [[1]] * 5})), "expected at most 4 rows"),
        (stream(pa.table({"item_id": [[1] * 7]})), "item_id: expected at most 6 events"),
        (stream(GOOD.slice(0, 0)), "expected at least one row"),
        (stream(pa.table({})), "expected columns"),
    ],
)
def test_a_wrong_table_is_one_sentence(app, content, sentence):
    answer = post(app, "/v1/recommend", content, ARROW)
    assert answer.status_code == 400
    assert sentence in answer.json()["error"]


def test_few_bytes_that_claim_many_rows_are_refused(app):
    empty = pa.RecordBatch.from_struct_array(pa.array([{}] * 10**6, pa.struct([])))
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, empty.schema) as writer:
        writer.write_batch(empty)
    answer = post(app, "/v1/recommend", sink.getvalue().to_pybytes(), ARROW)
    assert answer.status_code == 400


@pytest.mark.parametrize("wrong", [[0, 5, 3, 7], [0, 2, 4, 1000], [-4, 2, 4, 7]])
def test_lists_that_lie_outside_of_their_bytes_are_refused(app, wrong):
    good = stream(pa.table({"item_id": [[1] * 2, [1] * 2, [1] * 3]}))
    offsets = np.array([0, 2, 4, 7], np.int32).tobytes()
    assert good.count(offsets) == 1
    damaged = good.replace(offsets, np.array(wrong, np.int32).tobytes())
    answer = post(app, "/v1/recommend", damaged, ARROW)
    assert answer.status_code == 400
    # Not because of a limit, which can be set higher.
    assert answer.json()["error"].startswith("body: expected a stream of Arrow")


def test_damaged_arrow_is_refused_and_never_harms(app):
    good = bytearray(stream(pa.table({"item_id": [[120, 121], [130]], "cate": [[1, 2], [3]]})))
    random = np.random.default_rng(0)
    statuses = set()
    for _ in range(400):
        damaged = bytearray(good)
        for place in random.integers(len(good), size=random.integers(1, 4)):
            damaged[place] = random.integers(256)
        statuses.add(post(app, "/v1/recommend", bytes(damaged), ARROW).status_code)
    assert statuses == {200, 400}


@pytest.mark.parametrize(
    ("query", "sentence"),
    [
        ("k=x", "k: expected JSON"),
        ("k=", "k: expected JSON"),
        ("k=1&k=2", "k: expected one query parameter, found several"),
        ("k=0", "k: expected int >= 1"),
        ("k=51", "k: expected at most 50"),
        ("top=1", "unknown field top"),
        ("exclude=120", "exclude: expected array or null, found int"),
        ("where=%ff", "where: expected JSON"),
        ("k=1}", "k: expected JSON"),
    ],
)
def test_wrong_query_parameters_are_told(app, query, sentence):
    answer = post(app, f"/v1/recommend?{query}", stream(GOOD), ARROW)
    assert answer.status_code == 400
    assert sentence in answer.json()["error"]


# ------------------------------------------------------------------------------- the token


def test_a_token_is_needed_for_all_that_shows_the_model(tmp_path):
    publish(tmp_path, 1)
    with server_process.app(tmp_path, token="secret é") as app:
        for path in ("/", "/page.js", "/page.css", "/healthz", "/readyz"):
            assert app.ask("GET", path).status_code == 200
        for path in ("/v1/card", "/v1/items", "/metrics", "/openapi.json", "/nothing"):
            answer = app.ask("GET", path)
            assert answer.status_code == 401
            assert answer.headers["www-authenticate"] == "Bearer"
            assert list(answer.json()) == ["error"]
        wrong = ["secret é", "Bearer ", "Bearer secret", "Bearer secret éx", "Basic secret é"]
        for given in wrong:
            headers = {"Authorization": given.encode()}
            assert app.ask("GET", "/v1/card", headers=headers).status_code == 401
        headers = {"Authorization": "Bearer secret é".encode()}
        assert app.ask("GET", "/v1/card", headers=headers).status_code == 200
        # Refused before the body is looked at.
        assert app.ask("POST", "/v1/recommend", content=b"no").status_code == 401


def test_the_page_can_run_no_script_but_its_own(app):
    answer = app.ask("GET", "/")
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["content-type"].startswith("text/html")
