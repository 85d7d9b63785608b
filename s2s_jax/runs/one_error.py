"""What TensorStore and asyncio would write to stderr besides the error that Orbax raises."""

import contextlib
import logging
import sys
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def one_error() -> Iterator[None]:
    """Lets nothing but the first error of a restore or a save be heard.

    The reads and writes that it cuts off would each write a traceback to stderr, some of them after it
    was raised. So after an error the process stays as it is within.
    """
    hook, logger = sys.unraisablehook, logging.getLogger("asyncio")
    level = logger.level

    def quietly(told: Any) -> None:
        code = getattr(told.object, "cr_code", None)
        cut_off = code is not None and "orbax" in code.co_filename
        if not cut_off and str(told.exc_value) != "Event loop is closed":
            hook(told)

    sys.unraisablehook = quietly
    logger.setLevel(logging.CRITICAL)
    yield
    # Not reached where there was an error.
    sys.unraisablehook = hook
    logger.setLevel(level)


@contextlib.contextmanager
def hooks_put_back() -> Iterator[None]:
    """At its end the process is as before, whatever errors `one_error` met within.

    For programs that go on after an error. Some of what its writes still say may then be heard.
    """
    hook, logger = sys.unraisablehook, logging.getLogger("asyncio")
    level = logger.level
    try:
        yield
    finally:
        sys.unraisablehook = hook
        logger.setLevel(level)
