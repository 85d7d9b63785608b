"""FarmHash Fingerprint64 (Google, 2014), vectorised: the hash behind "farm" in RecIS.

All functions take the bytes of T strings as little-endian uint64 words, and the first byte and the
number of bytes of each string; `hashing` prepares them. All arithmetic is modulo 2^64.
"""

from collections.abc import Callable

import numpy as np

# Gives the 64-bit integer at each byte position, which need not be aligned.
Load = Callable[[np.ndarray], np.ndarray]

_K0 = np.uint64(0xC3A5C85C97CB3127)
_K1 = np.uint64(0xB492B66FBE98F273)
_K2 = np.uint64(0x9AE16A3B2F90404F)
_TWO = np.uint64(2)
_LOW_32 = np.uint64(0xFFFFFFFF)


def fingerprint64(load: Load, begins_T: np.ndarray, lengths_T: np.ndarray) -> np.ndarray:
    """Fingerprint64 of each string.

    Args:
      load: returns the uint64 at byte positions.
      begins_T: int64, position of the first byte of each string.
      lengths_T: int64, number of bytes of each string.

    Returns:
      uint64 `[T]`.
    """
    hashes_T = np.empty(len(begins_T), np.uint64)
    by_length = [(0, _empty), (3, _up_to_3), (7, _up_to_7), (16, _up_to_16), (32, _up_to_32)]
    done = -1
    with np.errstate(over="ignore"):
        for longest, hash_ in [*by_length, (64, _up_to_64), (None, _longer)]:
            chosen = lengths_T > done
            if longest is not None:
                chosen &= lengths_T <= longest
                done = longest
            if chosen.all():
                return hash_(load, begins_T, lengths_T)
            if chosen.any():
                hashes_T[chosen] = hash_(load, begins_T[chosen], lengths_T[chosen])
    return hashes_T


def _empty(load: Load, at: np.ndarray, length: np.ndarray) -> np.ndarray:
    return np.full(len(at), _K2)


def _up_to_3(load: Load, at: np.ndarray, length: np.ndarray) -> np.ndarray:
    byte = np.uint64(0xFF)
    first, middle, last = (load(at + i) & byte for i in (0, length >> 1, length - 1))
    y = first + (middle << np.uint64(8))
    z = _unsigned(length) + (last << _TWO)
    return _shift_mix(y * _K2 ^ z * _K0) * _K2


def _up_to_7(load: Load, at: np.ndarray, length: np.ndarray) -> np.ndarray:
    first, last = load(at) & _LOW_32, load(at + length - 4) & _LOW_32
    return _mix(_unsigned(length) + (first << np.uint64(3)), last, _multiplier(length))


def _up_to_16(load: Load, at: np.ndarray, length: np.ndarray) -> np.ndarray:
    multiplier = _multiplier(length)
    a, b = load(at) + _K2, load(at + length - 8)
    c = _rotate(b, 37) * multiplier + a
    d = (_rotate(a, 25) + b) * multiplier
    return _mix(c, d, multiplier)


def _up_to_32(load: Load, at: np.ndarray, length: np.ndarray) -> np.ndarray:
    multiplier = _multiplier(length)
    a, b = load(at) * _K1, load(at + 8)
    c, d = load(at + length - 8) * multiplier, load(at + length - 16) * _K2
    low = _rotate(a + b, 43) + _rotate(c, 30) + d
    return _mix(low, a + _rotate(b + _K2, 18) + c, multiplier)


def _up_to_64(load: Load, at: np.ndarray, length: np.ndarray) -> np.ndarray:
    multiplier = _multiplier(length)
    a, b = load(at) * _K2, load(at + 8)
    c, d = load(at + length - 8) * multiplier, load(at + length - 16) * _K2
    y = _rotate(a + b, 43) + _rotate(c, 30) + d
    z = _mix(y, a + _rotate(b + _K2, 18) + c, multiplier)
    e, f = load(at + 16) * multiplier, load(at + 24)
    g = (y + load(at + length - 32)) * multiplier
    h = (z + load(at + length - 24)) * multiplier
    return _mix(_rotate(e + f, 43) + _rotate(g, 30) + h, e + _rotate(f + a, 18) + g, multiplier)


