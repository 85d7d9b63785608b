"""Dynamic batching: requests that wait for the model at the same time are joined into one call of it.

A request never waits for others: a call starts as soon as a thread is free, with all requests that have
arrived until then and have the same rules.
"""

import asyncio
import contextlib
import dataclasses
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import pyarrow as pa

from s2s_serve.server.loading import Served
from s2s_serve.server.metrics import Metrics
from s2s_serve.server.protocol import Histories, History, Model

# Calls the model for histories, and returns an answer for each.
Call = Callable[[Model, Histories], Sequence[Any]]


class FullError(Exception):
    """Too many requests wait for the model."""


class LateError(Exception):
    """The model did not answer in time."""


@dataclasses.dataclass(frozen=True)
class Answer:
    """The part of a call's result that belongs to a request.

    Attributes:
      served: the version that answered all of it.
      results: one for each history.
    """

    served: Served
    results: Sequence[Any]


@dataclasses.dataclass(eq=False)
class _Job:
    """A request that waits.

    Attributes:
      call: what to call.
      histories: the histories of the request, at least one.
      rules: requests with equal rules have equal calls and can be joined; None: it runs alone.
      loop: the event loop that waits for the answer.
      answer: where the answer goes.
      left: whether the caller has given up.
    """

    call: Call
    histories: Histories
    rules: bytes | None
    loop: asyncio.AbstractEventLoop
    answer: asyncio.Future[Answer]
    left: bool = False


class Batcher:
    """Threads that call the model for the requests of an event loop."""

    def __init__(
        self,
        current: Callable[[], Served],
        metrics: Metrics,
        max_batch: int,
        max_queue: int,
        threads: int,
    ) -> None:
        """Starts the threads.

        Args:
          current: gives the version that answers now; it is called once for each call of the model.
          metrics: counts calls.
          max_batch: most histories of a call with several requests.
          max_queue: most requests that wait.
          threads: number of calls at the same time.
        """
        self._current = current
        self._metrics = metrics
        self._max_batch = max_batch
        self._max_queue = max_queue
        self._jobs: deque[_Job] = deque()
        self._changed = threading.Condition()
        self._ended = False
        for number in range(threads):
            # Daemons, so that a call that hangs does not keep the process.
            threading.Thread(target=self._work, name=f"s2s-model-{number}", daemon=True).start()

    async def run(
        self, call: Call, histories: Histories, rules: bytes | None, timeout: float
    ) -> Answer:
        """The answer to a request.

        Args:
          call: calls the model.
          histories: the histories of the request, at least one.
          rules: requests with equal rules have equal calls and can be joined; None: it runs alone.
          timeout: seconds to wait.

        Raises:
          FullError: too many requests wait.
          LateError: there was no answer in time.
          UserError: this request is wrong.
        """
        loop = asyncio.get_running_loop()
        job = _Job(call, histories, rules, loop, loop.create_future())
        with self._changed:
            if len(self._jobs) >= self._max_queue:
                raise FullError
            self._jobs.append(job)
            self._metrics.waiting.set(len(self._jobs))
            self._changed.notify()
        try:
            async with asyncio.timeout(timeout):
                return await job.answer
        except TimeoutError:
            raise LateError from None
        finally:
            job.left = True
            self._forget(job)

    def _forget(self, job: _Job) -> None:
        """Removes a request from the queue, where it would keep others out."""
        with self._changed, contextlib.suppress(ValueError):
            self._jobs.remove(job)
            self._metrics.waiting.set(len(self._jobs))

    def end(self) -> None:
        """Ends the threads after the calls that run now."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._jobs and not self._ended:
                    self._changed.wait()
                if self._ended:
                    return
                batch = self._take()
                self._metrics.waiting.set(len(self._jobs))
            if batch:
                self._answer(batch)

    def _take(self) -> list[_Job]:
        """Removes from the queue its first request, and those that can be joined with it."""
        batch: list[_Job] = []
        passed: list[_Job] = []
        size = 0
        while self._jobs and size < self._max_batch:
            job = self._jobs.popleft()
            if job.left:
                continue
            joins = not batch or (
                job.rules is not None
                and job.rules == batch[0].rules
                and size + len(job.histories) <= self._max_batch
            )
            if joins:
                batch.append(job)
                size += len(job.histories)
            else:
                passed.append(job)
        self._jobs.extendleft(reversed(passed))
        return batch

    def _answer(self, batch: Sequence[_Job]) -> None:
        """Answers requests with one call, or with several if one of them is wrong."""
        served = self._current()
        histories = batch[0].histories if len(batch) == 1 else _joined(batch)
        began = time.perf_counter()
        try:
            results = batch[0].call(served.model, histories)
            assert len(results) == len(histories), "the model must answer each history"
        except Exception as error:
            if len(batch) == 1:
                _deliver(batch, [error])
            else:
                # In halves, so that a wrong request does not cost a call for each one beside it.
                half = len(batch) // 2
                self._answer(batch[:half])
                self._answer(batch[half:])
            return
        self._metrics.model_seconds.observe(time.perf_counter() - began)
        self._metrics.batch_histories.observe(len(histories))
        self._metrics.batch_requests.observe(len(batch))
        outcomes: list[Answer | Exception] = []
        start = 0
        for job in batch:
            end = start + len(job.histories)
            outcomes.append(Answer(served, results[start:end]))
            start = end
        _deliver(batch, outcomes)


def _joined(batch: Sequence[_Job]) -> list[History]:
    """The histories of several requests; tables are never joined, since they have no rules."""
    joined: list[History] = []
    for job in batch:
        assert not isinstance(job.histories, pa.Table)
        joined.extend(job.histories)
    return joined


def _deliver(batch: Sequence[_Job], outcomes: Sequence[Answer | Exception]) -> None:
    """Hands outcomes to the event loop, which is woken once for all."""

    def set_all() -> None:
        for job, outcome in zip(batch, outcomes, strict=True):
            if job.answer.done():
                continue
            if isinstance(outcome, Exception):
                job.answer.set_exception(outcome)
            else:
                job.answer.set_result(outcome)

    # The loop is closed if the server ended without waiting for this answer.
    with contextlib.suppress(RuntimeError):
        batch[0].loop.call_soon_threadsafe(set_all)
