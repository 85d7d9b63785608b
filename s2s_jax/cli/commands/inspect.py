"""Shows what ORC logs contain: `s2s inspect FILE_OR_DIR… [--config FILE] [--rows 3]`."""

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from s2s_jax.cli.console import wide_console
from s2s_jax.cli.parsing import parse_with_overrides
from s2s_jax.config.loading import read
from s2s_jax.data.inspection.inspect import Settings, inspect
from s2s_jax.errors import EXIT_DONE, EXIT_USER_ERROR


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments(Settings):
    """Prints the files, statistics of every column, the lengths of rows, the sizes of stripes, facts
    about times, users and ids, the first rows, and warnings with their remedies. Takes any ORC file,
    even one that training cannot read. Ends with code 2 if anything could not be read.
    """

    config: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Config file, to check how its features read the columns: units of times, ids that share rows. Any
    key can be overridden: --section.key VALUE"""


def main(argv: list[str]) -> int:
    """Runs the command line `argv` and returns the exit code: 2 if anything could not be read.

    Raises:
      UserError: the command line or the configuration is wrong, or a file does not exist.
    """
    given = parse_with_overrides(Arguments, argv, "inspect")
    if given is None:
        return EXIT_DONE
    arguments, overrides = given
    config = None if arguments.config is None else read(arguments.config, overrides)
    return EXIT_DONE if inspect(arguments, config, wide_console()) else EXIT_USER_ERROR