def _longer(load: Load, at: np.ndarray, length: np.ndarray) -> np.ndarray:
    seed = np.uint64(81)
    y = np.full(len(at), seed * _K1 + np.uint64(113))
    z = _shift_mix(y * _K2 + np.uint64(113)) * _K2
    x = seed * _K2 + load(at)
    v = w = np.zeros((2, len(at)), np.uint64)
    blocks = (length - 1) // 64
    for block in range(int(blocks.max())):
        going = blocks > block
        state = x[going], y[going], z[going], v[:, going], w[:, going]
        multiplier = np.full(len(state[0]), _K1)
        changed = _round(load, at[going] + 64 * block, multiplier, *state, tail=False)
        x, y, z, v, w = (
            _put(old, going, new) for old, new in zip((x, y, z, v, w), changed, strict=True)
        )
    left = (length - 1) & 63
    multiplier = _K1 + ((z & np.uint64(0xFF)) << np.uint64(1))
    w_0 = w[0] + _unsigned(left)
    v = np.stack([v[0] + w_0, v[1]])
    w = np.stack([w_0 + v[0], w[1]])
    last = at + 64 * blocks + left - 63
    x, y, z, v, w = _round(load, last, multiplier, x, y, z, v, w, tail=True)
    low = _mix(v[0], w[0], multiplier) + _shift_mix(y) * _K0 + z
    return _mix(low, _mix(v[1], w[1], multiplier) + x, multiplier)


def _round(
    load: Load,
    at: np.ndarray,
    multiplier: np.ndarray,
    x: np.ndarray,
    y: np.ndarray,
    z: np.ndarray,
    v: np.ndarray,
    w: np.ndarray,
    tail: bool,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Mixes in 64 bytes; the last round weights some terms by 9."""
    weight = np.uint64(9 if tail else 1)
    x = _rotate(x + y + v[0] + load(at + 8), 37) * multiplier
    y = _rotate(y + v[1] + load(at + 48), 42) * multiplier
    x = x ^ (w[1] * weight)
    y = y + v[0] * weight + load(at + 40)
    z = _rotate(z + w[0], 33) * multiplier
    v_next = _weak_hash(load, at, v[1] * multiplier, x + w[0])
    w_next = _weak_hash(load, at + 32, z + w[1], y + load(at + 16))
    return z, y, x, v_next, w_next


def _weak_hash(load: Load, at: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Two words from 32 bytes and two seeds, `[2, T]`."""
    z = load(at + 24)
    a = a + load(at)
    b = _rotate(b + a + z, 21)
    c = a
    a = a + load(at + 8) + load(at + 16)
    b = b + _rotate(a, 44)
    return np.stack([a + z, b + c])


def _put(old: np.ndarray, where: np.ndarray, new: np.ndarray) -> np.ndarray:
    old = old.copy()
    old[..., where] = new
    return old


def _mix(u: np.ndarray, v: np.ndarray, multiplier: np.ndarray) -> np.ndarray:
    a = _shift_mix((u ^ v) * multiplier)
    b = _shift_mix((v ^ a) * multiplier)
    return b * multiplier


def _multiplier(length: np.ndarray) -> np.ndarray:
    return _K2 + _unsigned(length) * _TWO


def _shift_mix(value: np.ndarray) -> np.ndarray:
    return value ^ (value >> np.uint64(47))


def _rotate(value: np.ndarray, bits: int) -> np.ndarray:
    return (value >> np.uint64(bits)) | (value << np.uint64(64 - bits))


def _unsigned(length: np.ndarray) -> np.ndarray:
    return length.astype(np.uint64)
