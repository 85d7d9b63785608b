"""MurmurHash64A, one byte at a time."""

import struct

MASK = 2**64 - 1


def reference(data: bytes, seed: int = 0) -> int:
    """MurmurHash64A, which gives the same as Austin Appleby's C++ code."""
    m, r = 0xC6A4A7935BD1E995, 47
    h = seed ^ (len(data) * m & MASK)
    whole = len(data) // 8 * 8
    for (k,) in struct.iter_unpack("<Q", data[:whole]):
        k = k * m & MASK
        k ^= k >> r
        k = k * m & MASK
        h = (h ^ k) * m & MASK
    tail = data[whole:]
    if tail:
        for i, byte in enumerate(tail):
            h ^= byte << 8 * i
        h = h * m & MASK
    h ^= h >> r
    h = h * m & MASK
    return h ^ h >> r
