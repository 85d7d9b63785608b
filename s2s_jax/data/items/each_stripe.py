"""Works on the stripes of a log in threads, and yields the results in the order of the log."""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from s2s_jax.config.settings import Logs
from s2s_jax.data.logs.index import FileIndex, may_skip
from s2s_jax.errors import UserError

Result = TypeVar("Result")


def each_stripe(
    index: FileIndex, logs: Logs, work: Callable[[int], Result], skipped: Callable[[str], None]
) -> Iterator[Result]:
    """Yields the result of `work` for each stripe, in order; a thread works on one stripe at a time.

    Args:
      index: the index of the log's files.
      logs: how the files are read.
      work: takes the number of a stripe in the index.
      skipped: is called with the reason if a file or stripe is skipped.

    Raises:
      UserError: a stripe cannot be read, and may not be skipped.
    """
    for file in index.skipped:
        skipped(file.reason)
    waiting: deque[Future[Result]] = deque()

    def finish() -> Iterator[Result]:
        try:
            yield waiting.popleft().result()
        except UserError as error:
            if not may_skip(error, logs):
                raise
            skipped(str(error))

    # With 0 threads, one thread works on a stripe while the main thread waits.
    with ThreadPoolExecutor(max(logs.threads, 1), "s2s-items") as pool:
        for stripe in range(len(index.stripes)):
            waiting.append(pool.submit(work, stripe))
            if len(waiting) > logs.threads:
                yield from finish()
        while waiting:
            yield from finish()
