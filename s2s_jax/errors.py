"""Errors that a user can fix, and the exit codes of the commands."""

import errno
import sys

from s2s_serve.errors import MachineError as MachineError
from s2s_serve.errors import UserError as UserError

EXIT_DONE = 0
EXIT_USER_ERROR = 2
EXIT_NOT_FINITE = 3
EXIT_STOPPED = 75


class NotFiniteError(Exception):
    """The loss or the gradient is no longer finite."""


class Stopped(BaseException):
    """A signal asked the program to end; the argument is the signal's name.

    It is not an `Exception`, so that nothing mistakes it for a failure of the interrupted work.
    """


class LostHostError(Exception):
    """Another process of the job is gone, so this one cannot continue."""


# Errors of reading and writing files that are no fault of the program or its input.
_OF_THE_MACHINE = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EIO,
    errno.ESTALE,
    errno.EMFILE,
    errno.ENFILE,
}
_EXIT_CODES = {
    UserError: EXIT_USER_ERROR,
    NotFiniteError: EXIT_NOT_FINITE,
    LostHostError: EXIT_STOPPED,
}


def explain(error: BaseException) -> int:
    """Prints one line about an error and returns the exit code; re-raises errors that are bugs.

    It explains the errors of this module, and those of the machine, such as a full disk.
    """
    if isinstance(error, Stopped):
        print(f"stopped by {error}; start again", file=sys.stderr, flush=True)
        return EXIT_STOPPED
    for kind, code in _EXIT_CODES.items():
        if isinstance(error, kind):
            print(f"error: {error}", file=sys.stderr, flush=True)
            return code
    if isinstance(error, OSError) and error.errno in _OF_THE_MACHINE:
        where = "a file" if error.filename is None else error.filename
        print(
            f"error: {where}: {error.strerror}; fix this and start again",
            file=sys.stderr,
            flush=True,
        )
        return EXIT_USER_ERROR
    raise error
