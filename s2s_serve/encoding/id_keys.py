"""Keys of 64-bit ids: two uint32 words from a permutation of the ids, without visible patterns.

All functions take NumPy or JAX arrays of uint32.
"""

from typing import Any

import numpy as np

# Both words of a key for no id (and of the id itself, which the permutation does not change).
EMPTY = np.uint32(0xFFFFFFFF)
ROUND_KEYS = tuple(np.uint32(k) for k in (0x9E3779B9, 0x7F4A7C15, 0xF39CC060, 0x5CEDC835))


def scramble(x: Any) -> Any:
    """The finaliser of MurmurHash3 (Austin Appleby, public domain), for uint32 arrays."""
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return x ^ (x >> np.uint32(16))


def _feistel(words: tuple[Any, Any], round_keys: tuple[np.uint32, ...]) -> tuple[Any, Any]:
    left, right = words
    for key in round_keys:
        left, right = right, left ^ scramble(right + key)
    return left, right


_NONE = np.full(1, EMPTY)
_SHIFT_LOW, _SHIFT_HIGH = (w ^ _NONE for w in _feistel((_NONE, _NONE), ROUND_KEYS))


def keys_of(low: Any, high: Any) -> tuple[Any, Any]:
    """Both words of the keys of ids, uint32 NumPy or JAX arrays; `EMPTY` does not change."""
    first, second = _feistel((low, high), ROUND_KEYS)
    return first ^ _SHIFT_LOW[0], second ^ _SHIFT_HIGH[0]


def ids_of(first: Any, second: Any) -> tuple[Any, Any]:
    """The inverse of `keys_of`: the low and high words of ids.

    Examples:
      >>> key = keys_of(np.array([5], np.uint32), np.array([0], np.uint32))
      >>> [word.tolist() for word in ids_of(*key)]
      [[5], [0]]
    """
    swapped = (second ^ _SHIFT_HIGH[0], first ^ _SHIFT_LOW[0])
    high, low = _feistel(swapped, ROUND_KEYS[::-1])
    return low, high
