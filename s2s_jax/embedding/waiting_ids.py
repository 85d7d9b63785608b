"""Ids that wait for a row in a table that grows: which were seen lately, and how often.

Beside the rows of a table lie buckets of 16 words, in segments as the rows are. A waiting id belongs to
one bucket, by bits of its key. The first word of a bucket is a cursor; the others are a ring of the ids
that were last seen there: 22 more bits of each key (its tag) and 10 bits of sightings. A sighting moves
an id to the cursor, in place of the one that was not seen for longest.

So an id is forgotten when 15 others of its bucket were seen after it. A table of R rows has R / 4
buckets: of the ids that come again after R other waiting ones, 1 in 50,000 is forgotten, after 2 R one
in 60, after 3 R a quarter. And an id that never came before is taken for another one only if bucket and
tag agree, 15 times in 2^22 at most, however many came. (A count-min sketch of the same size keeps no
tags and fills up: after as many one-off ids as it has cells it takes most of them for known ones.)

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
    """What `sight` found.

    Attributes:
      words_SW: the buckets afterwards.
      sightings_U: int32, those of each id so far, with those of now.
      at_U: int32, the word of each id in all of `words_SW`, past its end where it has none.
    """

    words_SW: jax.Array
    sightings_U: jax.Array
    at_U: jax.Array


def empty(rows: int, admit_after: int) -> jax.Array:
    """int32 `[S, W]` for a whole table of so many rows; W is 1 where no id has to wait."""
    words = 4 * rows // NUM_SEGMENTS if admit_after > 1 else 1
    return jnp.zeros((NUM_SEGMENTS, words), jnp.int32)


def sight(
    words_SW: jax.Array,
    keys_U2: jax.Array,
    count_U: jax.Array,
    waits_U: jax.Array,
    segment_U: jax.Array,
) -> Sighted:
    """Notes sightings of ids that have no row.

    Args:
      words_SW: the buckets.
      keys_U2: uint32, distinct keys.
      count_U: int32 sightings of each.
      waits_U: bool, which of them to note; of one bucket at most 15, others are not remembered.
      segment_U: int32 segments among those of this device.
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
    # Where it was it goes from, and to the cursor, behind those of its bucket that come before it.
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
    """The buckets without some of the ids that were just sighted, since they have a row now."""
    flat = words_SW.reshape(-1)
    at_U = jnp.where(which_U, at_U, flat.size)
    return flat.at[at_U].set(0, mode="drop").reshape(words_SW.shape)


def doubled(words_SW: jax.Array) -> jax.Array:
    """The buckets of a table of twice the rows: an id is found in whichever of the two is its own."""
    if words_SW.shape[1] == 1:
        return words_SW
    return jnp.concatenate([words_SW, words_SW], axis=1)
