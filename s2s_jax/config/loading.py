"""Config files and command-line overrides → a validated `Config`.

A config file is Python with a function `get_config() -> Config`; it derives from another one by
`load_file` and `dataclasses.replace`. `load` adds dotted overrides from the command line:

    config = load("configs/base.py", ["--model.num_layers", "4"])
"""

import contextlib
import dataclasses
import difflib
import importlib.util
import io
import json
import re
import typing
from pathlib import Path
from typing import Any

import tyro

from s2s_jax.config import schema
from s2s_jax.config.addresses import refuse_addresses
from s2s_jax.config.schema import Config
from s2s_jax.config.validation import spell, validate
from s2s_jax.errors import UserError

_SECTION_OF_CLASS = {
    "IOConfig": "io.",
    "FeatureConfig": "features.N.",
    "ModelConfig": "model.",
    "LRConfig": "lr.",
    "LossConfig": "loss.",
    "TrainConfig": "train.",
    "EvalConfig": "eval.",
    "Config": "",
}


def load_file(path: str | Path) -> Config:
    """Runs the config file at `path` and returns what its `get_config()` returns, not validated.

    Raises:
      UserError: the file is missing, fails, has no `get_config`, or uses a key that does not exist.
    """
    refuse_addresses("--config", path)
    path = Path(path)
    if not path.is_file():
        raise UserError(f"--config: {path} is no file; give a config such as configs/base.py")
    spec = importlib.util.spec_from_file_location(f"s2s_jax_config_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise UserError(f"--config: {path} is not a Python file (its name must end in .py)")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        if not hasattr(module, "get_config"):
            raise UserError(f"--config: {path} defines no get_config() -> Config")
        config = module.get_config()
    except UserError:
        raise
    except TypeError as error:
        raise UserError(_explain_keyword(path, error)) from error
    except Exception as error:
        raise UserError(f"--config: {path} failed with {type(error).__name__}: {error}") from error
    if not isinstance(config, Config):
        raise UserError(
            f"--config: get_config() of {path} returned {type(config).__name__}, expected Config"
        )
    return config


def load(path: str | Path, overrides: list[str] | None = None) -> Config:
    """The config file at `path` with `overrides` (`["--model.nhead", "4", …]`) applied, validated.

    Raises:
      UserError: an unknown key or an impossible value, named by its dotted path.
    """
    config = load_file(path)
    if overrides:
        config = _override(config, overrides)
    validate(config)
    return config


def load_json(path: Path) -> Config:
    """The configuration that a run wrote to its `config.json`.

    Raises:
      UserError: there is none, or it is not of this version.
    """
    try:
        config = parse_json(path.read_text())
        validate(config)
    except (OSError, ValueError, TypeError, KeyError, UserError) as error:
        raise UserError(
            f"{path}: expected the configuration of a run of this version of s2s_jax ({error}); give "
            f"the directory of such a run"
        ) from error
    return config


def parse_json(text: str) -> Config:
    """The configuration that `Config.to_json` wrote, not validated; keys it lacks have their defaults.

    Raises:
      ValueError, TypeError, KeyError: it is no configuration, or of a newer version.
    """
    return _from_json(Config, json.loads(text))


def _from_json(cls: type, values: dict[str, Any]) -> Any:
    """A dataclass from what `dataclasses.asdict` and JSON made of it: lists become tuples again."""
    read: dict[str, Any] = {}
    hints = typing.get_type_hints(cls)
    for name, value in values.items():
        if name == "features":
            read[name] = tuple(_from_json(schema.FeatureConfig, each) for each in value)
        elif isinstance(value, dict):
            read[name] = _from_json(hints[name], value)
        else:
            read[name] = tuple(value) if isinstance(value, list) else value
    return cls(**read)


def print_help(config: Config, prog: str) -> None:
    """Prints every key with its type, default (the value in `config`) and meaning."""
    with contextlib.suppress(SystemExit):
        _parse(config, ["--help"], prog)


def _parse(config: Config, arguments: list[str], prog: str) -> Config:
    return tyro.cli(
        Config,
        default=config,
        args=arguments,
        prog=prog,
        config=(tyro.conf.FlagConversionOff, tyro.conf.AvoidSubcommands),
        use_underscores=True,
    )


def _override(config: Config, arguments: list[str]) -> Config:
    known = _hints(config)
    groups: list[list[str]] = []
    for argument in arguments:
        if argument.startswith("--"):
            key = _key(argument)
            if key not in known:
                raise UserError(f"{key}: no such key{_suggest(key, known)}")
            groups.append([argument])
        elif groups:
            groups[-1].append(argument)
        else:
            raise UserError(f"{argument}: expected --section.key value; --help lists all keys")
    parsed = _parse_quietly(config, arguments)
    if parsed is not None:
        return parsed
    for group in groups:
        if _parse_quietly(config, group) is None:
            found = " ".join(group[0].split("=")[1:] + group[1:]) or "nothing"
            key = _key(group[0])
            raise UserError(f"{key}: expected {spell(known[key])}, found {found}")
    raise UserError(f"{' '.join(arguments)}: cannot be read together; --help lists all keys")


def _key(argument: str) -> str:
    return argument[2:].split("=")[0].replace("-", "_")


def _parse_quietly(config: Config, arguments: list[str]) -> Config | None:
    silence = io.StringIO()
    try:
        with contextlib.redirect_stderr(silence), contextlib.redirect_stdout(silence):
            return _parse(config, arguments, "s2s_jax")
    except SystemExit:
        return None


def _hints(config: Any, prefix: str = "") -> dict[str, Any]:
    """The type of each leaf of a config by dotted path."""
    hints: dict[str, Any] = {}
    for name, hint in typing.get_type_hints(type(config)).items():
        value, path = getattr(config, name), prefix + name
        if dataclasses.is_dataclass(value):
            hints |= _hints(value, path + ".")
        elif name == "features":
            for i, feature in enumerate(value):
                hints |= _hints(feature, f"{path}.{i}.")
        else:
            hints[path] = hint
    return hints


def _explain_keyword(path: Path, error: TypeError) -> str:
    found = re.match(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", str(error))
    if not found or found.group(1) not in _SECTION_OF_CLASS:
        return f"--config: {path} failed with TypeError: {error}"
    cls = getattr(schema, found.group(1))
    section, key = _SECTION_OF_CLASS[found.group(1)], found.group(2)
    names = [f.name for f in dataclasses.fields(cls)]
    return f"{section}{key}: no such key in {path}{_suggest(key, names)}"


def _suggest(word: str, known: typing.Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else "; --help lists all keys"
