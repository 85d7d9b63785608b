"""Event files for TensorBoard.

Events are written immediately, by the calling thread. TensorBoardX's own writer passes them to a thread
that silently dies when the disk is full, after which its queue fills up and blocks.
"""

import contextlib
import os
import socket
import time
from collections.abc import Mapping
from typing import Any

from tensorboardX.proto import event_pb2
from tensorboardX.record_writer import RecordWriter
from tensorboardX.summary import scalar

from s2s_jax.errors import MachineError
from s2s_serve.storage import file_systems
from s2s_serve.storage.address import Place, StorePath
from s2s_serve.storage.scratch import Scratch

# Classes that protobuf creates at import.
_Event: Any = event_pb2.Event  # pyright: ignore[reportAttributeAccessIssue]
_SessionLog: Any = event_pb2.SessionLog  # pyright: ignore[reportAttributeAccessIssue]

# Seconds between two copies of a file to a store, which takes all of it each time.
_STORE_SECONDS = 60


class EventFile:
    """One event file. In a store, it is a copy of a temporary file, a minute behind it at most."""

    def __init__(self, directory: Place, step: int):
        """Creates a file for a run that is at `step`; later steps in older files become void.

        Raises:
          OSError, MachineError: the file cannot be written.
        """
        name = f"events.out.tfevents.{int(time.time()):010}.{socket.gethostname()}.{os.getpid()}"
        self._copied, self._copied_at = None, time.monotonic()
        if isinstance(directory, StorePath):
            self._copied, self._scratch = directory / name, Scratch()
            self._path = self._scratch.path / name
        else:
            directory.mkdir(parents=True, exist_ok=True)
            self._path = directory / name
        self._file = RecordWriter(str(self._path))
        self._add(wall_time=time.time(), file_version="brain.Event:2")
        start = _SessionLog(status=_SessionLog.START)
        self._add(wall_time=time.time(), step=step + 1, session_log=start)
        self._file.flush()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Writes the numbers of a step.

        Raises:
          OSError, MachineError: they cannot be written.
        """
        for name, value in values.items():
            self._add(wall_time=time.time(), step=step, summary=scalar(name, value))
        self._file.flush()
        if self._copied is not None and time.monotonic() - self._copied_at > _STORE_SECONDS:
            file_systems.upload(self._path, self._copied)
            self._copied_at = time.monotonic()

    def close(self) -> None:
        """Closes the file; events that could not be written are dropped."""
        with contextlib.suppress(OSError, MachineError):
            self._file.close()
            if self._copied is not None:
                file_systems.upload(self._path, self._copied)
        if self._copied is not None:
            self._scratch.remove()

    def _add(self, **event: object) -> None:
        self._file.write(_Event(**event).SerializeToString())
