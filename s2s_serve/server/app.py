"""The routes of the server."""

import asyncio
import functools
import hmac
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Executor
from pathlib import Path

import msgspec
import numpy as np
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from s2s_serve.errors import UnknownItemError, UserError
from s2s_serve.json_values import to_json
from s2s_serve.server import openapi, reading, schema, tables
from s2s_serve.server.batching import Answer, Batcher, Call, FullError, LateError
from s2s_serve.server.loading import Served
from s2s_serve.server.metrics import CONTENT_TYPE, Metrics
from s2s_serve.server.protocol import Histories, Id, Model
from s2s_serve.server.reading import ARROW, JSON, RefusedError
from s2s_serve.server.reloading import Versions
from s2s_serve.server.settings import Settings

_PAGE = Path(__file__).parent / "page"
_FILES = {
    "/": ("page.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
}
# Without a token, since browsers and probes cannot send one. They show nothing of the model.
_OPEN = {*_FILES, "/healthz", "/readyz"}
_OF_FILES = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
_MOST_FOUND = 100
_RETRY = {"Retry-After": "1"}


class Routes:
    """The answers to requests, from the version that is loaded."""

    def __init__(
        self,
        versions: Versions,
        batcher: Batcher,
        lookups: Executor,
        metrics: Metrics,
        settings: Settings,
    ) -> None:
        self._versions = versions
        self._batcher = batcher
        self._metrics = metrics
        self._settings = settings
        self._lookups = lookups

    async def recommend(self, request: Request) -> Response:
        """POST /v1/recommend."""
        self._served()
        kind = reading.content_type(request, (JSON, ARROW))
        body = await reading.body_of(request, self._settings)
        histories: Histories
        rules = reading.rules_of_query(request, kind)
        if kind == ARROW:
            histories = reading.table_of(body, self._settings)
        else:
            asked = reading.from_json(body, schema.RecommendRequest)
            rules, histories = _rules_of(asked), self._checked(asked.histories)
        reading.check_rules(rules, self._settings)
        item = self._served().items.item_type
        exclude = reading.item_ids("exclude", rules.exclude, item)
        allow = reading.item_ids("allow", rules.allow, item)
        key = None if kind == ARROW else b"recommend" + msgspec.json.encode(rules)
        answer = await self._run(
            functools.partial(_recommend, rules, exclude, allow), histories, key
        )
        for each in answer.results:
            self._metrics.answers.labels(each.by).inc()
            self._metrics.unknown.inc(each.unknown)
        if reading.wants_arrow(request):
            item = answer.served.items.item_type
            return _arrow(tables.recommendations(answer.results, _version(answer), item))
        results = [
            schema.Recommendation(_ids_in_json(r.items), list(r.scores), r.unknown, r.by)
            for r in answer.results
        ]
        return _json(schema.RecommendAnswer(_version(answer), results))

    async def similar(self, request: Request) -> Response:
        """POST /v1/similar."""
        self._served()
        reading.content_type(request, (JSON,))
        body = await reading.body_of(request, self._settings)
        asked = reading.from_json(body, schema.SimilarRequest)
        reading.check_k(asked.k, self._settings)
        reading.check_integers("item", [asked.item])
        item = reading.item_id("item", asked.item, self._served().items.item_type)
        try:
            answer = await self._run(functools.partial(_similar, item, asked.k), [{}], None)
        except UnknownItemError:
            # In the words of the request: the model was given a time or bytes.
            sentence = f"item: expected an item of the export, found {asked.item!r:.60}"
            raise RefusedError(404, sentence) from None
        (found,) = answer.results
        items = _ids_in_json(found.items)
        return _json(schema.SimilarAnswer(_version(answer), items, list(found.scores)))

    async def encode(self, request: Request) -> Response:
        """POST /v1/encode."""
        self._served()
        kind = reading.content_type(request, (JSON, ARROW))
        body = await reading.body_of(request, self._settings)
        histories: Histories
        if kind == ARROW:
            histories = reading.table_of(body, self._settings)
        else:
            asked = reading.from_json(body, schema.EncodeRequest)
            histories = self._checked(asked.histories)
        answer = await self._run(_encode, histories, None if kind == ARROW else b"encode")
        vectors_NE = np.asarray(answer.results)
        if reading.wants_arrow(request):
            return _arrow(tables.vectors(vectors_NE, _version(answer)))
        return _json(schema.EncodeAnswer(_version(answer), vectors_NE.tolist()))

    async def items(self, request: Request) -> Response:
        """GET /v1/items."""
        served = self._served()
        query = request.query_params
        limit = query["limit"] if "limit" in query else "20"
        # Few digits, because Python refuses to read very many.
        is_short = limit.isascii() and limit.isdigit() and len(limit) <= len(str(_MOST_FOUND))
        if not is_short or not 1 <= int(limit) <= _MOST_FOUND:
            raise RefusedError(400, f"limit: expected 1 to {_MOST_FOUND}, found {limit[:40]}")
        text = query["query"] if "query" in query else ""
        if "items" in query:
            ids = _ids_of(query["items"])
            work = functools.partial(served.items.describe, ids)
        else:
            work = functools.partial(served.items.search, text.strip(), int(limit))
        try:
            async with asyncio.timeout(self._settings.timeout):
                found = await asyncio.get_running_loop().run_in_executor(self._lookups, work)
        except TimeoutError:
            raise RefusedError(503, "too many searches wait; try again", _RETRY) from None
        return _json(schema.ItemsAnswer(served.model.version, found))

    async def card(self, _: Request) -> Response:
        """GET /v1/card."""
        served = self._served()
        found = schema.CardAnswer(
            version=served.model.version,
            features=list(served.model.features),
            columns=list(served.items.columns),
            title=served.items.title,
            card=dict(served.model.card),
        )
        return _json(found)

    async def health(self, _: Request) -> Response:
        """GET /healthz."""
        return _json(schema.Health(alive=True))

    async def readiness(self, _: Request) -> Response:
        """GET /readyz."""
        served = self._versions.served
        version = None if served is None else served.model.version
        found = schema.Readiness(served is not None, version, self._versions.failure)
        return _json(found, 200 if found.ready else 503)

    async def metrics(self, _: Request) -> Response:
        """GET /metrics."""
        return Response(self._metrics.text(), headers={"Content-Type": CONTENT_TYPE})

    def _served(self) -> Served:
        served = self._versions.served
        if served is None:
            raise RefusedError(503, "the model is being loaded; try again", _RETRY)
        return served

    def _checked(self, histories: list[dict[str, list[schema.Entry] | None]]) -> Histories:
        """The histories of a body in JSON, as the model reads them."""
        reading.check_histories(histories, self._settings)
        served = self._served()
        if served.bytes_column is not None:
            histories = reading.with_bytes(histories, served.bytes_column, served.items.item_type)
        return reading.with_times(histories, served.time_columns)

    async def _run(self, call: Call, histories: Histories, key: bytes | None) -> Answer:
        try:
            return await self._batcher.run(call, histories, key, self._settings.timeout)
        except FullError:
            raise RefusedError(503, "too many requests wait; try again", _RETRY) from None
        except LateError:
            sentence = f"the model did not answer within {self._settings.timeout:g} s; try again"
            raise RefusedError(503, sentence, _RETRY) from None


def make_app(
    versions: Versions,
    batcher: Batcher,
    lookups: Executor,
    metrics: Metrics,
    settings: Settings,
    token: str | None,
) -> ASGIApp:
    """The server as an ASGI application.

    Args:
      versions: gives the version that answers.
      batcher: calls it.
      lookups: searches titles; not the threads of the model, so that it delays no recommendation.
      metrics: counts requests.
      settings: the limits.
      token: what callers must send; None: nothing.
    """
    routes = Routes(versions, batcher, lookups, metrics, settings)
    description = openapi.document()

    async def described(_: Request) -> Response:
        return Response(description, media_type=JSON)

    paths = [
        Route("/v1/recommend", routes.recommend, methods=["POST"]),
        Route("/v1/similar", routes.similar, methods=["POST"]),
        Route("/v1/encode", routes.encode, methods=["POST"]),
        Route("/v1/items", routes.items),
        Route("/v1/card", routes.card),
        Route("/healthz", routes.health),
        Route("/readyz", routes.readiness),
        Route("/metrics", routes.metrics),
        Route("/openapi.json", described),
        *(Route(path, _file(name, kind)) for path, (name, kind) in _FILES.items()),
    ]
    app = Starlette(
        routes=paths,
        exception_handlers={
            RefusedError: _refused,
            UserError: _mistake,
            HTTPException: _http,
            Exception: _failed,
        },
    )
    app.router.redirect_slashes = False
    known = {route.path for route in paths}
    return _measured(_guarded(app, token), metrics, known)


# ------------------------------------------------------------------------------- around all routes


def _guarded(app: ASGIApp, token: str | None) -> ASGIApp:
    """The application, for callers with the token only."""
    if token is None:
        return app
    expected = f"Bearer {token}".encode()

    async def guarded(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in _OPEN:
            given = next((v for name, v in scope["headers"] if name == b"authorization"), b"")
            # In constant time, so that the time of an answer does not tell how much was right.
            if not hmac.compare_digest(given, expected):
                headers = {"WWW-Authenticate": "Bearer"}
                refusal = RefusedError(401, "Authorization: expected Bearer TOKEN", headers)
                await _refusal(refusal)(scope, receive, send)
                return
        await app(scope, receive, send)

    return guarded


def _measured(app: ASGIApp, metrics: Metrics, known: set[str]) -> ASGIApp:
    """The application, with its requests counted."""

    async def measured(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await app(scope, receive, send)
            return
        route = scope["path"] if scope["path"] in known else "other"
        status = 500
        began = time.perf_counter()

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await app(scope, receive, noted)
        finally:
            metrics.requests.labels(route, str(status)).inc()
            metrics.request_seconds.labels(route).observe(time.perf_counter() - began)

    return measured


def _refusal(error: RefusedError) -> Response:
    body = msgspec.json.encode(schema.Mistake(" ".join(error.sentence.split())))
    return Response(body, error.status, error.headers, JSON)


async def _refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, RefusedError)
    return _refusal(error)


async def _mistake(_: Request, error: Exception) -> Response:
    return _refusal(RefusedError(400, str(error)))


async def _http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    sentence = {
        404: "path: expected one of /openapi.json, found another",
        405: f"method: expected another than {request.method[:20]} for this path",
    }
    text = sentence[error.status_code] if error.status_code in sentence else error.detail
    return _refusal(RefusedError(error.status_code, text, dict(error.headers or {})))


async def _failed(_: Request, error: Exception) -> Response:
    # The traceback goes to stderr.
    return _refusal(RefusedError(500, "the server failed; its log says why"))


# ------------------------------------------------------------------------------- parts of answers


def _json(answer: msgspec.Struct, status: int = 200) -> Response:
    body = msgspec.json.encode(answer, enc_hook=_plain)
    return Response(body, status, media_type=JSON)


def _plain(value: object) -> object:
    """A number of NumPy as one of Python; other values as text."""
    return value.item() if isinstance(value, np.generic) else str(value)


def _arrow(stream: bytes) -> Response:
    return Response(stream, media_type=ARROW)


def _file(name: str, kind: str) -> Callable[[Request], Awaitable[Response]]:
    content = (_PAGE / name).read_bytes()

    async def answer(_: Request) -> Response:
        return Response(content, headers=_OF_FILES, media_type=kind)

    return answer


def _ids_in_json(ids: Sequence[Id]) -> list[int | str]:
    return [to_json(each) for each in ids]


def _version(answer: Answer) -> int:
    return answer.served.model.version


def _rules_of(asked: schema.RecommendRequest) -> schema.Rules:
    fields = {name: getattr(asked, name) for name in schema.Rules.__struct_fields__}
    return schema.Rules(**fields)


def _ids_of(text: str) -> list[int | str]:
    try:
        found = msgspec.json.decode(text, type=list[int | str])
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        raise RefusedError(
            400, f"items: expected ids in JSON such as [1,2], found {text[:40]}"
        ) from None
    if len(found) > 10 * _MOST_FOUND:
        raise RefusedError(400, f"items: expected at most {10 * _MOST_FOUND}, found {len(found)}")
    return found


# ------------------------------------------------------------------------------- calls of the model


def _recommend(
    rules: schema.Rules,
    exclude: Sequence[Id] | None,
    allow: Sequence[Id] | None,
    model: Model,
    histories: Histories,
) -> Sequence:
    return model.recommend(
        histories,
        k=rules.k,
        exclude=exclude,
        allow=allow,
        where=rules.where,
        keep_seen=rules.keep_seen,
    )


def _similar(item: Id, k: int, model: Model, _: Histories) -> Sequence:
    return [model.similar(item, k)]


def _encode(model: Model, histories: Histories) -> Sequence:
    return list(model.encode(histories))
