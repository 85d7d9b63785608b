"""Silences what TensorStore and asyncio write to stderr in addition to the error that Orbax raises."""

import contextlib
import logging
import sys
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def one_error() -> Iterator[None]:
    """Shows only the first error of a restore or a save.

    The reads and writes that the error cuts off would each print a traceback to stderr, some of them
    after it was raised. So after an error, the process stays silenced.
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
    # Not reached after an error.
    sys.unraisablehook = hook
    logger.setLevel(level)


@contextlib.contextmanager
def hooks_put_back() -> Iterator[None]:
    """Restores the process's hooks at its end, even if `one_error` saw errors within.

    For programs that continue after an error. Late messages of its reads and writes may then be shown.
    """
    hook, logger = sys.unraisablehook, logging.getLogger("asyncio")
    level = logger.level
    try:
        yield
    finally:
        sys.unraisablehook = hook
        logger.setLevel(level)
