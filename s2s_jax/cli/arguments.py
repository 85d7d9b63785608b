"""The arguments of a command, read from the dataclass that describes them."""

import dataclasses
import types
import typing
from pathlib import Path
from typing import Any, NamedTuple

import tyro

from s2s_jax.config.checks.values import spell
from s2s_jax.storage.place_option import PlaceOption
from s2s_serve.storage.address import StorePath


class Argument(NamedTuple):
    """An argument of a command.

    Attributes:
      name: the name of the dataclass field; the flag is `--name`.
      hint: the type annotation, including tyro's annotations.
      kind: the type, without tyro's annotations and without None.
      positional: whether the argument is given without a flag.
      required: whether the argument must be given.
      shown: the placeholder for a value in help.
      may_be_in_store: whether the argument is a path of this machine or an address of a store.
    """

    name: str
    hint: Any
    kind: Any
    positional: bool
    required: bool
    shown: str
    may_be_in_store: bool

    @property
    def takes_many(self) -> bool:
        """Whether the argument takes any number of values."""
        return typing.get_origin(self.kind) is tuple

    @property
    def place(self) -> str:
        """The name of the argument in messages."""
        return self.shown if self.positional else f"--{self.name}"

    @property
    def kind_text(self) -> str:
        """The type of a value in words, for messages."""
        if self.kind is Path:
            return "a path"
        if self.takes_many:
            return f"one or more values, each {spell(typing.get_args(self.kind)[0])}"
        return spell(self.kind)


def arguments_of(cls: type) -> dict[str, Argument]:
    """The arguments of a command, by name.

    Args:
      cls: the dataclass of the arguments.
    """
    hints = typing.get_type_hints(cls, include_extras=True)
    found = {}
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        annotations = hint.__metadata__ if hasattr(hint, "__metadata__") else ()
        kinds = _kinds(typing.get_type_hints(cls)[field.name])
        own = [each for each in annotations if each not in typing.get_args(PlaceOption)]
        metavars = [each.metavar for each in own if getattr(each, "metavar", None)]
        found[field.name] = Argument(
            name=field.name,
            hint=hint,
            kind=_only(kinds),
            positional=tyro.conf.Positional in annotations,
            required=field.default is dataclasses.MISSING,
            shown=metavars[0] if metavars else field.name.upper(),
            may_be_in_store=StorePath in kinds,
        )
    return found


def _kinds(hint: Any) -> tuple[Any, ...]:
    """The types that an annotation allows, apart from None."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return tuple(each for each in typing.get_args(hint) if each is not type(None))
    return (hint,)


def _only(kinds: tuple[Any, ...]) -> Any:
    """The type of a value; of a `Place`, that of a path."""
    (kind,) = (each for each in kinds if each is not StorePath)
    return kind
