"""The part of `--help` about the keys of a configuration: all keys, with their values and meanings."""

import ast
import dataclasses
import inspect
import textwrap
import typing
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, NamedTuple

import tyro

from s2s_jax.config import choices
from s2s_jax.config.overrides import NAMED
from s2s_jax.config.schema import Config


def texts(cls: type) -> dict[str, str]:
    """The docstring of each field of a dataclass, as one line, so that help can wrap it."""
    found = {}
    for base in reversed(cls.__mro__):
        if dataclasses.is_dataclass(base):
            found |= _own_texts(base)
    return found


def _own_texts(cls: type) -> dict[str, str]:
    """The same as `texts`, without inherited fields."""
    (body,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(body, ast.ClassDef)
    found = {}
    for field, after in zip(body.body, body.body[1:], strict=False):
        if (
            isinstance(field, ast.AnnAssign)
            and isinstance(field.target, ast.Name)
            and isinstance(after, ast.Expr)
            and isinstance(after.value, ast.Constant)
        ):
            found[field.target.id] = " ".join(str(after.value.value).split())
    return found


class _Field(NamedTuple):
    """A field of a dataclass that is only made for help.

    Attributes:
      name: name on the command line, after the section's name and a dot.
      hint: type of the field.
      value: default of the field.
      text: meaning of the field; None: the docstring of its type.
    """

    name: str
    hint: Any
    value: Any
    text: str | None = None


def for_help(config: Config) -> Any:
    """The configuration as a dataclass from which tyro makes help.

    It includes the keys of all kinds, and has features and tables by name.
    """
    fields = []
    for section in dataclasses.fields(config):
        part = getattr(config, section.name)
        if section.name in NAMED:
            names = _names([each.name for each in part])
            named = zip(names, map(_section, part), strict=True)
            part = _made([_Field(name, type(each), each) for name, each in named], "")
        else:
            part = _section(part)
        fields.append(_Field(section.name, type(part), part))
    return _made(fields, inspect.getdoc(Config) or "")


def _names(names: Sequence[str]) -> list[str]:
    """Names as on a command line: their numbers, if some differ only in - and _."""
    different = len({name.replace("-", "_") for name in names}) == len(names)
    return list(names) if different else [str(number) for number in range(len(names))]


def _section(part: Any) -> Any:
    """A section, a feature or a table as a dataclass for help."""
    return _made(list(_flat(part)), inspect.getdoc(type(part)) or "")


def _flat(part: Any) -> Iterator[_Field]:
    """The fields of a section; a key with several kinds is followed by the keys of all kinds."""
    meanings = texts(type(part))
    for name, hint in choices.types_of(type(part)).items():
        value, kinds = getattr(part, name), choices.kinds(hint)
        if not kinds:
            yield _Field(name, hint, value, meanings[name])
            continue
        yield _Field(name, Literal[tuple(kinds)], choices.kind_of(value), meanings[name])
        keys: dict[str, _Field] = {}
        for kind, cls in kinds.items():
            for field in _fields_of_kind(name, kind, cls, value):
                earlier = keys[field.name].text if field.name in keys else None
                text = field.text if earlier is None else f"{earlier}. {field.text}"
                keys[field.name] = field._replace(text=text)
        yield from keys.values()


def _fields_of_kind(path: str, kind: str, cls: type | None, value: Any) -> Iterator[_Field]:
    if cls is None:
        return
    meanings = texts(cls)
    for field in dataclasses.fields(cls):
        hint, default = choices.types_of(cls)[field.name], field.default
        if isinstance(value, cls):
            default = getattr(value, field.name)
        elif default is dataclasses.MISSING:
            hint, default = typing.cast(Any, hint) | None, None
        yield _Field(f"{path}.{field.name}", hint, default, f"For {kind}: {meanings[field.name]}")


def _made(fields: Sequence[_Field], text: str) -> Any:
    """An instance of a new dataclass with these fields and values."""
    hints = [
        (
            f"field{number}",
            Annotated[field.hint, tyro.conf.arg(name=field.name, help=field.text)],
            dataclasses.field(default=field.value),
        )
        for number, field in enumerate(fields)
    ]
    cls = dataclasses.make_dataclass(
        "Shown", hints, namespace={"__doc__": text}, frozen=True, kw_only=True
    )
    return typing.cast(Any, cls)()
