"""Converts frozen dataclasses to values that JSON can represent, and back."""

import dataclasses
import typing
from typing import Any

from s2s_jax.config import choices

_KIND = "kind"


def to_plain(value: Any) -> Any:
    """Turns dataclasses into dicts, with the name of their kind if any, and tuples into lists."""
    if dataclasses.is_dataclass(value):
        fields = {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        named = isinstance(getattr(value, _KIND, None), str)
        return {_KIND: choices.kind_of(value)} | fields if named else fields
    return [to_plain(each) for each in value] if isinstance(value, tuple) else value


def from_plain(hint: Any, value: Any) -> Any:
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
        cls, hints = typing.cast(type, hint), typing.get_type_hints(hint)
        unknown = Any
        read = {n: from_plain(hints[n] if n in hints else unknown, v) for n, v in value.items()}
        return cls(**read)
    if isinstance(value, list):
        inner = typing.get_args(hint)[0] if typing.get_origin(hint) is tuple else Any
        return tuple(from_plain(inner, each) for each in value)
    return value
