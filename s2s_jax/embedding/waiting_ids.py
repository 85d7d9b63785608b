"""Ids that wait for a row in a growing table: which ones were seen recently, and how often.

In addition to its rows, a table has buckets of 16 words, in the same segments. Bits of its key
determine the bucket of a waiting id. The first word of a bucket is a cursor; the others are a ring of
the ids that were seen last: 22 more bits of each key (its tag) and 10 bits of sightings. A sighting
moves an id to the cursor, where it replaces the id that was not seen for longest.

So an id is forgotten when 15 others of its bucket were seen after it. A table of R rows has R / 4
buckets. Of the ids that occur again after R other waiting ids, 1 in 50,000 is forgotten; after 2 R, one
in 60; after 3 R, a quarter. A new id is mistaken for another one only if bucket and tag agree, which
has a probability of at most 15 in 2^22, for any number of ids. (A count-min sketch of the same size has
no tags and fills up: after as many one-off ids as it has cells, it mistakes most of them for known
ids.)

Shapes: S segments and U ids of a device, W words of a segment, B words of a bucket.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from s2s_jax.config.features import MOST_SIGHTINGS
from s2s_jax.embedding.id_keys import other_bits, rank_among_equals
from s2s_jax.embedding.tables import NUM_SEGMENTS

_WORDS = 16
_RING = _WORDS - 1
_COUNT_BITS = MOST_SIGHTINGS.bit_length()
_BIG = np.iinfo(np.int32).max


class Sighted(NamedTuple):
    """The result of `record_sightings`.

    Attributes:
      words_SW: the updated buckets.
      sightings_U: int32, sightings of each id so far, including the new ones.
      at_U: int32, index of each id's word in the flattened `words_SW`; past the end if it has none.
    """

    words_SW: jax.Array
    sightings_U: jax.Array
    at_U: jax.Array


def empty(rows: int, admit_after: int) -> jax.Array:
    """int32 `[S, W]` for a whole table of `rows` rows; W is 1 if ids do not wait."""
    words = 4 * rows // NUM_SEGMENTS if admit_after > 1 else 1
    return jnp.zeros((NUM_SEGMENTS, words), jnp.int32)


def record_sightings(
    words_SW: jax.Array,
    keys_U2: jax.Array,
    count_U: jax.Array,
    waits_U: jax.Array,
    segment_U: jax.Array,
) -> Sighted:
    """Records sightings of ids without a row.

    Args:
      words_SW: the buckets.
      keys_U2: uint32, distinct keys.
      count_U: int32, sightings of each key.
      waits_U: bool, which keys to record; at most 15 per bucket are remembered.
      segment_U: int32 segments, numbered from this device's first one.
    """
    segments, words = words_SW.shape
    buckets, size = words // _WORDS, words_SW.size
    bits_U2 = other_bits(keys_U2)
    within_U = (bits_U2[:, 0] & np.uint32(buckets - 1)).astype(jnp.int32)
    bucket_U = jnp.clip(segment_U, 0, segments - 1) * buckets + within_U
    tag_U = bits_U2[:, 1] >> np.uint32(_COUNT_BITS)
    flat = words_SW.reshape(-1)
    held_UB = flat.reshape(-1, _WORDS).at[bucket_U].get(mode="promise_in_bounds")
    held_UB = jax.lax.bitcast_convert_type(held_UB, jnp.uint32)
    ring_UB, cursor_U = held_UB[:, 1:], held_UB[:, 0]
    sightings_UB = ring_UB & np.uint32(MOST_SIGHTINGS)
    same_UB = (ring_UB >> np.uint32(_COUNT_BITS) == tag_U[:, None]) & (sightings_UB > 0)
    before_U = jnp.where(same_UB, sightings_UB, 0).max(axis=1).astype(jnp.int32)
    sightings_U = before_U + jnp.minimum(count_U, MOST_SIGHTINGS)
    # An id moves from its old place to the cursor, behind earlier ids of the same bucket.
    old_U = bucket_U * _WORDS + 1 + jnp.argmax(same_UB, axis=1).astype(jnp.int32)
    flat = flat.at[jnp.where(waits_U & (before_U > 0), old_U, size)].set(0, mode="drop")
    rank_U = rank_among_equals(jnp.where(waits_U, bucket_U, _BIG))
    written_U = waits_U & (rank_U < _RING)
    place_U = (cursor_U + rank_U.astype(jnp.uint32)) % np.uint32(_RING)
    at_U = bucket_U * _WORDS + 1 + place_U.astype(jnp.int32)
    at_U = jnp.where(written_U, at_U, size)
    kept_U = jnp.minimum(sightings_U, MOST_SIGHTINGS).astype(jnp.uint32)
    word_U = jax.lax.bitcast_convert_type((tag_U << np.uint32(_COUNT_BITS)) | kept_U, jnp.int32)
    flat = flat.at[at_U].set(word_U, mode="drop")
    flat = flat.at[jnp.where(written_U, bucket_U * _WORDS, size)].add(1, mode="drop")
    return Sighted(flat.reshape(words_SW.shape), sightings_U, at_U)


def forget(words_SW: jax.Array, at_U: jax.Array, which_U: jax.Array) -> jax.Array:
    """Removes ids whose sightings were just recorded, because they now have a row."""
    flat = words_SW.reshape(-1)
    at_U = jnp.where(which_U, at_U, flat.size)
    return flat.at[at_U].set(0, mode="drop").reshape(words_SW.shape)


def doubled(words_SW: jax.Array) -> jax.Array:
    """The buckets of a table with twice the rows: two copies of each, so ids are found in both."""
    if words_SW.shape[1] == 1:
        return words_SW
    return jnp.concatenate([words_SW, words_SW], axis=1)
