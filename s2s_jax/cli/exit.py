"""How a command ends: its exit code, error messages, and signals."""

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
from s2s_jax.storage import lock


def run_command(main: Callable[[list[str]], int]) -> None:
    """Runs a command with the arguments of this process and exits with its exit code.

    A `UserError` is printed in one line. If the reader of stdout closes it early, the exit is silent.

    Args:
      main: a function that takes the arguments and returns the exit code.
    """
    try:
        try:
            with _stopped_by_signals():
                code = main(sys.argv[1:])
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        # Python would write the rest of its buffer on exit, and fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 128 + signal.SIGPIPE
    except (Exception, Stopped) as error:
        code = explain(error)
    if code == EXIT_STOPPED:
        # All files are written, so other threads, such as a compilation, need not finish. But nobody
        # should wait for their locks.
        sys.stderr.flush()
        lock.release_all()
        os._exit(code)
    # Python resets signal handlers while it exits, so a late signal would change the exit code.
    atexit.register(_ignore_signals)
    sys.exit(code)


@contextlib.contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """Within the `with` block, SIGTERM and SIGINT raise `Stopped`, unless the command handles them.

    `Stopped` may be raised anywhere. No file is left half-written, because files are moved into place
    only when they are complete.
    """

    def stop(number: int, _: FrameType | None) -> None:
        raise Stopped(signal.Signals(number).name)

    default_handlers = (signal.SIG_DFL, signal.default_int_handler, signals.end_before_start)
    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT):
            if signal.getsignal(number) in default_handlers:
                before[number] = signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _ignore_signals() -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
