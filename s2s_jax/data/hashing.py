"""Ids to 64-bit hashes and buckets, vectorised over Arrow and NumPy buffers.

Shapes: T strings or integers.
"""

from typing import Literal

import numpy as np
import pyarrow as pa

from s2s_jax.data import farmhash

# MurmurHash64A (Austin Appleby, 2008, public domain), the 64-bit hash behind "murmur" in RecIS.
_MULTIPLIER = np.uint64(0xC6A4A7935BD1E995)
_SHIFT = np.uint64(47)
_SEED = 0

HashType = Literal["murmur", "farm"]

# Strings hashed together: their intermediate arrays stay in the processor's cache.
_CHUNK = 16_384


def hash_strings(strings: pa.Array, hash_type: HashType) -> np.ndarray:
    """Hashes the bytes of each string.

    Args:
      strings: `string`, `large_string`, `binary` or `large_binary` array without nulls; it may be
        a slice of another array.
      hash_type: "murmur" (MurmurHash64A, seed 0) or "farm" (FarmHash Fingerprint64).

    Returns:
      uint64 array of its length.
    """
    hash_ = {"murmur": _murmur, "farm": _farm}[hash_type]
    assert strings.null_count == 0, "drop nulls before hashing"
    wide = pa.types.is_large_string(strings.type) or pa.types.is_large_binary(strings.type)
    _, offset_buffer, data_buffer = strings.buffers()
    offsets = np.frombuffer(offset_buffer, np.int64 if wide else np.int32) if offset_buffer else []
    offsets = np.asarray(
        offsets[strings.offset : strings.offset + len(strings) + 1], dtype=np.int64
    )
    if len(strings) == 0:
        return np.empty(0, np.uint64)
    data = np.frombuffer(data_buffer, np.uint8) if data_buffer else np.empty(0, np.uint8)
    first, last = offsets[0], offsets[-1]
    # Whole aligned words around the used bytes, and two more so that reading past the end is safe.
    words = np.zeros((last - first) // 8 + 3, np.dtype("<u8"))
    words.view(np.uint8)[: last - first] = data[first:last]
    offsets = offsets - first
    hashes = np.empty(len(strings), np.uint64)
    for start in range(0, len(strings), _CHUNK):
        stop = min(start + _CHUNK, len(strings))
        begins = offsets[start:stop]
        hashes[start:stop] = hash_(words, begins, offsets[start + 1 : stop + 1] - begins)
    return hashes


def hash_integers(values_T: np.ndarray, hash_type: HashType) -> np.ndarray:
    """Hashes each integer's 8 little-endian bytes.

    Args:
      values_T: int64 or uint64.
      hash_type: as for `hash_strings`.

    Returns:
      uint64 `[T]`.
    """
    words_T = values_T.view(np.uint64)
    if hash_type == "murmur":
        with np.errstate(over="ignore"):
            hashes_T = np.uint64(_SEED) ^ (np.uint64(8) * _MULTIPLIER)
            return _finish((hashes_T ^ _scramble(words_T)) * _MULTIPLIER)
    begins_T = 8 * np.arange(len(words_T))
    padded = np.append(words_T, np.zeros(2, np.uint64))
    return _farm(padded, begins_T, np.full(len(words_T), 8))


def to_buckets(ids_T: np.ndarray, buckets: int) -> np.ndarray:
    """`ids_T mod buckets` as unsigned 64-bit numbers.

    Args:
      ids_T: int64 or uint64 ids or hashes.
      buckets: at least 1, below 2^31.

    Returns:
      int32 `[T]` in `[0, buckets)`.
    """
    ids_T, size = ids_T.view(np.uint64), np.uint64(buckets)
    # NumPy's % is slower than a division and a multiplication.
    return (ids_T - (ids_T // size) * size).astype(np.int32)


def to_positive_ids(hashes_T: np.ndarray) -> np.ndarray:
    """Hashes as ids of a table without buckets: the low 63 bits, as RecIS keeps them.

    Args:
      hashes_T: uint64.

    Returns:
      int64 `[T]`, never negative.
    """
    return (hashes_T & np.uint64(2**63 - 1)).view(np.int64)


def _farm(words: np.ndarray, begins_T: np.ndarray, lengths_T: np.ndarray) -> np.ndarray:
    return farmhash.fingerprint64(lambda at: _load_words(words, at), begins_T, lengths_T)


def _murmur(words: np.ndarray, begins_T: np.ndarray, lengths_T: np.ndarray) -> np.ndarray:
    """Hashes the `lengths_T` bytes that start at byte `begins_T` of `words`."""
    with np.errstate(over="ignore"):
        hashes_T = np.uint64(_SEED) ^ (lengths_T.astype(np.uint64) * _MULTIPLIER)
        whole_T = lengths_T // 8
        active = np.arange(len(begins_T))
        for word in range(int(whole_T.max())):
            active = active[whole_T[active] > word]
            block = _load_words(words, begins_T[active] + 8 * word)
            hashes_T[active] = (hashes_T[active] ^ _scramble(block)) * _MULTIPLIER
        tail_T = lengths_T % 8
        (active,) = np.nonzero(tail_T)
        block = _load_words(words, begins_T[active] + 8 * whole_T[active])
        kept_bits = (8 * tail_T[active]).astype(np.uint64)
        block &= (np.uint64(1) << kept_bits) - np.uint64(1)
        hashes_T[active] = (hashes_T[active] ^ block) * _MULTIPLIER
        return _finish(hashes_T)


def _load_words(words: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """The little-endian uint64 at each byte position, which need not be aligned."""
    index, shift = positions >> 3, ((positions & 7) << 3).astype(np.uint64)
    low = words[index] >> shift
    # A shift by 64 is undefined, so the upper part moves in two steps.
    high = (words[index + 1] << np.uint64(1)) << (np.uint64(63) - shift)
    return low | high


def _scramble(block: np.ndarray) -> np.ndarray:
    block = block * _MULTIPLIER
    return (block ^ (block >> _SHIFT)) * _MULTIPLIER


def _finish(hashes: np.ndarray) -> np.ndarray:
    hashes = (hashes ^ (hashes >> _SHIFT)) * _MULTIPLIER
    return hashes ^ (hashes >> _SHIFT)
