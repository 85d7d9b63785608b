"""Fills pages of the documentation from the code, or from other files, when the site is built.

MkDocs calls `on_page_markdown` for every page (see `hooks` in mkdocs.yml). A line

    <!-- generated: command train -->

in a page is replaced by what the function of that name in `GENERATED` returns: `command("train")`.
A line

    <!-- included: CONTRIBUTING.md -->

is replaced by that file of the repository, with its links adapted to the page.
"""

import dataclasses
import importlib
import inspect
import re
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

from s2s_jax.cli import parsing
from s2s_jax.cli.arguments import arguments_of
from s2s_jax.cli.command_list import COMMANDS
from s2s_jax.config import choices, help
from s2s_jax.config.checks.values import spell
from s2s_jax.config.schema import Config

_ROOT = Path(__file__).resolve().parents[1]
_GENERATED = re.compile(r"^<!-- generated: (\w+)((?: \w+)*) -->$", re.MULTILINE)
_INCLUDED = re.compile(r"^<!-- included: ([\w./-]+) -->$", re.MULTILINE)
_LINK = re.compile(r"\[([^\]]+)\]\(([^)#:]+)(#[^)]*)?\)")
# The pages of the site for files of the repository.
_PAGE_OF = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called by MkDocs: replaces the markers of a page."""
    markdown = _GENERATED.sub(
        lambda found: GENERATED[found.group(1)](*found.group(2).split()), markdown
    )
    return _INCLUDED.sub(lambda found: included(found.group(1)), markdown)


def included(name: str) -> str:
    """A Markdown file of the repository's root, for a page at the root of the site.

    Links to files that are pages of the site lead to those pages; other links become plain text.
    """

    def link(found: re.Match[str]) -> str:
        text, path, anchor = found.group(1), found.group(2), found.group(3) or ""
        if path in _PAGE_OF:
            return f"[{text}]({_PAGE_OF[path]}{anchor})"
        if path.startswith("docs/"):
            return f"[{text}]({path.removeprefix('docs/')}{anchor})"
        return text

    return _LINK.sub(link, (_ROOT / name).read_text())


# ------------------------------------------------------------------------------- configuration


class Key(NamedTuple):
    """A key of the configuration.

    Attributes:
      path: the key on the command line; a word in capitals stands for a name.
      kinds: the kinds that have this key; () if the key does not depend on a kind.
      hint: the type of the value.
      default: the default value; `dataclasses.MISSING` if the key must be given.
      text: the meaning of the key.
    """

    path: str
    kinds: tuple[str, ...]
    hint: Any
    default: Any
    text: str


def configuration() -> str:
    """The reference of all keys as Markdown, a table for each section."""
    parts = []
    hints = typing.get_type_hints(Config)
    for section in dataclasses.fields(Config):
        hint, path = hints[section.name], section.name
        if typing.get_origin(hint) is tuple:
            hint, path = typing.get_args(hint)[0], f"{path}.NAME"
        parts.append(f"## {path}\n\n{_plain(inspect.getdoc(hint) or '')}\n")
        parts.append("| key | type | default | meaning |\n|---|---|---|---|")
        anchors: set[str] = set()
        for key in keys(hint, path):
            parts.append(_row(key, anchored=key.path not in anchors))
            anchors.add(key.path)
        parts.append("")
    return "\n".join(parts)


def keys(cls: type, path: str) -> Iterator[Key]:
    """The keys of a section; a key with several kinds is followed by the keys of its kinds.

    Args:
      cls: the dataclass of the section.
      path: the path of the section.
    """
    texts = help.texts(cls)
    for field in dataclasses.fields(cls):
        hint, place = choices.types_of(cls)[field.name], f"{path}.{field.name}"
        kinds = choices.kinds(hint)
        if not kinds:
            yield Key(place, (), hint, field.default, texts[field.name])
            continue
        default = choices.kind_of(field.default)
        described = [f"`{kind}`: {inspect.getdoc(inner)}" for kind, inner in kinds.items() if inner]
        text = "\n\n".join([texts[field.name], *described])
        yield Key(place, (), Literal[tuple(kinds)], default, text)
        # A key that means the same in several kinds is listed once.
        of_kinds: dict[tuple, Key] = {}
        for kind, inner in kinds.items():
            for key in () if inner is None else keys(inner, place):
                same = (key.path, key.default, key.text)
                names = of_kinds[same].kinds if same in of_kinds else ()
                of_kinds[same] = key._replace(kinds=(*names, kind))
        yield from of_kinds.values()


def _row(key: Key, anchored: bool) -> str:
    name = f"`{key.path}`{{ #{key.path} }}" if anchored else f"`{key.path}`"
    of = f"With {' or '.join(map(_code, key.kinds))}: " if key.kinds else ""
    return f"| {name} | {_type(key.hint)} | {_default(key.default)} | {of}{_cell(key.text)} |"


def _default(value: Any) -> str:
    if value is dataclasses.MISSING:
        return "required"
    if isinstance(value, tuple):
        return " ".join(map(_default, value)) or "none"
    return _code('""' if value == "" else value if isinstance(value, str) else repr(value))


def _type(hint: Any) -> str:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return ", ".join(_code(str(arg)) for arg in args)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_type(arg) for arg in args)
    if origin is tuple and args[-1] is ...:
        return f"one or more: {_type(args[0])}"
    if hint in (Path, type(None)):
        return "path" if hint is Path else _code("None")
    return spell(hint)


def _code(text: str) -> str:
    return f"`{text}`"


def _cell(text: str) -> str:
    """Text of a docstring in a cell of a table; paragraphs become lines."""
    return "<br>".join(map(_plain, text.split("\n\n")))


def _plain(text: str) -> str:
    """Text of a docstring, with the signs escaped that Markdown would read."""
    parts = text.replace("\n", " ").split("`")
    outside = [re.sub(r"[\\*_<>\[\]|]", lambda sign: f"&#{ord(sign[0])};", p) for p in parts[::2]]
    # Python-Markdown reads no signs inside of code, not even escapes.
    inside = [*parts[1::2], *[""] * (len(outside) - len(parts[1::2]))]
    pieces = [text for pair in zip(outside, inside, strict=True) for text in pair]
    return "`".join(pieces[: len(parts)])


# ------------------------------------------------------------------------------------ commands


def command(name: str) -> str:
    """What a command does, and its arguments, as Markdown."""
    module = importlib.import_module(f"s2s_jax.cli.commands.{name}")
    cls = module.Arguments if hasattr(module, "Arguments") else module.Settings
    texts = help.texts(cls)
    defaults = {field.name: field.default for field in dataclasses.fields(cls)}
    arguments = arguments_of(cls).values()
    positional = [each for each in arguments if each.positional]
    needed = [f"--{each.name} {each.shown}" for each in arguments if _is_flag(each, required=True)]
    words = [*(each.shown for each in positional), *needed]
    optional = ["[OPTIONS]"] if any(_is_flag(each, required=False) for each in arguments) else []
    rows = [
        f"| `{each.shown if each.positional else f'--{each.name}'}` | {_type(each.kind)} "
        f"| {_default(defaults[each.name])} | {_cell(texts[each.name])} |"
        for each in (*positional, *(each for each in arguments if not each.positional))
    ]
    parts = [
        COMMANDS[name],
        f"```sh\ns2s {' '.join([name, *words, *optional])}\n```",
        _plain(inspect.getdoc(cls) or ""),
        "| argument | value | default | meaning |\n|---|---|---|---|\n" + "\n".join(rows),
    ]
    if issubclass(cls, parsing.WithConfig):
        parts.append(
            "Any key of the [configuration](configuration.md) can also be given: `--section.key VALUE`."
        )
    return "\n\n".join(parts)


def _is_flag(argument: parsing.Argument, required: bool) -> bool:
    return not argument.positional and argument.required == required


GENERATED = {"configuration": configuration, "command": command}
