"""The errors that are a user's to mend, and the exit codes of the command-line doors."""

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


class Stopped(BaseException):
    """A signal, which it names, asked the program to end.

    No `Exception`, so that nothing takes it for a failure of what it interrupts.
    """


class LostHostError(Exception):
    """Another process of the job is gone, so that this one cannot go on."""


# What keeps a file from being written or read though the program and its input may be right.
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
    """Prints one line about an error and returns the exit code; raises what is a fault of the program.

    Explained are the errors of this module, and those of the machine: a full disk, say.
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
            f"error: {where}: {error.strerror}; mend that and start again",
            file=sys.stderr,
            flush=True,
        )
        return EXIT_USER_ERROR
    raise error


@contextlib.contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """Within it, SIGTERM and SIGINT raise `Stopped`, unless the program listens to them itself.

    It may come anywhere, which is harmless: whatever is written is moved into place when it is whole.
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
    """Runs a command-line door and exits with its code; a `UserError` prints one line.

    Ends as other programs do, without a word, when whoever reads its output wants no more of it.
    """
    try:
        try:
            with _stopped_by_signals():
                code = main(sys.argv[1:])
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        # What is left would be written, and fail again, when Python ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 128 + signal.SIGPIPE
    except (Exception, Stopped) as error:
        code = explain(error)
    if code == EXIT_STOPPED:
        # All is saved and written; what still runs in other threads (a compilation) is not waited for.
        sys.stderr.flush()
        os._exit(code)
    # Python lets go of signals while it ends: one that came then would replace the code by its own.
    atexit.register(_ignore_signals)
    sys.exit(code)


def _ignore_signals() -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
