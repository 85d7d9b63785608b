"""Writes a first configuration for a log: `s2s init FILE_OR_DIR… --output FILE`."""

import shlex

from s2s_jax.cli.parsing import parse
from s2s_jax.errors import EXIT_DONE
from s2s_jax.planning.first_config import Settings, make


def main(argv: list[str]) -> int:
    """Runs the command line `argv` and returns the exit code.

    Raises:
      UserError: the command line or the log is wrong, or training fails.
    """
    settings = parse(Settings, argv, "init", {"out": "output"})
    if settings is None:
        return EXIT_DONE
    for sentence in make(settings):
        print(sentence)
    print(f"to train: s2s train --config {shlex.quote(str(settings.output))}")
    return EXIT_DONE
