"""Prints the final configuration: `s2s config FILE [--section.key value …]`."""

import dataclasses

from s2s_jax.cli.parsing import OfConfig, parse_with_config
from s2s_jax.errors import EXIT_DONE


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments(OfConfig):
    """Prints every key with its value, after overrides, as in the config.json of a run."""


def main(argv: list[str]) -> int:
    """Runs the command line `argv` and returns the exit code.

    Raises:
      UserError: the command line, the configuration or the data is wrong.
    """
    given = parse_with_config(Arguments, argv, "config")
    if given is not None:
        print(given[1].to_json(), end="")
    return EXIT_DONE
