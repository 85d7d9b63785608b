"""What ORC logs hold: `s2s inspect FILE_OR_DIR… [--config FILE] [--rows 3]`."""

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
    """Prints the files, every column with its counts, how long rows are and how large stripes, what
    times, users and ids say, the first rows, and what to mend. Takes any ORC file, readable by
    training or not. Ends with code 2 if anything could not be read.
    """

    config: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Config file, to see how its features take the columns: units of times, ids that share rows. Any of
    its keys may be overridden: --section.key VALUE"""


def main(argv: list[str]) -> int:
    """Runs the command line `argv` and returns the exit code: 2 if anything could not be read.

    Raises:
      UserError: no file is named, or one does not exist.
    """
    given = parse_with_overrides(Arguments, argv, "inspect")
    if given is None:
        return EXIT_DONE
    arguments, overrides = given
    config = None if arguments.config is None else read(arguments.config, overrides)
    return EXIT_DONE if inspect(arguments, config, wide_console()) else EXIT_USER_ERROR
