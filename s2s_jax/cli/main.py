"""The program `s2s COMMAND …`, which is the same as `python -m s2s_jax COMMAND …`."""

import difflib
import importlib
import sys
from collections.abc import Callable, Sequence

from s2s_jax import signals
from s2s_jax.cli.command_list import COMMANDS
from s2s_jax.cli.exit import run_command
from s2s_jax.errors import EXIT_DONE, UserError
from s2s_jax.version import __version__

_HELP = """usage: s2s COMMAND [ARGUMENTS]

Trains sequence models of user behaviour on event logs, evaluates them and writes recommendations.

commands:
{commands}

s2s COMMAND --help lists the arguments of a command and, if it reads a config file, the keys of the file.
To turn a flag on, give --flag or --flag True. To turn it off, give --no_flag or --flag False. For a key
of the config file, give --section.key or --section.key True, or --section.no_key or --section.key False.
"""


def main(argv: list[str]) -> int:
    """Runs the command that `argv` names and returns the exit code.

    Raises:
      UserError: there is no such command, or the command raises it.
    """
    if argv[:1] in (["-h"], ["--help"]):
        width = max(map(len, COMMANDS))
        lines = [f"  {name:{width}}  {text}" for name, text in COMMANDS.items()]
        print(_HELP.format(commands="\n".join(lines)), end="")
        return EXIT_DONE
    if argv[:1] == ["--version"]:
        print(f"s2s_jax {__version__}")
        return EXIT_DONE
    command = _main_of(argv)
    if command is None:
        raise UserError(_no_command(argv))
    return command(argv[1:])


def run() -> None:
    """Runs the command line of this process and exits."""
    signals.handle_while_starting()
    # Imports that take seconds happen here, before signals raise exceptions.
    _main_of(sys.argv[1:])
    run_command(main)


def _main_of(argv: Sequence[str]) -> Callable[[list[str]], int] | None:
    """The `main` of the command that `argv` names; None if there is no such command."""
    if not argv or argv[0] not in COMMANDS:
        return None
    return importlib.import_module(f"s2s_jax.cli.commands.{argv[0]}").main


def _no_command(argv: Sequence[str]) -> str:
    expected = f"s2s: expected a command ({', '.join(COMMANDS)})"
    if not argv:
        return f"{expected}, found nothing; s2s --help describes them"
    close = difflib.get_close_matches(argv[0], COMMANDS, n=1, cutoff=0.5)
    remedy = f"did you mean {close[0]}?" if close else "s2s --help describes them"
    return f"{expected}, found {argv[0]}; {remedy}"
