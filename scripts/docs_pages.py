"""Fills pages of the documentation from the code, or from other files, when the site is built.

MkDocs calls `on_page_markdown` for every page (see `hooks` in mkdocs.yml). A line

    <!-- generated: configuration -->

in a page is replaced by the result of the function with that name in `GENERATED`, and a line

    <!-- included: CONTRIBUTING.md -->

is replaced by that file of the repository, with its links adapted to the page.
"""

import ast
import dataclasses
import inspect
import re
import textwrap
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from s2s_jax.config.checks import spell
from s2s_jax.config.schema import Config

_ROOT = Path(__file__).resolve().parents[1]
_GENERATED = re.compile(r"^<!-- generated: ([\w-]+) -->$", re.MULTILINE)
_INCLUDED = re.compile(r"^<!-- included: ([\w./-]+) -->$", re.MULTILINE)
_LINK = re.compile(r"\[([^\]]+)\]\(([^)#:]+)(#[^)]*)?\)")
# The pages of the site for files of the repository.
_PAGE_OF = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called by MkDocs: replaces the markers of a page."""
    markdown = _GENERATED.sub(lambda found: GENERATED[found.group(1)](), markdown)
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


class Section(typing.NamedTuple):
    """A table of keys.

    Attributes:
      path: prefix of each key, without the dot; a name in capitals is a placeholder.
      cls: the dataclass with the keys.
    """

    path: str
    cls: type


def sections(cls: type = Config, path: str = "") -> Iterator[Section]:
    """Every dataclass of a `Config`, in the order of the schema."""
    hints = typing.get_type_hints(cls)
    own = [f for f in dataclasses.fields(cls) if not _dataclasses_in(hints[f.name])]
    if own:
        yield Section(path, cls)
    for field in dataclasses.fields(cls):
        for inner in _dataclasses_in(hints[field.name]):
            place = f"{path}.{field.name}".lstrip(".")
            if typing.get_origin(hints[field.name]) is tuple:
                place += ".NAME"
            yield from sections(inner, place)


def configuration() -> str:
    """The reference of all keys as Markdown, a table for each section."""
    parts = []
    for section in sections():
        parts.append(f"## {section.path}\n\n{_plain(inspect.getdoc(section.cls) or '')}\n")
        parts.append("| key | type | default | meaning |\n|---|---|---|---|")
        hints, texts = typing.get_type_hints(section.cls), _docstrings(section.cls)
        for field in dataclasses.fields(section.cls):
            if not _dataclasses_in(hints[field.name]):
                parts.append(_row(section.path, field, hints[field.name], texts[field.name]))
        parts.append("")
    return "\n".join(parts)


def _row(path: str, field: dataclasses.Field, hint: Any, text: str) -> str:
    default = "required" if field.default is dataclasses.MISSING else _code(_shown(field.default))
    key = f"`{path}.{field.name}`{{ #{path}.{field.name} }}"
    return f"| {key} | {_type(hint)} | {default} | {_plain(text)} |"


def _shown(value: Any) -> str:
    return '""' if value == "" else value if isinstance(value, str) else repr(value)


def _type(hint: Any) -> str:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return ", ".join(_code(str(arg)) for arg in args)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_type(arg) for arg in args)
    return _code("None") if hint is type(None) else spell(hint)


def _dataclasses_in(hint: Any) -> list[type]:
    """The dataclasses in a type, such as those of a union or a tuple."""
    if dataclasses.is_dataclass(hint):
        return [typing.cast(type, hint)]
    return [cls for arg in typing.get_args(hint) for cls in _dataclasses_in(arg)]


def _docstrings(cls: type) -> dict[str, str]:
    """The text under each field of a dataclass."""
    (body,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(body, ast.ClassDef)
    texts = {}
    for field, after in zip(body.body, body.body[1:], strict=False):
        if (
            isinstance(field, ast.AnnAssign)
            and isinstance(field.target, ast.Name)
            and isinstance(after, ast.Expr)
            and isinstance(after.value, ast.Constant)
        ):
            texts[field.target.id] = inspect.cleandoc(str(after.value.value))
    return texts


def _code(text: str) -> str:
    return "`" + text.replace("|", "\\|") + "`"


def _plain(text: str) -> str:
    """Text of a docstring for a table cell, with characters that are special in Markdown escaped."""
    parts = text.replace("\n", " ").split("`")
    outside = [re.sub(r"([\\*_<>\[\]|])", r"\\\1", part) for part in parts[::2]]
    inside = [part.replace("|", "\\|") for part in parts[1::2]]
    inside += [""] * (len(outside) - len(inside))
    pieces = [text for pair in zip(outside, inside, strict=True) for text in pair]
    return "`".join(pieces[: len(parts)])


GENERATED = {"configuration": configuration}
