"""Errors that a user can fix, and the exit codes of the commands."""

import atexit
import contextlib
import errno
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType

EXIT_DONE = 0
EXIT_USER_ERROR = 2
EXIT_NOT_FINITE = 3
EXIT_STOPPED = 75


class UserError(Exception):
    """A mistake in the configuration, the command or the data, described in one sentence.

    The sentence says where the mistake is (dotted config path, or file, stripe, row and column), what
    was expected, what was found, and what to do about it.
    """


class MachineError(UserError):
    """Data could not be read because of this machine, not because of the data.

    Examples are too little memory, a missing permission, too many open files or missing time zones.
    Other files would fail in the same way, so nothing is skipped, whatever `io.on_error` says.
    """


class NotFiniteError(Exception):
    """The loss or the gradient is no longer finite."""


class Stopped(BaseException):
    """A signal asked the program to end; the argument is the signal's name.

    It is not an `Exception`, so that nothing mistakes it for a failure of the interrupted work.
    """


class LostHostError(Exception):
    """Another process of the job is gone, so this one cannot continue."""


# Errors of reading and writing files that may occur although the program and its input are right.
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


@contextlib.contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """Within it, SIGTERM and SIGINT raise `Stopped`, unless the program handles them itself.

    `Stopped` may be raised anywhere. This is harmless, because files are moved into place only once they
    are complete.
    """

    def stop(number: int, _: FrameType | None) -> None:
        raise Stopped(signal.Signals(number).name)

    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT):
            if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                before[number] = signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_door(main: Callable[[list[str]], int]) -> None:
    """Runs a command and exits with its exit code; a `UserError` prints one line.

    Exits quietly if stdout is closed early (SIGPIPE).
    """
    try:
        try:
            with _stopped_by_signals():
                code = main(sys.argv[1:])
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        # Otherwise Python would try to write the rest on exit, and fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 128 + signal.SIGPIPE
    except (Exception, Stopped) as error:
        code = explain(error)
    if code == EXIT_STOPPED:
        # Everything is saved and written, so other threads (for example a compilation) need not finish.
        sys.stderr.flush()
        os._exit(code)
    # Python resets signal handlers while it exits, so a late signal would change the exit code.
    atexit.register(_ignore_signals)
    sys.exit(code)


def _ignore_signals() -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
