"""The errors that are a user's to mend, and the exit codes of the command-line doors."""

import os
import signal
import sys
from collections.abc import Callable

EXIT_DONE = 0
EXIT_USER_ERROR = 2
EXIT_NOT_FINITE = 3
EXIT_STOPPED = 75


class UserError(Exception):
    """A mistake in the configuration, the command or the data, told in one sentence.

    The sentence names the place (dotted config path, or file, stripe, row and column), what was
    expected, what was found, and what to do about it.
    """


class MachineError(UserError):
    """Data could not be read because of this machine, not because of the data.

    Too little memory, a missing permission, too many open files, no time zones: other files would fail
    alike, so nothing is skipped for it, whatever `io.on_error` says.
    """


class NotFiniteError(Exception):
    """The loss or the gradient stopped being a finite number."""


class LostHostError(Exception):
    """Another process of the job is gone, so that this one cannot go on."""


_EXIT_CODES = {
    UserError: EXIT_USER_ERROR,
    NotFiniteError: EXIT_NOT_FINITE,
    LostHostError: EXIT_STOPPED,
}


def explain(error: Exception) -> int:
    """Prints one line about an error of this module and returns the exit code; raises any other."""
    for kind, code in _EXIT_CODES.items():
        if isinstance(error, kind):
            print(f"error: {error}", file=sys.stderr, flush=True)
            return code
    raise error


def run_door(main: Callable[[list[str]], int]) -> None:
    """Runs a command-line door and exits with its code; a `UserError` prints one line.

    Ends as other programs do, without a word, when whoever reads its output wants no more of it.
    """
    try:
        try:
            code = main(sys.argv[1:])
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        # What is left would be written, and fail again, when Python ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 128 + signal.SIGPIPE
    except Exception as error:
        code = explain(error)
    sys.exit(code)
