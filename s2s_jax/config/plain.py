"""Converts frozen dataclasses to values that JSON can represent, and back."""

import dataclasses
import typing
from typing import Any, ClassVar, Protocol

from s2s_jax.config import choices

# A value that JSON can represent.
Plain = bool | int | float | str | None | list["Plain"] | dict[str, "Plain"]
_KIND = "kind"


class Dataclass(Protocol):
    """Any instance of a dataclass."""

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]


def to_plain(value: Any) -> Plain:
    """Turns dataclasses into dicts, see `to_dict`, and tuples into lists."""
    if dataclasses.is_dataclass(value):
        return to_dict(typing.cast(Dataclass, value))
    return [to_plain(each) for each in value] if isinstance(value, tuple) else value


def to_dict(settings: Dataclass) -> dict[str, Plain]:
    """Turns a dataclass into a dict of its fields, with the name of its kind if it has one."""
    fields = {f.name: to_plain(getattr(settings, f.name)) for f in dataclasses.fields(settings)}
    kind = getattr(settings, _KIND, None)
    return {_KIND: kind} | fields if isinstance(kind, str) else fields


def from_plain(hint: object, value: Plain) -> Any:
    """The inverse of `to_plain`; missing keys have their defaults.

    Args:
      hint: the type of the result.
      value: result of `to_plain`, or of parsing it from JSON.

    Raises:
      TypeError: a key does not exist, or one without a default is missing.
      ValueError: a kind does not exist.
    """
    kinds = choices.kinds(hint)
    if kinds and isinstance(value, dict):
        kind = value[_KIND] if _KIND in value else "nothing"
        if kind not in kinds:
            raise ValueError(f"expected a kind of {', '.join(kinds)}, found {kind}")
        value = {name: each for name, each in value.items() if name != _KIND}
        return from_plain(kinds[kind], value)
    if dataclasses.is_dataclass(hint) and isinstance(value, dict):
        cls = typing.cast(type, hint)
        hints = typing.get_type_hints(cls)
        # Python's own error about an unknown keyword is more helpful than one about its type.
        read = {n: from_plain(hints[n] if n in hints else object, v) for n, v in value.items()}
        return cls(**read)
    if isinstance(value, list):
        inner = typing.get_args(hint)[0] if typing.get_origin(hint) is tuple else object
        return tuple(from_plain(inner, each) for each in value)
    return value
