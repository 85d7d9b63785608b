"""Dotted overrides on a command line: `--model.num_layers 4`, parsed by tyro.

Features and tables can be given by number or by name: `--features.0.emb_dim 64`,
`--tables.item_id.capacity 4096`. Keys with several kinds (see `choices`) take the name of a kind, and
its keys after another dot.
"""

import contextlib
import dataclasses
import difflib
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, TypeVar

import tyro

from s2s_jax.config import choices
from s2s_jax.config.checks.values import spell
from s2s_jax.config.old import keys as old_keys
from s2s_jax.config.schema import Config
from s2s_jax.errors import UserError

# Sections whose parts are given by number or by name.
NAMED = ("features", "tables")
_T = TypeVar("_T")
_BOOLEANS = {"true": "True", "false": "False"}


class _Override(NamedTuple):
    """A key given on the command line, with its values.

    Attributes:
      key: the dotted key, as given.
      words: the values.
    """

    key: str
    words: tuple[str, ...]

    @property
    def found(self) -> str:
        """The values as text for messages."""
        return " ".join(self.words) or "nothing"


def override(config: Config, arguments: Sequence[str]) -> Config:
    """Applies `arguments` (`["--model.nhead", "4", …]`) to `config`, without validation.

    Raises:
      UserError: a key is unknown or a value has another type; names the dotted path.
    """
    given = _read(arguments)
    # These are applied first, because other arguments may use the new names.
    naming = [each for each in given if re.fullmatch(r"features\..+\.(name|shard_name)", each.key)]
    if naming:
        renamed = _applied(config, naming)
        config = dataclasses.replace(renamed, tables=_tables_carried_over(config, renamed))
    return _applied(config, [each for each in given if each not in naming])


