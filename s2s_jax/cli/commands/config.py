"""What a configuration resolves to: `s2s config FILE [--section.key value …]`."""

import dataclasses

from s2s_jax.cli.parsing import OfConfig, parse_with_config
from s2s_jax.errors import EXIT_DONE


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments(OfConfig):
    """Prints what stands in the config.json of a run: every key, with the overrides applied."""


def main(argv: list[str]) -> int:
    """Runs the command line `argv` and returns the exit code.

    Raises:
      UserError: see `exit.run_command`.
    """
    given = parse_with_config(Arguments, argv, "config")
    if given is not None:
        print(given[1].to_json(), end="")
    return EXIT_DONE
