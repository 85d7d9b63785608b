"""Keys whose value is one of several kinds, each with its own keys.

A kind is a frozen dataclass with its name as `kind`; `None`, if allowed, is "none". In JSON, the name is
next to the keys: `{"kind": "cosine", "steps": null, …}`. On the command line, `--lr.decay cosine`
chooses a kind, and `--lr.decay.steps 100` sets one of its keys.
"""

import dataclasses
import types
import typing
from typing import ClassVar, Protocol

NONE = "none"


class Kind(Protocol):
    """A value of one of the kinds of a key."""

    kind: ClassVar[str]


def kinds(hint: object) -> dict[str, type | None]:
    """The dataclasses that a value of this type may be, by the names of their kinds.

    Empty if the type is not a choice between kinds.
    """
    if typing.get_origin(hint) not in (typing.Union, types.UnionType):
        return {}
    found: dict[str, type | None] = {}
    for each in typing.get_args(hint):
        if dataclasses.is_dataclass(each):
            found[kind_of(typing.cast(Kind, each))] = typing.cast(type, each)
        elif each is not type(None):
            return {}
        else:
            found[NONE] = None
    return found


def kind_of(value: Kind | None) -> str:
    """The name of the kind of a value."""
    return NONE if value is None else value.kind


def required(cls: type) -> list[str]:
    """The keys of a dataclass that have no default."""
    return [f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING]


def types_of(cls: type) -> dict[str, object]:
    """The types of the fields of a dataclass."""
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}
