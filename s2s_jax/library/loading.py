"""Loads configurations in Python programs."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from s2s_jax import config as configs
from s2s_jax.config import Config


def load(
    config_file: str | os.PathLike[str], overrides: Mapping[str, Any] | Sequence[str] = ()
) -> Config:
    """Loads a config file, changes some of its keys, and validates it.

    Args:
      config_file: a Python file with `get_config() -> Config`, such as `configs/base.py`.
      overrides: values by dotted key, or a list of arguments as on the command line.

    Raises:
      UserError: the file cannot be loaded, a key does not exist, or a value is impossible.

    Examples:
      >>> config = load("configs/quickstart.py", {"model.num_layers": 1, "lr.clip_norm": None})
      >>> config.model.num_layers
      1
      >>> config == load("configs/quickstart.py", ["--model.num_layers", "1"])
      True
    """
    if isinstance(overrides, Mapping):
        overrides = [word for key, value in overrides.items() for word in _words(key, value)]
    return configs.load(Path(config_file), list(overrides))


def _words(key: str, value: Any) -> list[str]:
    """The same setting as arguments of a command line."""
    if isinstance(value, tuple | list):
        return [f"--{key}", *map(str, value)]
    # A single word, because a text may begin like an option.
    return [f"--{key}={value}"]
