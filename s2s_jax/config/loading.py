"""Loads a config file, applies command-line overrides, and validates the result.

A config file is Python with a function `get_config() -> Config`; it can start from another config file
with `load_file` and `dataclasses.replace`. `load` applies dotted overrides from the command line:

    config = load("configs/base.py", ["--model.num_layers", "4"])
"""

import dataclasses
import importlib.util
import json
import re
import typing
from pathlib import Path

from s2s_jax.config import choices
from s2s_jax.config.checks.addresses import refuse_addresses
from s2s_jax.config.checks.configuration import validate
from s2s_jax.config.features import FeatureConfig, TableConfig
from s2s_jax.config.old import keys as old_keys
from s2s_jax.config.old.format import to_present_format
from s2s_jax.config.overrides import override, suggest
from s2s_jax.config.plain import from_plain
from s2s_jax.config.schema import Config
from s2s_jax.errors import UserError
from s2s_serve.storage.address import Place


def load_file(path: str | Path) -> Config:
    """Runs the config file at `path` and returns the result of `get_config()`, without validation.

    Raises:
      UserError: the file is missing, fails, has no `get_config`, or uses a key that does not exist.
    """
    refuse_addresses("--config", path)
    path = Path(path)
    if not path.is_file():
        raise UserError(
            f"--config: {path} does not exist or is not a file; give a config such as configs/base.py"
        )
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
    """Loads the config file at `path`, applies `overrides` (`["--model.nhead", "4", …]`) and validates.

    Raises:
      UserError: a key is unknown or a value is impossible; names the dotted path.
    """
    config = read(path, overrides)
    validate(config)
    return config


def read(path: str | Path, overrides: list[str] | None = None) -> Config:
    """The same as `load`, without validation.

    Raises:
      UserError: a key is unknown or a value has another type; names the dotted path.
    """
    config = load_file(path)
    return override(config, overrides) if overrides else config


def load_json(path: Place) -> Config:
    """The configuration that a run wrote to its `config.json`.

    Raises:
      UserError: the file does not exist, or is not of this or an earlier version.
    """
    if not path.is_file():
        raise UserError(
            f"{path.parent}: expected the directory of a run, found no {path.name} in it; give the "
            f"train.output_dir of a run"
        )
    try:
        config = parse_json(path.read_text())
        validate(config)
    except (OSError, ValueError, TypeError, KeyError, UserError) as error:
        raise UserError(
            f"{path}: expected the configuration of a run of this version of s2s_jax or an earlier one "
            f"({error}); give the directory of such a run"
        ) from error
    return config


def parse_json(text: str) -> Config:
    """Parses the output of `Config.to_json`, without validation; missing keys have their defaults.

    Raises:
      ValueError, TypeError, KeyError: it is not a configuration, or of a newer version.
    """
    return from_plain(Config, to_present_format(json.loads(text)))


def _explain_keyword(path: Path, error: TypeError) -> str:
    """A message for Python's error about a wrong or missing keyword."""
    found = re.match(r"(\w+)\.__init__\(\) (got an unexpected|missing .*)", str(error))
    places = _places()
    if not found or found[1] not in places:
        return f"--config: {path} failed with TypeError: {error}"
    cls, section = places[found[1]]
    first, *_ = re.findall(r"'(\w+)'", str(error))
    key = f"{section}.{first}".removeprefix(".")
    if found[2] != "got an unexpected":
        return f"{key}: expected a value in {path}, found nothing; write {found[1]}({first}=…)"
    renamed = old_keys.in_file(key, path)
    if renamed is not None:
        return renamed
    return (
        f"{key}: no such key in {path}{suggest(first, [f.name for f in dataclasses.fields(cls)])}"
    )


def _places() -> dict[str, tuple[type, str]]:
    """Every dataclass of a configuration, and its path in the configuration, by name."""
    places: dict[str, tuple[type, str]] = {
        "Config": (Config, ""),
        "FeatureConfig": (FeatureConfig, "features.N"),
        "TableConfig": (TableConfig, "tables.NAME"),
    }
    for section, hint in choices.types_of(Config).items():
        if dataclasses.is_dataclass(hint):
            cls = typing.cast(type, hint)
            places[cls.__name__] = (cls, section)
            for name, of_field in choices.types_of(cls).items():
                for kind in choices.kinds(of_field).values():
                    if kind is not None:
                        places[kind.__name__] = (kind, f"{section}.{name}")
    return places
