"""How a command ends: its exit code, one sentence about what the user can fix, and signals."""

import atexit
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType

from s2s_jax import signals
from s2s_jax.errors import EXIT_STOPPED, Stopped, explain


def run_command(main: Callable[[list[str]], int]) -> None:
    """Runs a command with the arguments of this process and exits with its exit code.

    A `UserError` prints one line. Exits quietly if stdout is closed early (SIGPIPE).

    Args:
      main: takes the arguments and returns the exit code.
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


@contextlib.contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """Within it, SIGTERM and SIGINT raise `Stopped`, unless the program handles them itself.

    `Stopped` may be raised anywhere. This is harmless, because files are moved into place only once they
    are complete.
    """

    def stop(number: int, _: FrameType | None) -> None:
        raise Stopped(signal.Signals(number).name)

    nobody = (signal.SIG_DFL, signal.default_int_handler, signals.end_before_start)
    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT):
            if signal.getsignal(number) in nobody:
                before[number] = signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _ignore_signals() -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
