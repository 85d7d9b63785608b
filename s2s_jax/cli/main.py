"""One command: `s2s COMMAND …`, the same as `python -m s2s_jax COMMAND …`."""

import importlib

from s2s_jax import signals
from s2s_jax.errors import UserError, run_door

# Command → the module whose `main(argv) -> int` it runs, imported when it is asked for.
_MODULES = {
    "train": "s2s_jax.cli.train",
    "evaluate": "s2s_jax.cli.evaluate",
    "recommend": "s2s_jax.cli.recommend",
    "report": "s2s_jax.cli.report",
    "convert": "s2s_jax.data.conversion.convert",
    "inspect": "s2s_jax.data.inspection.inspect",
    "catalogue": "s2s_jax.data.items.catalogue",
    "synthesize": "s2s_jax.data.logs.synthesize",
    "tables": "s2s_jax.cli.tables",
}


def main(argv: list[str]) -> int:
    """Runs the command that `argv` begins with and returns the exit code.

    Raises:
      UserError: there is no such command; else as the command does.
    """
    commands = " ".join(_MODULES)
    if argv[:1] in (["-h"], ["--help"]):
        print(f"usage: s2s COMMAND …\n\nCommands: {commands}")
        return 0
    if not argv or argv[0] not in _MODULES:
        found = argv[0] if argv else "nothing"
        raise UserError(f"s2s: expected one of {commands}, found {found}")
    return importlib.import_module(_MODULES[argv[0]]).main(argv[1:])


def run() -> None:
    """Runs the command line of this process."""
    signals.answer_while_starting()
    run_door(main)
