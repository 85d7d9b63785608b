"""Consoles for tables on stdout."""

from typing import NoReturn

from rich.console import Console

# Width of output that does not go to a terminal.
_PIPE_WIDTH = 240


class OutputConsole(Console):
    """A console that raises `BrokenPipeError` when the reader of stdout has closed it.

    Rich would exit with code 1 instead. `exit.run_command` turns the error into the right exit code.
    """

    def on_broken_pipe(self) -> NoReturn:
        """Called by Rich in place of raising the error."""
        self.quiet = True
        raise BrokenPipeError


def wide_console() -> OutputConsole:
    """A console without highlighting. A terminal folds lines; other output may have long lines."""
    console = OutputConsole(highlight=False)
    if not console.is_terminal:
        console.width = _PIPE_WIDTH
    return console
