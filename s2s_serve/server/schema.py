"""Bodies of requests and answers; their JSON schemas are part of /openapi.json."""

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

# Times are text as in ISO 8601, and bytes text as `json_values.to_json` writes them.
Id = int | str
Entry = int | float | str | None | list[int | float | str | None]
Value = bool | int | float | str | None

_Histories = Annotated[
    list[dict[str, list[Entry] | None]],
    Meta(
        description="Each history has, by the name of a column, an entry for each event, oldest "
        "first: an id, a bag of ids, or null",
        examples=[[{"item_id": [1193, 661, 914]}]],
    ),
]
_K = Annotated[int, Meta(ge=1, description="Most items of an answer")]


class Rules(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What may be recommended."""

    k: _K = 10
    exclude: Annotated[list[Id] | None, Meta(description="Items that are not recommended")] = None
    allow: Annotated[list[Id] | None, Meta(description="The only items that are recommended")] = (
        None
    )
    where: Annotated[
        dict[str, list[Value]] | None,
        Meta(description="Recommends items whose columns have one of the listed values"),
    ] = None
    keep_seen: Annotated[
        bool | None,
        Meta(description="Whether items of the history can be recommended; null: as in evaluation"),
    ] = None


class RecommendRequest(Rules, kw_only=True, forbid_unknown_fields=True):
    """Asks for the best items for each history."""

    histories: Annotated[_Histories, Meta(min_length=1)]


class Recommendation(msgspec.Struct):
    """The answer for one history."""

    items: Annotated[list[Id], Meta(description="Best first")]
    scores: Annotated[list[float | None], Meta(description="One for each item")]
    unknown: Annotated[int, Meta(description="Number of events that the model has never seen")]
    by: Annotated[
        Literal["model", "popularity"],
        Meta(description="What ranked: popularity for a history without events"),
    ]


class RecommendAnswer(msgspec.Struct):
    """All results come from one version."""

    version: int
    results: list[Recommendation]


class SimilarRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Asks for the items nearest to one."""

    item: Id
    k: _K = 10


class SimilarAnswer(msgspec.Struct):
    """The nearest items."""

    version: int
    items: Annotated[list[Id], Meta(description="Nearest first")]
    scores: Annotated[list[float | None], Meta(description="One for each item")]


class EncodeRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Asks for the vector of each history."""

    histories: Annotated[_Histories, Meta(min_length=1)]


class EncodeAnswer(msgspec.Struct):
    """The vectors, which can be compared with those of items."""

    version: int
    vectors: list[list[float | None]]


class ItemsAnswer(msgspec.Struct):
    """Items with their columns."""

    version: int
    items: list[dict[str, object]]


class CardAnswer(msgspec.Struct):
    """What is known about the model."""

    version: int
    features: Annotated[list[str], Meta(description="The columns of a history")]
    columns: Annotated[list[str], Meta(description="The columns of items")]
    title: Annotated[str | None, Meta(description="The column that holds titles")]
    card: Annotated[dict[str, object], Meta(description="From the manifest of the export")]


class Health(msgspec.Struct):
    """The process answers."""

    alive: bool


class Readiness(msgspec.Struct):
    """Whether requests are answered."""

    ready: bool
    version: int | None
    failure: Annotated[str | None, Meta(description="Why the newest version could not be loaded")]


class Mistake(msgspec.Struct):
    """What is wrong, in one sentence."""

    error: str
