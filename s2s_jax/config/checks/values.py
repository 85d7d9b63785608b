"""Checks of a single value, on which the other checks are built."""

import dataclasses
import types
import typing
from typing import Literal

from s2s_jax.errors import UserError


def require(ok: bool, path: str, expected: str, found: object) -> None:
    """Raises an error about a value unless it is acceptable.

    Args:
      ok: whether the value is acceptable.
      path: the dotted path of the key.
      expected: a description of acceptable values.
      found: the value.

    Raises:
      UserError: `ok` is false.
    """
    if not ok:
        raise UserError(f"{path}: expected {expected}, found {found!r}")


def fits(value: object, hint: object) -> bool:
    """Whether a value has the type `hint`."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return value in args
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, arg) for arg in args)
    if origin is tuple:
        kinds = [args[0]] * len(value) if isinstance(value, tuple) and args[-1] is ... else args
        return (
            isinstance(value, tuple)
            and len(value) == len(kinds)
            and all(fits(v, kind) for v, kind in zip(value, kinds, strict=True))
        )
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, typing.cast(type, hint))


def spell(hint: object) -> str:
    """Describe a type in words that users know."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is tuple:
        kind = "one or more " if args[-1] is ... else f"{len(args)} "
        return kind + spell(args[0]) + " values"
    if hint is bool:
        return "True or False"
    if origin is Literal:
        return "one of " + ", ".join(map(str, args))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(spell(arg) for arg in args)
    if hint is type(None):
        return "None"
    if dataclasses.is_dataclass(hint):
        return f"{typing.cast(type, hint).__name__}(…)"
    return {int: "a whole number", float: "a number", str: "text"}[typing.cast(type, hint)]
