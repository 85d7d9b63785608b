"""Ids → 64-bit hashes and buckets, vectorised over Arrow and NumPy buffers.

Shapes: T strings or integers.
"""

from collections.abc import Callable
from typing import Literal

import numpy as np
import pyarrow as pa

from s2s_serve.encoding import farmhash

# MurmurHash64A (Austin Appleby, 2008, public domain), the 64-bit hash behind "murmur" in RecIS.
_MULTIPLIER = np.uint64(0xC6A4A7935BD1E995)
_SHIFT = np.uint64(47)
_SEED = 0

HashType = Literal["murmur", "farm"]
_Hash = Callable[[farmhash.Load, np.ndarray, np.ndarray], np.ndarray]

# Strings hashed together, few enough that intermediate arrays stay in the processor's cache.
_CHUNK = 16_384
# Bytes after the last string, so that a whole word can be read at any byte of it.
_PADDING = 16
# Masks that keep the lowest 0 to 7 bytes of a word.
_LOW_BYTES = np.array([(1 << 8 * i) - 1 for i in range(8)], np.uint64)


def hash_strings(strings: pa.Array, hash_type: HashType) -> np.ndarray:
    """Hashes the bytes of each string.

    Args:
      strings: `string`, `large_string`, `binary` or `large_binary` array without nulls, or a
        dictionary array of these types; may be a slice of another array.
      hash_type: "murmur" (MurmurHash64A, seed 0) or "farm" (FarmHash Fingerprint64).

    Returns:
      uint64 array of the same length.

    Examples:
      >>> hash_strings(pa.array(["", "tea"]), "farm")[0] == 0x9AE16A3B2F90404F
      np.True_
    """
    assert strings.null_count == 0, "drop nulls before hashing"
    if pa.types.is_dictionary(strings.type):
        hashes = hash_strings(strings.dictionary.fill_null(""), hash_type)
        return hashes[strings.indices.to_numpy(zero_copy_only=False)]
    if len(strings) == 0:
        return np.empty(0, np.uint64)
    hash_ = {"murmur": _murmur, "farm": _farm}[hash_type]
    wide = pa.types.is_large_string(strings.type) or pa.types.is_large_binary(strings.type)
    _, offset_buffer, data_buffer = strings.buffers()
    offsets = np.frombuffer(offset_buffer, np.int64 if wide else np.int32)
    offsets = offsets[strings.offset : strings.offset + len(strings) + 1]
    data = np.frombuffer(data_buffer, np.uint8) if data_buffer else np.empty(0, np.uint8)
    hashes = np.empty(len(strings), np.uint64)
    for start in range(0, len(strings), _CHUNK):
        ends = offsets[start : start + _CHUNK + 1].astype(np.int64)
        first, last = int(ends[0]), int(ends[-1])
        text = data[first : last + _PADDING]
        if len(text) < last - first + _PADDING:
            text = np.zeros(last - first + _PADDING, np.uint8)
            text[:-_PADDING] = data[first:last]
        hashes[start : start + _CHUNK] = _hash_chunk(text, ends - first, hash_)
    return hashes


def _hash_chunk(text: np.ndarray, ends: np.ndarray, hash_: "_Hash") -> np.ndarray:
    """Hashes the strings `text[ends[i] : ends[i + 1]]`; `_PADDING` bytes must follow the last one."""
    begins_T, lengths_T = ends[:-1], np.diff(ends)
    words = np.ndarray((len(text) - 7,), np.dtype("<u8"), text, strides=(1,))
    length = int(lengths_T[0])
    if (lengths_T == length).all():
        # Strings of the same length have equal distances, so strided slices can load them.
        def load_even(at: np.ndarray) -> np.ndarray:
            return words[at[0] :: max(length, 1)][: len(at)].astype(np.uint64)

        return hash_(load_even, begins_T, lengths_T)
    return hash_(lambda at: words[at], begins_T, lengths_T)


