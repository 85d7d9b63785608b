"""Requests to stop, from SIGTERM, SIGINT or a caller, which are obeyed where no work is lost."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, Self, TypeVar

from s2s_jax.errors import EXIT_STOPPED, Stopped

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
# A signal is noticed within this many seconds while work runs in another thread.
_NOTICED_AFTER = 0.1

T = TypeVar("T")


def handle_while_starting() -> None:
    """Ends the program with a message if a signal arrives before the program handles signals itself.

    Commands call it before imports that take seconds, when no work has begun.
    """
    for number in _SIGNALS:
        signal.signal(number, end_before_start)


def end_before_start(number: int, _: FrameType | None) -> None:
    """Handles a signal that arrives while the program starts: prints a message and ends the program."""
    name = signal.Signals(number).name
    os.write(2, f"stopped by {name} before anything was done; start again\n".encode())
    os._exit(EXIT_STOPPED)


class Stop:
    """A request to stop work early; the work checks it where nothing is lost.

    This class does not handle signals: another thread sets `requested`.

    Attributes:
      requested: the name of what requested the stop; None if nothing did.
    """

    def __init__(self) -> None:
        self.requested: str | None = None

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Wraps work that can be abandoned half-way; raises `Stopped` before it or, at latest, after.

        Such work changes nothing that is kept, or only replaces complete files.
        """
        self.check()
        yield
        # Exceptions raised outside the program's own code, for example in finalizers, are swallowed.
        self.check()

    def check(self) -> None:
        """Raises `Stopped` if a stop was requested."""
        if self.requested is not None:
            raise Stopped(self.requested)

    def unless_stopped(self, work: Callable[[], T]) -> T | None:
        """The result of `work`, or None as soon as a stop is requested; `work` is then abandoned.

        For long calls outside Python, such as compilation: Python would only handle a signal after them.
        `work` runs in another thread.
        """
        result: list[T] = []
        errors: list[BaseException] = []

        def run() -> None:
            try:
                result.append(work())
            except BaseException as error:
                errors.append(error)
            finally:
                done.set()

        done = threading.Event()
        # A daemon, so that the process can exit before the thread ends.
        threading.Thread(target=run, name="s2s-work", daemon=True).start()
        while not done.wait(_NOTICED_AFTER):
            if self.requested is not None:
                return None
        if errors:
            raise errors[0]
        return result[0]


class StopSignals(Stop):
    """Sets `requested` to the name of a SIGTERM or SIGINT; a second one ends the process at once.

    Only for commands, since signal handlers belong to the whole process. A signal only sets `requested`,
    except inside `at_once`, where it raises `Stopped` in the main thread immediately.
    """

    def __init__(self) -> None:
        super().__init__()
        self._raises = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is not threading.main_thread():
            print(
                "signals are not handled: this is not the main thread, to which Python sends them",
                file=sys.stderr,
                flush=True,
            )
            return self
        for number in _SIGNALS:
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """As in `Stop`, but a signal raises `Stopped` in the main thread immediately."""
        before = self._raises
        self._raises = True
        try:
            with super().at_once():
                yield
        finally:
            self._raises = before

    def _note(self, number: int, _: FrameType | None) -> None:
        self.requested = signal.Signals(number).name
        for each in _SIGNALS:
            signal.signal(each, signal.SIG_DFL)
        if self._raises:
            raise Stopped(self.requested)
