"""Event files for TensorBoard.

Events are written immediately, by the calling thread. TensorBoardX's own writer passes them to a thread
that silently dies when the disk is full, after which its queue fills up and blocks.
"""

import contextlib
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorboardX.proto import event_pb2
from tensorboardX.record_writer import RecordWriter
from tensorboardX.summary import scalar

# Classes that protobuf creates at import.
_Event: Any = event_pb2.Event  # pyright: ignore[reportAttributeAccessIssue]
_SessionLog: Any = event_pb2.SessionLog  # pyright: ignore[reportAttributeAccessIssue]


class EventFile:
    """One event file."""

    def __init__(self, directory: Path, step: int):
        """Creates a file for a run that is at `step`; later steps in older files become void.

        Raises:
          OSError: the file cannot be written.
        """
        directory.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{int(time.time()):010}.{socket.gethostname()}.{os.getpid()}"
        self._file = RecordWriter(str(directory / name))
        self._add(wall_time=time.time(), file_version="brain.Event:2")
        start = _SessionLog(status=_SessionLog.START)
        self._add(wall_time=time.time(), step=step + 1, session_log=start)
        self._file.flush()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Writes the numbers of a step.

        Raises:
          OSError: they cannot be written.
        """
        for name, value in values.items():
            self._add(wall_time=time.time(), step=step, summary=scalar(name, value))
        self._file.flush()

    def close(self) -> None:
        """Closes the file; events that could not be written are dropped."""
        with contextlib.suppress(OSError):
            self._file.close()

    def _add(self, **event: object) -> None:
        self._file.write(_Event(**event).SerializeToString())
