"""Parses command lines into a dataclass of arguments and overrides of configuration keys.

tyro converts the values and prints help. This module adds what tyro lacks: every mistake is reported in
one sentence, with a suggestion for a misspelt flag; the names of earlier versions are accepted; and
`--flag`, `--no_flag` and `--flag True` work in every command.
"""

import contextlib
import dataclasses
import difflib
import inspect
import io
import re
import shutil
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar

import tyro

from s2s_jax.cli.arguments import Argument, arguments_of
from s2s_jax.cli.command_list import COMMANDS
from s2s_jax.config import (
    IN_STORES,
    Config,
    FeatureConfig,
    load,
    load_file,
    refuse_addresses,
)
from s2s_jax.config.help import for_help, texts
from s2s_jax.errors import UserError

S = TypeVar("S")
C = TypeVar("C", bound="WithConfig")

_HELP = ("-h", "--help")
# Maximum width of help texts.
_WIDTH = 100
# Used for the help of keys if no config file is given; a configuration needs at least one feature.
_EXAMPLE = Config(features=(FeatureConfig(name="item_id", hash_bucket_size=1_000_000),))
_BOOLEANS = {"true": "True", "false": "False"}
# A one-letter flag, which no command has, or a flag that lacks a hyphen; but not a negative number.
_SHORT = re.compile(r"-[A-Za-z]\w*")


