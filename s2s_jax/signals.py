"""Requests to stop, by SIGTERM and SIGINT or otherwise: answered where nothing is lost by it."""

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
# Seconds after which a signal is noticed while work goes on in another thread.
_NOTICED_AFTER = 0.1

T = TypeVar("T")


def answer_while_starting() -> None:
    """Ends the program with a sentence if a signal comes before it listens itself.

    For command-line doors, before imports that take seconds: nothing has been begun.
    """

    def end(number: int, _: FrameType | None) -> None:
        name = signal.Signals(number).name
        os.write(2, f"stopped by {name} before anything was done; start again\n".encode())
        os._exit(EXIT_STOPPED)

    for number in _SIGNALS:
        signal.signal(number, end)


class Stop:
    """A wish that work may end before its end, looked at where nothing is lost by it.

    By itself it hears nothing: somebody in another thread sets `requested`.

    Attributes:
      requested: what asks for the end; None as long as nothing does.
    """

    def __init__(self) -> None:
        self.requested: str | None = None

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Around work that can be dropped half-way: raises `Stopped` before it or, at the latest, after.

        Such work changes nothing that is kept, or replaces files whole.
        """
        self.check()
        yield
        # What runs outside the program's own code, such as a finalizer, swallows exceptions.
        self.check()

    def check(self) -> None:
        """Raises `Stopped` if an end was asked for."""
        if self.requested is not None:
            raise Stopped(self.requested)

    def unless_told(self, work: Callable[[], T]) -> T | None:
        """What `work` returns, or None as soon as an end is asked for; `work` then goes on unheeded.

        For calls that stay outside Python for long, such as compilation: Python would hear a signal only
        after them. They run in another thread.
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
        # A daemon, so that the process can end before it.
        threading.Thread(target=run, name="s2s-work", daemon=True).start()
        while not done.wait(_NOTICED_AFTER):
            if self.requested is not None:
                return None
        if errors:
            raise errors[0]
        return result[0]


class StopSignals(Stop):
    """Hears SIGTERM and SIGINT, whose name is then `requested`; a second one ends the process at once.

    For commands: handlers of signals belong to the whole process. A signal is only noted, except inside
    `at_once`, where it raises `Stopped` wherever the main thread is.
    """

    def __init__(self) -> None:
        super().__init__()
        self._raises = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is not threading.main_thread():
            print(
                "signals are not heard: this is not the main thread, and Python hands them to no other",
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
        """As of `Stop`; a signal within it raises `Stopped` wherever the main thread is."""
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
