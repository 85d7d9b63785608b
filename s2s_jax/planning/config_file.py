"""Writes a configuration as a Python file with comments, in the style of `configs/`."""

import dataclasses
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import cast

from s2s_jax.config import Config
from s2s_jax.config.plain import Dataclass
from s2s_jax.planning.rules import Plan
from s2s_jax.version import __version__
from s2s_jax.writing import explained, replacing

_WIDTH = 100
_INDENT = "    "
# Keys that users look for, so they are written even if they have their defaults.
_ALWAYS = ("emb_dim", "dense_lr", "sparse_lr", "temperature", "neighbours")


def text_of(plan: Plan, about: Sequence[str]) -> str:
    """The text of a config file.

    Args:
      plan: the configuration and its reasons.
      about: paragraphs for the docstring of the file.
    """
    body = _Body(plan)
    lines = body.lines()
    names = ["Config", *body.classes]
    imports = [f"{_INDENT}{name}," for name in sorted(set(names), key=str.lower)]
    paragraphs = [textwrap.fill(paragraph, _WIDTH) for paragraph in about]
    return "\n".join(
        [
            f'"""{paragraphs[0]}',
            *(f"\n{paragraph}" for paragraph in paragraphs[1:]),
            '"""',
            "",
            "from s2s_jax.config import (",
            *imports,
            ")",
            "",
            f"# Written by s2s init of s2s_jax {__version__}.",
            "",
            "",
            "def get_config() -> Config:",
            *lines,
            "",
        ]
    )


def write(plan: Plan, about: Sequence[str], path: Path) -> None:
    """Writes a config file; an old one is replaced.

    Raises:
      UserError: the file cannot be written.
    """
    with explained(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as unfinished:
        unfinished.write_text(text_of(plan, about), encoding="utf-8")


class _Body:
    """The lines of `get_config`.

    Attributes:
      classes: the classes that the lines use.
    """

    def __init__(self, plan: Plan):
        self._config, self._why = plan.config, plan.why
        self.classes: list[str] = []

    def lines(self) -> list[str]:
        lines = [f"{_INDENT}return Config("]
        for section in dataclasses.fields(Config):
            value = getattr(self._config, section.name)
            lines += self._comment(section.name, 2)
            if isinstance(value, tuple):
                lines.append(f"{_INDENT * 2}{section.name}=(")
                for each in value:
                    lines += self._comment(f"{section.name}.{each.name}", 3)
                    lines += self._call(each, "", f"{section.name}.{each.name}", 3)
                lines.append(f"{_INDENT * 2}),")
            else:
                lines += self._call(value, f"{section.name}=", section.name, 2)
        return [*lines, f"{_INDENT})"]

    def _call(self, value: Dataclass, name: str, path: str, depth: int) -> list[str]:
        """The call that makes a section, feature or table, with a line for each key."""
        self.classes.append(type(value).__name__)
        lines = [f"{_INDENT * depth}{name}{type(value).__name__}("]
        for field in dataclasses.fields(value):
            key = f"{path}.{field.name}"
            item = getattr(value, field.name)
            if item == field.default and key not in self._why and field.name not in _ALWAYS:
                continue
            lines += self._comment(key, depth + 1)
            lines.append(f"{_INDENT * (depth + 1)}{field.name}={self._literal(item)},")
        return [*lines, f"{_INDENT * depth}),"]

    def _literal(self, value: object) -> str:
        if dataclasses.is_dataclass(value):
            self.classes.append(type(value).__name__)
            settings = cast(Dataclass, value)
            given = {f.name: getattr(settings, f.name) for f in dataclasses.fields(settings)}
            texts = [f"{name}={self._literal(x)}" for name, x in given.items() if x is not None]
            return f"{type(value).__name__}({', '.join(texts)})"
        if isinstance(value, tuple):
            texts = [self._literal(each) for each in value]
            return f"({', '.join(texts)}{',' * (len(texts) == 1)})"
        if isinstance(value, str):
            return _quoted(value)
        if isinstance(value, int) and not isinstance(value, bool):
            return f"{value:_}"
        return repr(value)

    def _comment(self, path: str, depth: int) -> list[str]:
        if path not in self._why:
            return []
        start = f"{_INDENT * depth}# "
        # Names of columns may have any characters.
        text = " ".join(self._why[path].split())
        return textwrap.wrap(
            text, _WIDTH, initial_indent=start, subsequent_indent=start, break_on_hyphens=False
        )


def _quoted(text: str) -> str:
    """A string literal with double quotes, unless single ones need fewer backslashes."""
    literal = repr(text)
    if literal[0] == "'" and '"' not in literal:
        return f'"{literal[1:-1]}"'
    return literal