@dataclasses.dataclass(frozen=True, kw_only=True)
class WithConfig:
    """The arguments of a command that takes `--config FILE`."""

    config: Annotated[Path, tyro.conf.arg(metavar="FILE")]
    """Config file, such as configs/base.py. Any key can be overridden: --section.key VALUE"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class OfConfig(WithConfig):
    """The arguments of a command that takes the config file without a flag."""

    config: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FILE")]
    """Config file, such as configs/base.py. Any key can be overridden: --section.key VALUE"""


def parse(
    cls: type[S], argv: Sequence[str], command: str, old_names: Mapping[str, str] | None = None
) -> S | None:
    """The arguments of a command, or None if `--help` was given; help is then printed.

    Args:
      cls: the dataclass of the arguments; its docstrings are the help texts.
      argv: the words of the command line after the command.
      command: the name of the command.
      old_names: the current name of each argument that had another name in earlier versions.

    Raises:
      UserError: an argument is missing, unknown or wrong, or is an address instead of a local path.
    """
    if _asks_for_help(argv):
        _print_help(cls, command, None)
        return None
    return _read(cls, command, _split(cls, argv, command, old_names or {}, with_keys=False))


def parse_with_config(
    cls: type[C], argv: Sequence[str], command: str, old_names: Mapping[str, str] | None = None
) -> tuple[C, Config] | None:
    """The arguments of a command and its configuration, or None if `--help` was given.

    Args:
      cls: see `parse`.
      argv: see `parse`; arguments with a dot override keys of the configuration.
      command: see `parse`.
      old_names: see `parse`.

    Raises:
      UserError: see `parse`; or a key is unknown or has an impossible value.
    """
    given = parse_with_overrides(cls, argv, command, old_names)
    if given is None:
        return None
    arguments, overrides = given
    return arguments, load(arguments.config, overrides)


def parse_with_overrides(
    cls: type[S], argv: Sequence[str], command: str, old_names: Mapping[str, str] | None = None
) -> tuple[S, list[str]] | None:
    """The arguments of a command and the overrides of configuration keys, without loading a config file.

    Args:
      cls: see `parse`; it must have a field `config`.
      argv: see `parse_with_config`.
      command: see `parse`.
      old_names: see `parse`.

    Returns:
      None if `--help` was given; help is then printed.

    Raises:
      UserError: see `parse`; or there are overrides but no configuration.
    """
    if _asks_for_help(argv):
        file = _config_among(cls, argv, command)
        _print_help(cls, command, _EXAMPLE if file is None else load_file(file))
        return None
    words = _split(cls, argv, command, old_names or {}, with_keys=True)
    arguments = _read(cls, command, words)
    if words.overrides and vars(arguments)["config"] is None:
        raise UserError(f"{words.overrides[0]}: expected --config FILE as well, found none; add it")
    return arguments, words.overrides


class _Words(NamedTuple):
    """The words of a command line, sorted by purpose.

    Attributes:
      of_flag: the values of each flag that was given.
      positional: the values without a flag.
      overrides: the flags of configuration keys (those with a dot), and their values.
    """

    of_flag: dict[str, list[str]]
    positional: list[str]
    overrides: list[str]


def _split(
    cls: type, argv: Sequence[str], command: str, old_names: Mapping[str, str], with_keys: bool
) -> _Words:
    known = arguments_of(cls)
    words = _Words({}, [], [])
    left = list(argv)
    while left:
        word = left.pop(0)
        if not word.startswith("--"):
            if _SHORT.fullmatch(word):
                raise UserError(_no_such_option(word, known, command, with_keys))
            words.positional.append(word)
            continue
        flag, equals, value = word.partition("=")
        if with_keys and "." in flag:
            words.overrides.append(word)
            words.overrides.extend(_values(left))
            continue
        name = flag[2:].replace("-", "_")
        name = old_names[name] if name in old_names else name
        denied = name.removeprefix("no_")
        if name not in known and denied in known and known[denied].kind is bool and not equals:
            words.of_flag[denied] = ["False"]
        elif name not in known:
            raise UserError(_no_such_option(flag, known, command, with_keys))
        elif equals:
            words.of_flag[name] = [value]
        elif known[name].kind is bool:
            stated = bool(left) and left[0].lower() in _BOOLEANS
            words.of_flag[name] = [left.pop(0) if stated else "True"]
        elif known[name].takes_many:
            words.of_flag[name] = _values(left)
        else:
            words.of_flag[name] = [left.pop(0)] if left and not left[0].startswith("--") else []
    return words


def _values(left: list[str]) -> list[str]:
    """Removes the words before the next flag from `left`, and returns them."""
    count = next((n for n, word in enumerate(left) if word.startswith("--")), len(left))
    values = left[:count]
    del left[:count]
    return values


def _read(cls: type[S], command: str, words: _Words) -> S:
    known = arguments_of(cls)
    given = {name: list(values) for name, values in words.of_flag.items()}
    positional = list(words.positional)
    for argument in known.values():
        if argument.positional and positional and argument.name not in given:
            count = len(positional) if argument.takes_many else 1
            given[argument.name], positional = positional[:count], positional[count:]
    example = _example(known, command)
    if positional:
        raise UserError(f"{positional[0]}: expected a flag before it; give {example}")
    for name, values in given.items():
        if known[name].kind is bool:
            given[name] = [_BOOLEANS[v.lower()] if v.lower() in _BOOLEANS else v for v in values]
        if not _is_accepted(known[name], given[name]):
            found = " ".join(values) or "nothing"
            raise UserError(f"{known[name].place}: expected {known[name].kind_text}, found {found}")
    for argument in known.values():
        if argument.required and argument.name not in given:
            raise UserError(
                f"{argument.place}: expected {argument.kind_text}, found nothing; give {example}"
            )
    for name, values in given.items():
        place = known[name].place
        in_store = known[name].may_be_in_store or place in IN_STORES
        refuse_addresses(place, values, of_stores=not in_store)
    # Positional arguments come first: a flag with many values would take them as its own.
    names = sorted(given, key=lambda name: not known[name].positional)
    in_order = [word for name in names for word in _words(known[name], given[name])]
    return tyro.cli(cls, args=in_order, **_TYRO)


def _is_accepted(argument: Argument, values: Sequence[str]) -> bool:
    """Whether tyro accepts the values of an argument."""
    if not values or (argument.kind is Path and values == [""]):
        return False
    alone = dataclasses.make_dataclass("Alone", [(argument.name, argument.hint)])
    silence = io.StringIO()
    try:
        with contextlib.redirect_stderr(silence), contextlib.redirect_stdout(silence):
            tyro.cli(alone, args=_words(argument, values), **_TYRO)
    except SystemExit:
        return False
    return True


def _words(argument: Argument, values: Sequence[str]) -> list[str]:
    """An argument as words for tyro."""
    if argument.positional:
        return list(values)
    # With an equals sign, a value may begin with a hyphen.
    flag = f"--{argument.name}"
    return [f"{flag}={values[0]}"] if len(values) == 1 else [flag, *values]


_TYRO: dict[str, Any] = {
    "config": (tyro.conf.FlagConversionOff, tyro.conf.AvoidSubcommands),
    "use_underscores": True,
}


# ---------------------------------------------------------------------------- help and messages


def _asks_for_help(argv: Sequence[str]) -> bool:
    return any(word in _HELP for word in argv)


def _print_help(cls: type, command: str, config: Config | None) -> None:
    """Prints the arguments of a command and, after them, the keys of the configuration."""
    defaults = {field.name: field.default for field in dataclasses.fields(cls)}
    meanings = texts(cls)
    fields = [
        (
            argument.name,
            Annotated[
                argument.hint,
                tyro.conf.arg(
                    help=meanings[argument.name],
                    help_behavior_hint=_default_for_help(argument, defaults[argument.name]),
                ),
            ],
            dataclasses.field(default=defaults[argument.name]),
        )
        for argument in arguments_of(cls).values()
    ]
    if config is not None:
        shown = for_help(config)
        # With an empty name, so that help shows --io.seed and not --keys.io.seed.
        keys = Annotated[type(shown), tyro.conf.arg(name="")]
        fields.append(("keys", keys, dataclasses.field(default=shown)))
    made = dataclasses.make_dataclass(cls.__name__, fields, frozen=True, kw_only=True)
    width = min(shutil.get_terminal_size().columns, _WIDTH)
    details = " ".join((inspect.getdoc(cls) or "").split())
    # Indented, because tyro would join lines that begin with a letter.
    wrapped = textwrap.fill(details, width, initial_indent="  ", subsequent_indent="  ")
    text = f"{COMMANDS[command]}\n{wrapped}"
    with contextlib.suppress(SystemExit):
        tyro.cli(made, args=["--help"], prog=f"s2s {command}", description=text, **_TYRO)


def _default_for_help(argument: Argument, default: object) -> str | None:
    """The text about a default in help, where tyro would show nothing; None: tyro's own text."""
    if argument.required and argument.takes_many:
        return "(required)"
    return "(default: none)" if default == () else None