def hash_integers(values_T: np.ndarray, hash_type: HashType) -> np.ndarray:
    """Hashes each integer's 8 little-endian bytes.

    Args:
      values_T: int64 or uint64.
      hash_type: see `hash_strings`.

    Returns:
      uint64 `[T]`.
    """
    words_T = values_T.view(np.uint64)
    hashes_T = np.empty(len(words_T), np.uint64)
    for start in range(0, len(words_T), _CHUNK):
        block_T = words_T[start : start + _CHUNK]
        if hash_type == "murmur":
            with np.errstate(over="ignore"):
                seed = np.uint64(_SEED) ^ (np.uint64(8) * _MULTIPLIER)
                part_T = _finish((seed ^ _scramble(block_T.copy())) * _MULTIPLIER)
        else:
            text = np.append(block_T, np.zeros(_PADDING // 8, np.uint64)).view(np.uint8)
            part_T = _hash_chunk(text, 8 * np.arange(len(block_T) + 1), _farm)
        hashes_T[start : start + _CHUNK] = part_T
    return hashes_T


def to_buckets(ids_T: np.ndarray, buckets: int) -> np.ndarray:
    """`ids_T mod buckets`, computed with unsigned 64-bit numbers.

    Args:
      ids_T: int64 or uint64 ids or hashes.
      buckets: at least 1, below 2^31.

    Returns:
      int32 `[T]` in `[0, buckets)`.

    Examples:
      >>> to_buckets(np.array([3, 12, -1]), 10).tolist()  # -1 is 2^64 - 1
      [3, 2, 5]
    """
    ids_T, size = ids_T.view(np.uint64), np.uint64(buckets)
    if ids_T.max(initial=0) < size:
        return ids_T.astype(np.int32)
    buckets_T = np.empty(len(ids_T), np.int32)
    for start in range(0, len(ids_T), _CHUNK):
        block = ids_T[start : start + _CHUNK]
        # NumPy's % is slower than a division and a multiplication.
        multiple = block // size
        multiple *= size
        buckets_T[start : start + _CHUNK] = np.subtract(block, multiple, out=multiple)
    return buckets_T


def to_positive_ids(hashes_T: np.ndarray) -> np.ndarray:
    """Turns hashes into ids of growing tables: keeps the low 63 bits, as RecIS does.

    Args:
      hashes_T: uint64.

    Returns:
      int64 `[T]`, never negative.

    Examples:
      >>> to_positive_ids(np.array([7, 2**63 + 7], np.uint64)).tolist()
      [7, 7]
    """
    return (hashes_T & np.uint64(2**63 - 1)).view(np.int64)


def _farm(load: farmhash.Load, begins_T: np.ndarray, lengths_T: np.ndarray) -> np.ndarray:
    return farmhash.fingerprint64(load, begins_T, lengths_T)


def _murmur(load: farmhash.Load, begins_T: np.ndarray, lengths_T: np.ndarray) -> np.ndarray:
    """Hashes the `lengths_T` bytes that start at byte `begins_T`."""
    shortest, longest = int(lengths_T.min()), int(lengths_T.max())
    whole_T = lengths_T >> 3
    with np.errstate(over="ignore"):
        hashes_T = lengths_T.astype(np.uint64)
        hashes_T *= _MULTIPLIER
        hashes_T ^= np.uint64(_SEED)
        for word in range(shortest // 8):
            hashes_T ^= _scramble(load(begins_T + 8 * word))
            hashes_T *= _MULTIPLIER
        for word in range(shortest // 8, longest // 8):
            (longer,) = np.nonzero(whole_T > word)
            block = _scramble(load(begins_T[longer] + 8 * word))
            hashes_T[longer] = (hashes_T[longer] ^ block) * _MULTIPLIER
        if shortest < longest or longest % 8 > 0:
            tail_T = lengths_T & 7
            block = load(begins_T + 8 * whole_T)
            block &= _LOW_BYTES[tail_T] if shortest < longest else _LOW_BYTES[longest % 8]
            block ^= hashes_T
            block *= _MULTIPLIER
            if shortest < longest:
                # Strings of whole words have no tail.
                np.copyto(block, hashes_T, where=tail_T == 0)
            hashes_T = block
        return _finish(hashes_T)


def _scramble(block: np.ndarray) -> np.ndarray:
    """Mixes words, in place."""
    block *= _MULTIPLIER
    block ^= block >> _SHIFT
    block *= _MULTIPLIER
    return block


def _finish(hashes: np.ndarray) -> np.ndarray:
    """The final mixing, in place."""
    hashes ^= hashes >> _SHIFT
    hashes *= _MULTIPLIER
    hashes ^= hashes >> _SHIFT
    return hashes
