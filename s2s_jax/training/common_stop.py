"""An agreement of all processes of a job to stop at the same step."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TypeVar

import jax
from jax.sharding import Mesh

from s2s_jax.cluster import hosts
from s2s_jax.data.batching.dataset import HostBatch
from s2s_jax.data.batching.reader import Reader
from s2s_jax.errors import Stopped
from s2s_jax.signals import Stop
from s2s_jax.training.step.batches import put_stop

T = TypeVar("T")


class CommonStop:
    """Decides for the training loop whether to stop.

    A single process stops as soon as a stop is requested. With several processes, a request on one of
    them travels with the arrays of a step. All processes see it in the metrics of that step, and so stop
    at the same step.

    Attributes:
      alone: whether this is the only process of the job.
    """

    def __init__(self, stop: Stop, mesh: Mesh):
        """Start without an agreement to stop.

        Args:
          stop: the request to stop this process.
          mesh: the devices of all processes.
        """
        self.alone = jax.process_count() == 1
        self._stop, self._mesh = stop, mesh
        self._agreed = False

    @property
    def stopping(self) -> bool:
        """Whether to take no more steps; the same in all processes."""
        return self._agreed or (self.alone and self._stop.requested is not None)

    def with_request(self, arrays: Mapping[str, jax.Array]) -> Mapping[str, jax.Array]:
        """Return the arrays of a step, with the request of this process if there are other processes."""
        if self.alone:
            return arrays
        return {**arrays, **put_stop(self._stop.requested is not None, self._mesh)}

    def update(self, requested: bool) -> None:
        """Record whether a process requested a stop, according to the metrics of a step."""
        self._agreed = self._agreed or requested

    def next_batch(self, reader: Reader) -> HostBatch | None:
        """Return the next batch, or None if a stop was requested while waiting for it."""
        if not self.alone:
            return next(reader)
        try:
            with self._stop.at_once():
                return next(reader)
        except Stopped:
            return None

    def compiled(self, compilation: Callable[[], T]) -> T | None:
        """Return the result of `compilation`, or None in all processes if one of them must stop."""
        result = self._stop.unless_stopped(compilation)
        if hosts.any_stop_requested(self._stop.requested is not None):
            self._agreed = True
            return None
        return result

    def evaluated(self, evaluation: Callable[[], T]) -> T | None:
        """Return the result of `evaluation`, or None if a stop was requested.

        Args:
          evaluation: a function that uses `in_lockstep`.
        """
        try:
            return self._stop.unless_stopped(evaluation) if self.alone else evaluation()
        except Stopped:
            self._agreed = True
            return None

    def in_lockstep(self, items: Iterable[T], fact_of: Callable[[T], int]) -> Iterator[T]:
        """See `hosts.in_lockstep`; raises `Stopped` in all processes if a stop was requested in one."""
        return hosts.in_lockstep(items, fact_of, self._stop)