def _config_among(cls: type, argv: Sequence[str], command: str) -> str | None:
    """The config file on a command line with `--help`; None if there is none or the line is wrong."""
    try:
        words = _split(cls, [word for word in argv if word not in _HELP], command, {}, True)
    except UserError:
        return None
    if arguments_of(cls)["config"].positional:
        return next(iter(words.positional), None)
    return next(iter(words.of_flag["config"]), None) if "config" in words.of_flag else None


def _example(known: Mapping[str, Argument], command: str) -> str:
    """The shortest command line with all required arguments."""
    words = [
        each.shown if each.positional else f"--{each.name} {each.shown}"
        for each in sorted(known.values(), key=lambda each: not each.positional)
        if each.required
    ]
    return " ".join(["s2s", command, *words])


def _no_such_option(flag: str, known: Mapping[str, Argument], command: str, with_keys: bool) -> str:
    name = flag.lstrip("-").replace("-", "_")
    names = ["help", *(each for each, argument in known.items() if not argument.positional)]
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    if with_keys and (not close or name in _SECTIONS_OF):
        # Perhaps a configuration key without its section.
        keys = difflib.get_close_matches(name, _SECTIONS_OF, n=1, cutoff=0.8)
        close = [f"{_SECTIONS_OF[key]}.{key}" for key in keys] or close
    if close:
        return f"{flag}: no such option; did you mean --{close[0]}?"
    return f"{flag}: no such option; s2s {command} --help lists all"


def _sections_of_keys() -> dict[str, str]:
    """The first section that has a key, for each key of the configuration."""
    sections = {field.name: getattr(Config(), field.name) for field in dataclasses.fields(Config)}
    return {
        key.name: name
        for name, section in reversed(sections.items())
        if dataclasses.is_dataclass(section)
        for key in dataclasses.fields(section)
    }


_SECTIONS_OF = _sections_of_keys()
