"""Silences what TensorStore and asyncio write to stderr in addition to the error that Orbax raises."""

import contextlib
import logging
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def one_error() -> Iterator[None]:
    """Shows only the first error of a restore or save.

    The reads and writes that the error cuts off would each print a traceback to stderr, some of them
    after it was raised. So after an error, the process stays silenced.
    """
    hook, logger = sys.unraisablehook, logging.getLogger("asyncio")
    level = logger.level

    def quietly(event: "sys.UnraisableHookArgs") -> None:
        code = getattr(event.object, "cr_code", None)
        cut_off = code is not None and "orbax" in code.co_filename
        if not cut_off and str(event.exc_value) != "Event loop is closed":
            hook(event)

    sys.unraisablehook = quietly
    logger.setLevel(logging.CRITICAL)
    yield
    # Not reached after an error.
    sys.unraisablehook = hook
    logger.setLevel(level)


@contextlib.contextmanager
def restore_hooks() -> Iterator[None]:
    """Restores the process's hooks when the block ends, even if `one_error` caught an error in it.

    For programs that continue after an error. Late messages of the reads and writes that the error cut
    off may then be shown.
    """
    hook, logger = sys.unraisablehook, logging.getLogger("asyncio")
    level = logger.level
    try:
        yield
    finally:
        sys.unraisablehook = hook
        logger.setLevel(level)
