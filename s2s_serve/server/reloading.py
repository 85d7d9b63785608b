"""The version that answers, and the change to a newer one while requests are answered."""

import os
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future

from s2s_serve.errors import MachineError, UserError
from s2s_serve.server.loading import Served
from s2s_serve.server.metrics import Metrics
from s2s_serve.storage import file_systems
from s2s_serve.storage.address import Place, StorePath
from s2s_serve.versions import CURRENT, current_contents

# A version that could not be loaded is tried again after this many seconds, and then ever more rarely.
_FIRST_RETRY = 5.0
_LAST_RETRY = 300.0


class Versions:
    """Loads the newest version, and changes to each newer one in a thread of its own."""

    def __init__(
        self,
        directory: Place,
        metrics: Metrics,
        poll: float,
        load: Callable[[Place], Served],
    ) -> None:
        """Prepares; `start` begins.

        Args:
          directory: the export.
          metrics: counts loads.
          poll: seconds between two looks at current.json.
          load: loads the newest version.
        """
        self._directory = directory
        self._metrics = metrics
        self._poll = poll
        self._load = load
        self._ended = threading.Event()
        self._served: Served | None = None
        self._contents: tuple[int, str | None] | None = None
        self.failure: str | None = None
        self.first: Future[int] = Future()

    @property
    def served(self) -> Served | None:
        """What answers now; None while the first version is loaded."""
        return self._served

    def current(self) -> Served:
        """What answers now, after the first version was loaded."""
        assert self._served is not None, "requests wait for the first version"
        return self._served

    def start(self) -> None:
        """Begins to load and to look for newer versions.

        `first` gets the number of the first version, or the error that kept it from being loaded.
        """
        # A daemon, so that the process can end while a version is loaded.
        threading.Thread(target=self._run, name="s2s-versions", daemon=True).start()

    def end(self) -> None:
        """Looks no more."""
        self._ended.set()

    def _run(self) -> None:
        seen = self._look()
        try:
            self._change(current_contents(self._directory))
        except BaseException as error:
            self._metrics.reloads.labels("failed").inc()
            self.first.set_exception(error)
            return
        self.first.set_result(self.current().model.version)
        tried, wait = 0.0, _FIRST_RETRY
        while not self._ended.wait(self._poll):
            found = self._look()
            again = self.failure is not None and time.monotonic() - tried > wait
            if found == seen and not again:
                continue
            wait = min(2 * wait, _LAST_RETRY) if found == seen else _FIRST_RETRY
            seen, tried = found, time.monotonic()
            self._try_to_change()

    def _look(self) -> tuple[bytes | int, ...] | None:
        """What changes when current.json is replaced; None: it cannot be read."""
        current = self._directory / CURRENT
        try:
            if isinstance(current, StorePath):
                # The time, because an export that was made again has the same text.
                return current.read_bytes(), file_systems.changed_ns(current)
            found = os.stat(current)
        except (OSError, MachineError):
            return None
        return found.st_ino, found.st_mtime_ns, found.st_size

    def _try_to_change(self) -> None:
        """Changes to the newest version, or says why not and keeps the old one."""
        try:
            contents = current_contents(self._directory)
            if contents != self._contents:
                self._change(contents)
        except Exception as error:
            kept = self.current().model.version
            reason = (
                str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            )
            reason = " ".join(reason.split())
            self._metrics.reloads.labels("failed").inc()
            if reason != self.failure:
                _say(f"the newest version cannot be loaded, version {kept} still answers: {reason}")
            self.failure = reason
        else:
            self.failure = None

    def _change(self, contents: tuple[int, str | None]) -> None:
        """Loads the newest version.

        Args:
          contents: see `current_contents`; from before loading, so that what changes meanwhile is seen.
        """
        began = time.monotonic()
        served = self._load(self._directory)
        before = self._served
        # One assignment: a call of the model sees the old version or the new one.
        self._served, self._contents = served, contents
        self._metrics.version.set(served.model.version)
        self._metrics.reloads.labels("loaded").inc()
        if before is not None:
            seconds = time.monotonic() - began
            new, old = served.model.version, before.model.version
            instead = f"instead of {old}" if new != old else "which was made again"
            _say(f"version {new} answers now, {instead}; loaded in {seconds:.1f} s")


def _say(sentence: str) -> None:
    print(sentence, file=sys.stderr, flush=True)
