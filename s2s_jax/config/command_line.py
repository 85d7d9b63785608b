"""Command lines of the doors: arguments of their own and, for most, `--config` with dotted overrides."""

import argparse
from typing import Any, NoReturn

from s2s_jax.config.addresses import refuse_addresses
from s2s_jax.config.features import FeatureConfig
from s2s_jax.config.help import print_help
from s2s_jax.config.loading import load, load_file
from s2s_jax.config.schema import Config
from s2s_jax.errors import UserError


class Parser(argparse.ArgumentParser):
    """Arguments of a door, which never end the process: mistakes are `UserError`s."""

    def __init__(self, door: str, example: str, add_help: bool = True):
        """Makes a parser without arguments.

        Args:
          door: module, as in `python -m s2s_jax.train`.
          example: arguments that a mistake's sentence tells to give.
          add_help: whether `-h` and `--help` print its arguments and end the process.
        """
        super().__init__(prog=door, allow_abbrev=False, add_help=add_help)
        self._example = example

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """As argparse does; refuses addresses in all arguments, before anything is done with one."""
        values, others = super().parse_known_args(args, namespace)
        for action in self._actions:
            name = action.option_strings[-1] if action.option_strings else action.dest.upper()
            refuse_addresses(name, getattr(values, action.dest, None))
        return values, others

    def error(self, message: str) -> NoReturn:
        """Raises what argparse would print."""
        raise UserError(f"{message}; give {self._example}")


class ConfigParser(Parser):
    """Arguments of a door that takes a config file, and overrides of its keys after it."""

    def __init__(self, door: str, example: str):
        """As `Parser`."""
        super().__init__(door, example, add_help=False)
        self.add_argument("--config", required=True, metavar="FILE", help="such as configs/base.py")
        self.add_argument(
            "-h", "--help", action="store_true", help="print this and all keys of FILE"
        )

    def read(self, argv: list[str]) -> tuple[argparse.Namespace, Config] | None:
        """The door's own arguments and the configuration; None: help was asked for, and is printed.

        Raises:
          UserError: an argument is missing, unknown or wrong.
        """
        if "-h" in argv or "--help" in argv:
            self._print_all(argv)
            return None
        arguments, overrides = self.parse_known_args(argv)
        return arguments, load(arguments.config, overrides)

    def _print_all(self, argv: list[str]) -> None:
        only_config = Parser(self.prog, self._example, add_help=False)
        only_config.add_argument("--config")
        path = only_config.parse_known_args(argv)[0].config
        # A config must have a feature.
        example = Config(features=(FeatureConfig(name="item_id", hash_bucket_size=1_000_000),))
        print(self.format_help())
        print_help(load_file(path) if path else example, self.prog)
