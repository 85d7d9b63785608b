"""The description of all routes, for /openapi.json; the schemas of bodies are made from `schema`."""

import msgspec

from s2s_serve.server import schema
from s2s_serve.server.reading import ARROW, JSON

Part = dict[str, object]

_ANSWERS = (
    schema.RecommendRequest,
    schema.RecommendAnswer,
    schema.SimilarRequest,
    schema.SimilarAnswer,
    schema.EncodeRequest,
    schema.EncodeAnswer,
    schema.ItemsAnswer,
    schema.CardAnswer,
    schema.Health,
    schema.Readiness,
    schema.Mistake,
)
_REF = "#/components/schemas/{name}"
_PROBLEMS = {
    "400": "The request is wrong",
    "401": "The token is missing or wrong",
    "404": "There is no such item",
    "408": "The body did not arrive in time",
    "413": "The body is too large",
    "415": "The body has another content type",
    "503": "No version is loaded, too many requests wait, or the model took too long; try again",
}
_OF_BODY = ("400", "401", "408", "413", "415", "503")


def document() -> bytes:
    """The description as JSON."""
    _, components = msgspec.json.schema_components(
        _ANSWERS, schema_hook=_anything, ref_template=_REF
    )
    for each in components.values():
        # The docstring says what a struct is.
        each.pop("title", None)
    found = {
        "openapi": "3.1.0",
        "info": {
            "title": "s2s_serve",
            "version": "1",
            "description": "Next-item recommendation from an export of s2s_jax",
        },
        "paths": {**_of_model(), **_of_server()},
        "components": {
            "schemas": components,
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
        # No token is needed where the server has none.
        "security": [{}, {"token": []}],
    }
    return msgspec.json.encode(found)


def _anything(_: type) -> Part:
    """The schema of `object`: the columns of items and the card can hold anything."""
    return {"description": "Any value"}


def _of_model() -> Part:
    """The routes that a model answers."""
    arrow: Part = {ARROW: {"schema": {"type": "string", "format": "binary"}}}
    return {
        "/v1/recommend": {
            "post": {
                "summary": "The best items for each history",
                "description": "exclude, allow and where may have up to --max_rule_values ids and "
                "values together, which is an option of the server. "
                "A body in Arrow is a table of histories with a column of lists for "
                "each column of the log; the other fields are then query parameters. "
                f"With Accept: {ARROW}, the answer is a table with items, scores, unknown and by.",
                "parameters": _rules(),
                "requestBody": _body("RecommendRequest", arrow),
                "responses": _responses("RecommendAnswer", _OF_BODY, arrow),
            }
        },
        "/v1/similar": {
            "post": {
                "summary": "The items nearest to one",
                "requestBody": _body("SimilarRequest", {}),
                "responses": _responses("SimilarAnswer", ("404", *_OF_BODY), {}),
            }
        },
        "/v1/encode": {
            "post": {
                "summary": "The vector of each history",
                "requestBody": _body("EncodeRequest", arrow),
                "responses": _responses("EncodeAnswer", _OF_BODY, arrow),
            }
        },
        "/v1/items": {
            "get": {
                "summary": "Items by text, or the columns of some items",
                "parameters": _of_items(),
                "responses": _responses("ItemsAnswer", ("400", "401", "503"), {}),
            }
        },
        "/v1/card": {
            "get": {
                "summary": "What is known about the model",
                "responses": _responses("CardAnswer", ("401", "503"), {}),
            }
        },
    }


def _of_server() -> Part:
    """The routes about the server."""
    return {
        "/healthz": {"get": _open("The process answers", _responses("Health", (), {}))},
        "/readyz": {
            "get": _open(
                "Whether requests are answered",
                {**_responses("Readiness", (), {}), "503": _response("Not yet", "Readiness")},
            )
        },
        "/metrics": {
            "get": {
                "summary": "Metrics in the text format of Prometheus",
                "responses": {
                    "200": {
                        "description": "Metrics",
                        "content": {"text/plain": {"schema": {"type": "string"}}},
                    },
                    "401": _problem("401"),
                },
            }
        },
    }


def _rules() -> list[Part]:
    """The query parameters of a body in Arrow, which are the fields of `schema.Rules`."""
    _, components = msgspec.json.schema_components([schema.Rules], ref_template=_REF)
    fields = components["Rules"]["properties"]
    return [
        {"name": name, "in": "query", "required": False, "content": {JSON: {"schema": field}}}
        for name, field in fields.items()
    ]


def _of_items() -> list[Part]:
    ids = {"type": "array", "items": {"anyOf": [{"type": "integer"}, {"type": "string"}]}}
    return [
        {
            "name": "query",
            "in": "query",
            "description": "The beginning of an id, or a part of a title",
            "schema": {"type": "string", "default": ""},
        },
        {
            "name": "items",
            "in": "query",
            "description": "Ids to describe, as JSON, instead of a query",
            "content": {JSON: {"schema": ids}},
        },
        {
            "name": "limit",
            "in": "query",
            "description": "Most items",
            "schema": {"type": "integer", "minimum": 1, "maximum": 100, "default": 20},
        },
    ]


def _open(summary: str, responses: Part) -> Part:
    """A route that needs no token."""
    return {"summary": summary, "security": [], "responses": responses}


def _body(name: str, arrow: Part) -> Part:
    return {"required": True, "content": {**_json(name), **arrow}}


def _responses(name: str, problems: tuple[str, ...], arrow: Part) -> Part:
    done = _response("The answer", name)
    done["content"] = {**_json(name), **arrow}
    return {"200": done, **{status: _problem(status) for status in sorted(problems)}}


def _response(text: str, name: str) -> Part:
    return {"description": text, "content": _json(name)}


def _problem(status: str) -> Part:
    found = _response(_PROBLEMS[status], "Mistake")
    if status == "503":
        seconds = {"description": "Seconds to wait", "schema": {"type": "integer"}}
        found["headers"] = {"Retry-After": seconds}
    return found


def _json(name: str) -> Part:
    return {JSON: {"schema": {"$ref": _REF.format(name=name)}}}
