"""Keeps freed memory for the next stripe, instead of giving it back to the system page by page."""

import ctypes
import functools
import sys

import pyarrow as pa

# Parameters of glibc's mallopt(3).
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3
_LARGEST = 2**31 - 1
# Blocks below it are kept; old versions of glibc refuse more than 32 MiB.
_THRESHOLDS = (2**30, 2**25)


@functools.cache
def keep_freed_memory() -> None:
    """Sets the C library's allocator, and lets Arrow use it; does nothing where that is not glibc.

    A decoded stripe is some megabytes, which allocators fetch from the system anew for each: its pages
    are then zeroed one by one, at their first use, for a tenth to a third of the time of decoding. It
    is a setting of the whole process, so only commands make it.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    if not any(mallopt(_M_MMAP_THRESHOLD, threshold) for threshold in _THRESHOLDS):
        return
    mallopt(_M_TRIM_THRESHOLD, _LARGEST)
    mallopt(_M_TOP_PAD, 2**26)
    pa.set_memory_pool(pa.system_memory_pool())
