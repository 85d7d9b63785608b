"""SIGTERM and SIGINT: heard at any moment, answered where nothing is lost by it."""

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


class StopSignals:
    """Notes SIGTERM and SIGINT; a second one ends the process at once.

    A signal is only noted, for others to look at `requested`, except inside `at_once`.

    Attributes:
      requested: name of the signal that came, None if none did.
    """

    def __init__(self) -> None:
        self.requested: str | None = None
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
        """Within it, a signal raises `Stopped` wherever the main thread is.

        For work that can be dropped half-way: it changes nothing that is kept, or replaces files whole.
        """
        before = self._raises
        self._raises = True
        try:
            self.check()
            yield
            # What runs outside the program's own code, such as a finalizer, swallows exceptions.
            self.check()
        finally:
            self._raises = before

    def check(self) -> None:
        """Raises `Stopped` if a signal came."""
        if self.requested is not None:
            raise Stopped(self.requested)

    def unless_told(self, work: Callable[[], T]) -> T | None:
        """What `work` returns, or None as soon as a signal comes; `work` then goes on unheeded.

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

    def _note(self, number: int, _: FrameType | None) -> None:
        self.requested = signal.Signals(number).name
        for each in _SIGNALS:
            signal.signal(each, signal.SIG_DFL)
        if self._raises:
            raise Stopped(self.requested)
