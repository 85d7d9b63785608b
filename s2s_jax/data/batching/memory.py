"""Keeps freed memory for the next stripe, instead of returning it to the operating system."""

import ctypes
import functools
import sys

import pyarrow as pa

# Parameters of glibc's mallopt(3).
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3
_LARGEST = 2**31 - 1
# Blocks smaller than this are kept; old versions of glibc refuse more than 32 MiB.
_THRESHOLDS = (2**30, 2**25)


@functools.cache
def keep_freed_memory() -> None:
    """Tunes the C library's allocator and makes Arrow use it; does nothing without glibc.

    A decoded stripe takes some megabytes, which allocators would get from the system again for each
    stripe. The kernel zeroes their pages at first use, which takes 10% to 33% of the time of decoding.
    This is a setting of the whole process, so only commands call this function.
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
