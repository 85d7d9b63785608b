"""Requests made at random from the description of the routes: answers are as described, never a 5xx."""

import json

import hypothesis
import pytest
import schemathesis
import server_process
from fake_model import publish
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi import checks

from s2s_serve.server import openapi


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    directory = tmp_path_factory.mktemp("export")
    publish(directory, 1)
    with (
        server_process.app(directory, max_body=1) as app,
        server_process.in_thread(app.asgi) as address,
    ):
        yield address


schema = schemathesis.openapi.from_dict(json.loads(openapi.document()))


@schemathesis.serializer("application/vnd.apache.arrow.stream")
def bytes_as_they_are(_, content):
    return content if isinstance(content, bytes) else str(content).encode(errors="replace")


CHECKS = [
    not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
    checks.response_headers_conformance,
    checks.negative_data_rejection,
    checks.unsupported_method,
]


@schema.parametrize()
@hypothesis.settings(max_examples=25, deadline=None, derandomize=True, database=None)
def test_answers_are_as_described(case, address):
    case.call_and_validate(base_url=address, checks=CHECKS)


@pytest.mark.parametrize(
    ("method", "path", "body", "query"),
    [
        (
            "POST",
            "/v1/recommend",
            {"histories": [{"item_id": [120, 7, None]}, {"item_id": []}]},
            {},
        ),
        ("POST", "/v1/similar", {"item": 150}, {}),
        ("POST", "/v1/encode", {"histories": [{"item_id": [[120, 121]]}]}, {}),
        ("GET", "/v1/items", None, {"query": "movie"}),
        ("GET", "/v1/card", None, {}),
        ("GET", "/readyz", None, {}),
    ],
)
def test_good_answers_are_as_described(method, path, body, query, address):
    sent = {} if body is None else {"body": body, "media_type": "application/json"}
    case = schema[path][method].Case(query=query, **sent)
    answer = case.call_and_validate(base_url=address, checks=CHECKS)
    assert answer.status_code == 200