def suggest(word: str, known: Iterable[str]) -> str:
    """The end of a message about a key that does not exist."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else "; --help lists all keys"


def _read(arguments: Sequence[str]) -> list[_Override]:
    given: list[_Override] = []
    for argument in arguments:
        if argument.startswith("--"):
            key, equals, value = argument[2:].partition("=")
            given.append(_Override(key.replace("-", "_"), (value,) if equals else ()))
        elif given:
            key, words = given.pop()
            given.append(_Override(key, (*words, argument)))
        else:
            raise UserError(f"{argument}: expected --section.key value; --help lists all keys")
    return given


def _applied(config: Config, given: Sequence[_Override]) -> Config:
    config, given = _chosen(config, given)
    known = _hints(config)
    given = [_boolean(each, known) for each in given]
    for each in given:
        if each.key not in known:
            raise UserError(_no_such_key(config, each))
    for path, value in _choices_of(config):
        if value is None:
            continue
        for name in choices.required(type(value)):
            key = f"{path}.{name}"
            if getattr(value, name) is tyro.MISSING and key not in [each.key for each in given]:
                raise UserError(
                    f"{key}: expected {spell(known[key])} because {path} is {value.kind}, found "
                    f"nothing; give --{key} too"
                )
    arguments = [_arguments(config, each) for each in given]
    parsed = _parse_quietly(config, [word for words in arguments for word in words])
    if parsed is not None:
        return parsed
    for each, words in zip(given, arguments, strict=True):
        if _parse_quietly(config, words) is None:
            raise UserError(
                f"{each.key}: expected {spell(known[each.key])}, found {each.found}"
                f"{old_keys.of_value(each.key, each.found)}"
            )
    flags = " ".join(f"--{each.key} {' '.join(each.words)}" for each in given)
    raise UserError(f"{flags}: cannot be read together; --help lists all keys")


def _boolean(given: _Override, known: Mapping[str, object]) -> _Override:
    """Adds True or False to a flag without a value: `--io.shuffle`, `--io.no_shuffle`."""
    section, _, name = given.key.rpartition(".")
    denied = f"{section}.{name.removeprefix('no_')}"
    if given.key not in known and not given.words and denied in known and known[denied] is bool:
        return _Override(denied, ("False",))
    if given.key in known and known[given.key] is bool:
        words = given.words or ("True",)
        return given._replace(words=tuple(_BOOLEANS[w] if w in _BOOLEANS else w for w in words))
    return given


def _tables_carried_over(before: Config, now: Config) -> tuple:
    """The tables after features were renamed: the new table has the settings of the old one."""
    of_new = {
        new.table_name: dataclasses.replace(before.table(old.table_name), name=new.table_name)
        for old, new in reversed(list(zip(before.features, now.features, strict=True)))
    }
    kept = {table.name: table for table in before.tables if table.name in of_new}
    return tuple((of_new | kept).values())


# ------------------------------------------------------------------------------- names of parts


def _names(config: Config) -> Iterable[tuple[str, int, str]]:
    """Section, number and name of each feature and table."""
    for section in NAMED:
        for number, part in enumerate(getattr(config, section)):
            yield section, number, part.name


def _by_number(config: Config, key: str) -> str:
    """`key` with the name of a feature or table replaced by its number."""
    if not re.match(rf"({'|'.join(NAMED)})\.\d+\.", key):
        found = [each for each in _names(config) if key.startswith(_prefix(each))]
        if found:
            # A name may begin with another one and a dot.
            named = max(found, key=lambda each: len(each[2]))
            _refuse_alike(key, named, found)
            section, number, _ = named
            return f"{section}.{number}.{key.removeprefix(_prefix(named))}"
    return key


def _prefix(named: tuple[str, int, str]) -> str:
    """What keys of a feature or a table begin with. Hyphens in given keys have become underscores."""
    section, _, name = named
    return f"{section}.{name.replace('-', '_')}."


def _refuse_alike(
    key: str, named: tuple[str, int, str], found: Iterable[tuple[str, int, str]]
) -> None:
    """Refuses a key that belongs to two features or tables."""
    for other in found:
        if other != named and _prefix(other) == _prefix(named):
            section, number, name = named
            raise UserError(
                f"{key}: expected one of {section}, found two whose names differ only in - and _ "
                f"({name} and {other[2]}); give the number of one, such as {section}.{number}."
            )


def _hints(config: Config) -> dict[str, object]:
    """The type of each key, by dotted path; features and tables both by number and by name."""
    hints = _hints_of(config, "")
    for section, number, name in _names(config):
        numbered = f"{section}.{number}."
        named = _prefix((section, number, name))
        hints |= {
            named + key.removeprefix(numbered): hint
            for key, hint in list(hints.items())
            if key.startswith(numbered)
        }
    return hints


def _hints_of(part: object, prefix: str) -> dict[str, object]:
    hints: dict[str, object] = {}
    for name, hint in choices.types_of(type(part)).items():
        value, path = getattr(part, name), prefix + name
        if path in NAMED:
            for number, each in enumerate(value):
                hints |= _hints_of(each, f"{path}.{number}.")
        elif dataclasses.is_dataclass(value):
            hints |= _hints_of(value, path + ".")
        elif not choices.kinds(hint):
            hints[path] = hint
    return hints


# ------------------------------------------------------------------------------------- choices


def all_choices(config: Config) -> dict[str, dict[str, type | None]]:
    """The kinds of every key with several kinds, by path."""
    found = {}
    for section in dataclasses.fields(config):
        part = getattr(config, section.name)
        if dataclasses.is_dataclass(part):
            for name, hint in choices.types_of(type(part)).items():
                if choices.kinds(hint):
                    found[f"{section.name}.{name}"] = choices.kinds(hint)
    return found


def _choices_of(config: Config) -> Iterable[tuple[str, choices.Kind | None]]:
    """The path and value of every key with several kinds."""
    for path in all_choices(config):
        section, name = path.split(".")
        yield path, getattr(getattr(config, section), name)


def _chosen(config: Config, given: Sequence[_Override]) -> tuple[Config, list[_Override]]:
    """Applies chosen kinds; returns the configuration and all other arguments.

    If the configuration already has the chosen kind, it keeps its values.
    """
    of_path, others = all_choices(config), []
    for each in given:
        if each.key not in of_path:
            others.append(each)
            continue
        kinds = of_path[each.key]
        wanted = choices.NONE if each.words == ("None",) else each.found
        if wanted not in kinds:
            raise UserError(f"{each.key}: expected one of {', '.join(kinds)}, found {each.found}")
        section, name = each.key.split(".")
        part = getattr(config, section)
        if choices.kind_of(getattr(part, name)) != wanted:
            cls = kinds[wanted]
            missing = dict.fromkeys(choices.required(cls), tyro.MISSING) if cls else {}
            part = dataclasses.replace(part, **{name: cls(**missing) if cls else None})
            config = dataclasses.replace(config, **{section: part})
    return config, others


def _no_such_key(config: Config, given: _Override) -> str:
    renamed = old_keys.on_command_line(given.key, given.found, config)
    if renamed is not None:
        return renamed
    known = list(_hints(config))
    for path, value in _choices_of(config):
        for kind, cls in all_choices(config)[path].items():
            keys = [f"{path}.{field.name}" for field in dataclasses.fields(cls)] if cls else []
            if given.key in keys:
                return (
                    f"{given.key}: expected no such key where {path} is {choices.kind_of(value)}, "
                    f"found {given.found}; add --{path} {kind}, which has it"
                )
            known += keys
    return f"{given.key}: no such key{suggest(given.key, [*known, *all_choices(config)])}"


# ---------------------------------------------------------------------------------------- tyro


def parse(cls: type[_T], default: _T, arguments: Sequence[str], prog: str) -> _T:
    """Applies `arguments` to `default`, with tyro, which prints mistakes and exits."""
    return tyro.cli(
        cls,
        default=default,
        args=arguments,
        prog=prog,
        config=(tyro.conf.FlagConversionOff, tyro.conf.AvoidSubcommands),
        use_underscores=True,
    )


def _parse_quietly(config: Config, arguments: Sequence[str]) -> Config | None:
    silence = io.StringIO()
    try:
        with contextlib.redirect_stderr(silence), contextlib.redirect_stdout(silence):
            return parse(Config, config, arguments, "s2s_jax")
    except SystemExit:
        return None


def _arguments(config: Config, given: _Override) -> list[str]:
    """An argument in the form that tyro accepts."""
    key = f"--{_by_number(config, given.key)}"
    # In this form, a value may begin with a hyphen.
    return [f"{key}={given.words[0]}"] if len(given.words) == 1 else [key, *given.words]
