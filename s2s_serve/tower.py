"""The user tower of an export: from embedded events to the vectors of users, with ONNX Runtime.

Shapes: B users that are encoded together, L positions, D concatenated embedding width, E model width.
"""

import os
from pathlib import Path

import numpy as np

from s2s_serve.errors import UserError

NAME = "tower.onnx"
EVENTS, LENGTH, TIMES = "events", "length", "times"
# Several threads make one history faster from this E on. On 2 cores, a history of 100 events took as
# long with two threads as with one for E = 128, and 0.65 times as long for E = 512. Below, threads that
# encode different histories are better: two encoded 1.9 times as many histories per second.
_WIDE = 256


def available_cores() -> int:
    """Return the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class Tower:
    """The user tower.

    Attributes:
      callers: the number of threads that should call `users` at the same time.
      timed: whether `users` needs the times of events.
    """

    def __init__(self, directory: Path, width: int, threads: int | None):
        """Opens the tower of a version.

        Args:
          directory: the directory of the version.
          width: E.
          threads: the number of threads that compute at the same time; None: one for each core.

        Raises:
          UserError: ONNX Runtime is missing, or cannot use the file.
        """
        try:
            import onnxruntime
        except ImportError as error:
            raise UserError(
                f"expected the package onnxruntime, which computes {directory / NAME}, found none; "
                f"pip install onnxruntime"
            ) from error
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        # Waiting threads would otherwise keep the cores busy after each call.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        threads = available_cores() if threads is None else threads
        wide = width >= _WIDE
        options.intra_op_num_threads = threads if wide else 1
        self.callers = 1 if wide else threads
        path = directory / NAME
        try:
            self._session = onnxruntime.InferenceSession(
                str(path), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # ONNX Runtime's errors have no common type.
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"{path}: ONNX Runtime cannot use it ({reason}); export again"
            ) from error
        shapes = {each.name: each.shape for each in self._session.get_inputs()}
        self.timed = TIMES in shapes
        if set(shapes) - {TIMES} != {EVENTS, LENGTH}:
            raise UserError(
                f"{path}: expected inputs {EVENTS} and {LENGTH}, found {', '.join(shapes)}; export again"
            )
        positions = shapes[EVENTS][1]
        # Whether short histories need not be padded to the full length.
        self._fixed = positions if isinstance(positions, int) else None

    def positions(self, longest: int) -> int:
        """Return the L of a batch whose longest history has `longest` events."""
        return longest if self._fixed is None else self._fixed

    def users(
        self, events_BLD: np.ndarray, length_B: np.ndarray, time_BL: np.ndarray | None = None
    ) -> np.ndarray:
        """Return f32 `[B, E]`: the vectors of users, as compared with those of items.

        Args:
          events_BLD: f32, embedded events, oldest first, padded at the end.
          length_B: int32, the number of events of each user, at least 1.
          time_BL: int32, the times of events in seconds; only if `timed`.
        """
        given = {EVENTS: events_BLD, LENGTH: length_B}
        if time_BL is not None:
            given[TIMES] = time_BL
        (users_BE,) = self._session.run(None, given)
        return np.asarray(users_BE)
