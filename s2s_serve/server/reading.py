"""Reads requests: bodies in JSON or Arrow, query parameters, and their limits."""

import asyncio
import datetime
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, TypeGuard, TypeVar

import msgspec
import pyarrow as pa
from starlette.requests import ClientDisconnect, Request

from s2s_serve import json_values
from s2s_serve.server import schema, tables
from s2s_serve.server.protocol import Histories, Id
from s2s_serve.server.settings import Settings

JSON = "application/json"
ARROW = "application/vnd.apache.arrow.stream"
_MIB = 2**20

S = TypeVar("S", bound=msgspec.Struct)


class RefusedError(Exception):
    """A request that is not answered.

    Attributes:
      status: the status of HTTP.
      sentence: what is wrong.
      headers: additional headers.
    """

    def __init__(self, status: int, sentence: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(sentence)
        self.status = status
        self.sentence = sentence
        self.headers = headers or {}


async def body_of(request: Request, settings: Settings) -> bytes:
    """The body of a request.

    Raises:
      RefusedError: it is too large, compressed, or comes too slowly.
    """
    headers = request.headers
    if "content-encoding" in headers and headers["content-encoding"].lower() != "identity":
        found = headers["content-encoding"]
        raise RefusedError(415, f"Content-Encoding: expected none, found {found[:40]}")
    most = settings.max_body * _MIB
    too_large = RefusedError(413, f"body: expected at most {settings.max_body} MiB")
    if "content-length" in headers and int(headers["content-length"]) > most:
        raise too_large
    chunks, size = [], 0
    try:
        async with asyncio.timeout(settings.timeout):
            async for chunk in request.stream():
                size += len(chunk)
                if size > most:
                    raise too_large
                chunks.append(chunk)
    except TimeoutError:
        raise RefusedError(
            408, f"body: expected all of it within {settings.timeout:g} s, found {size} bytes"
        ) from None
    except ClientDisconnect:
        raise RefusedError(400, "body: the connection was closed before its end") from None
    return b"".join(chunks)


def content_type(request: Request, allowed: Sequence[str]) -> str:
    """The type of the body, one of `allowed`.

    Raises:
      RefusedError: it has another type.
    """
    given = request.headers["content-type"] if "content-type" in request.headers else ""
    found = given.split(";")[0].strip().lower()
    if found not in allowed:
        raise RefusedError(
            415, f"Content-Type: expected {' or '.join(allowed)}, found {given[:80] or 'none'}"
        )
    return found


def wants_arrow(request: Request) -> bool:
    """Whether the answer is to be in Arrow."""
    return "accept" in request.headers and ARROW in request.headers["accept"].lower()


def from_json(body: bytes, cls: type[S]) -> S:
    """A body in JSON as a struct.

    Raises:
      RefusedError: it is not JSON, or has other fields or types.
    """
    try:
        return msgspec.json.decode(body, type=cls)
    except msgspec.ValidationError as error:
        raise RefusedError(400, _sentence(str(error))) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RefusedError(400, f"body: expected JSON, found other text ({error})") from None


def rules_of_query(request: Request, kind: str) -> schema.Rules:
    """The rules that come with a body in Arrow: query parameters, each of them JSON.

    Raises:
      RefusedError: a parameter is unknown, is there twice, is not JSON, or has another type; or the body
        is in JSON, in which the rules are.
    """
    if kind == JSON and request.query_params:
        name = next(iter(request.query_params))[:40]
        raise RefusedError(400, f"{name}: expected in the body, found a query parameter")
    given: dict[str, msgspec.Raw] = {}
    for name, text in request.query_params.multi_items():
        if name in given:
            raise RefusedError(400, f"{name[:40]}: expected one query parameter, found several")
        given[name] = msgspec.Raw(text.encode(errors="replace"))
    for name, text in given.items():
        try:
            msgspec.json.decode(text)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise RefusedError(
                400, f"{name[:40]}: expected JSON, found other text ({error})"
            ) from None
    return from_json(msgspec.json.encode(given), schema.Rules)


def check_k(k: int, settings: Settings) -> None:
    """Refuses too large a number of items."""
    if k > settings.max_k:
        raise RefusedError(400, f"k: expected at most {settings.max_k}, found {str(k)[:40]}")


def check_rules(rules: schema.Rules, settings: Settings) -> None:
    """Refuses rules that no model can follow, or that would keep the server from other requests.

    Raises:
      RefusedError: k is too large, there are too many ids or values, or an integer does not fit into 64
        bits.
    """
    check_k(rules.k, settings)
    size = len(rules.exclude or ()) + len(rules.allow or ())
    # Each column takes time, also one without values.
    size += sum(max(len(values), 1) for values in (rules.where or {}).values())
    if size > settings.max_rule_values:
        raise RefusedError(
            400,
            f"exclude, allow and where: expected at most {settings.max_rule_values} ids and values, "
            f"found {size}",
        )
    for name, values in (("exclude", rules.exclude), ("allow", rules.allow)):
        check_integers(name, values or ())
    for column, values in (rules.where or {}).items():
        check_integers(f"where.{column[:80]}", values)


def item_ids(place: str, ids: Sequence[schema.Id] | None, item: pa.DataType) -> list[Id] | None:
    """Ids of items as in the log, from those in JSON.

    Args:
      place: what they are called in messages.
      ids: the ids; None: none were given.
      item: the type of ids of items.

    Raises:
      RefusedError: the ids are times, and one is not as in ISO 8601.
    """
    if ids is None:
        return None
    if json_values.is_plain(item):
        return list(ids)
    found: list[Id] = []
    for number, each in enumerate(ids):
        try:
            found.append(json_values.from_json(each, item))
        except ValueError:
            raise _no_time(f"{place}[{number}]", str(each)) from None
    return found


def item_id(place: str, each: schema.Id, item: pa.DataType) -> Id:
    """One id, see `item_ids`."""
    try:
        return json_values.from_json(each, item)
    except ValueError:
        raise _no_time(place, str(each)) from None


def check_integers(place: str, values: Iterable[object]) -> None:
    """Refuses integers that do not fit into 64 bits."""
    for value in values:
        if isinstance(value, int) and not -(2**63) <= value < 2**64:
            raise RefusedError(
                400, f"{place}: expected integers of 64 bits, found {str(value)[:40]}"
            )


def check_histories(histories: Sequence[Mapping[str, list | None]], settings: Settings) -> None:
    """Refuses too many histories or events.

    Raises:
      RefusedError: there are too many.
    """
    check_number(len(histories), settings)
    for number, history in enumerate(histories):
        for column, entries in history.items():
            if entries is not None and len(entries) > settings.max_events:
                raise RefusedError(
                    400,
                    f"histories[{number}].{column[:80]}: expected at most {settings.max_events} events, "
                    f"found {len(entries)}",
                )


def with_times(
    histories: Sequence[Mapping[str, list | None]], columns: Collection[str]
) -> Histories:
    """The histories with times instead of text such as 2026-01-31T12:00:00.

    Args:
      histories: as they are in JSON.
      columns: the columns that hold times, which may also be numbers, or text of digits.

    Raises:
      RefusedError: other text of such a column is not a time as in ISO 8601.
    """
    given = (e for h in histories for c in columns if c in h for e in h[c] or ())
    if not any(_is_time(e) for each in given for e in (each if isinstance(each, list) else [each])):
        return histories
    return [
        {
            column: _times(f"histories[{number}].{column}", entries)
            if column in columns
            else entries
            for column, entries in history.items()
        }
        for number, history in enumerate(histories)
    ]


def _is_time(entry: object) -> TypeGuard[str]:
    return isinstance(entry, str) and not entry.removeprefix("-").isdigit()


def _times(place: str, entries: Sequence | None) -> list | None:
    if entries is None:
        return None
    return [_time(f"{place}[{event}]", entry) for event, entry in enumerate(entries)]


def _time(place: str, entry: object) -> object:
    if isinstance(entry, list):
        return _times(place, entry)
    try:
        return datetime.datetime.fromisoformat(entry) if _is_time(entry) else entry
    except ValueError:
        raise _no_time(place, str(entry)) from None


def _no_time(place: str, text: str) -> RefusedError:
    sentence = f"{place}: expected a time such as 2026-01-31T12:00:00, found {text[:40]}"
    return RefusedError(400, sentence)


def with_bytes(
    histories: Sequence[Mapping[str, list | None]], column: str, item: pa.DataType
) -> list[dict[str, list | None]]:
    """The histories with bytes instead of text in a column.

    Args:
      histories: as they are in JSON.
      column: the column that holds ids of items.
      item: the type of these ids.
    """

    def read(entry: Any) -> Any:
        if isinstance(entry, list):
            return [read(each) for each in entry]
        return json_values.from_json(entry, item)

    return [
        {
            name: [read(entry) for entry in entries] if entries and name == column else entries
            for name, entries in history.items()
        }
        for history in histories
    ]


def check_number(histories: int, settings: Settings) -> None:
    """Refuses too many histories."""
    if histories > settings.max_histories:
        raise RefusedError(
            400, f"histories: expected at most {settings.max_histories}, found {histories}"
        )


def table_of(body: bytes, settings: Settings) -> Histories:
    """The histories of a body in Arrow.

    Raises:
      RefusedError: it is not a stream of Arrow with columns of lists, or has too much.
    """
    try:
        table = tables.read(body, settings.max_histories)
    except tables.UnfitError as error:
        raise RefusedError(400, str(error)) from None
    check_number(len(table), settings)
    if not len(table):
        raise RefusedError(400, "body: expected at least one row, found none")
    for name in table.column_names:
        longest = tables.longest(table[name])
        if longest > settings.max_events:
            raise RefusedError(
                400,
                f"{name[:80]}: expected at most {settings.max_events} events, found {longest}",
            )
    return table


_PLACE = re.compile(r"^(.*) - at `(key in )?\$\.?(.*)`$", re.DOTALL)
_FOUND = re.compile(r"^Expected (.*?)(?:, got (.*))?$", re.DOTALL)


def _sentence(message: str) -> str:
    """A message of msgspec in the words of this project: the place, what was expected and found."""
    place = _PLACE.match(message)
    where = (place[3] if place else "") or "body"
    text = (place[1] if place else message).replace("`", "")
    found = _FOUND.match(text)
    if found is None:
        return f"{where}: {text[:1].lower()}{text[1:]}"[:300]
    got = f", found {found[2]}" if found[2] else ""
    return f"{where}: expected {found[1].replace(' | ', ' or ')}{got}"[:300]
