"""64-bit ids → rows without collisions, in device memory: two-choice bucketed hashing.

The arrays of a map have an entry for each row of its table and are sharded in the same way. Bits of an
id's key determine its segment, one of S, and two buckets of 16 slots in this segment; a key is the id
scrambled by a permutation of 64-bit numbers (`id_keys`). The slot is the row. Finding an id looks at
its two buckets. A new id takes a free slot of the emptier one (Azar et al., "Balanced allocations",
1999; on GPUs, Awad et al., "Analyzing and implementing GPU hash tables", 2023) or, if both are full,
the slot of an id that can move to its other bucket (Pagh and Rodler, "Cuckoo hashing", 2001). Removing
an id empties its slot and leaves no trace. When the number of buckets doubles, the ids of bucket b move
to the same slots of bucket b or of its double, so growing is a copy and never fails.

Everything here works on one device's part of a map, inside `jax.shard_map`. Shapes: R rows, S segments
and U ids of a device, C new ids that are placed together, D table width, W words of a segment.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from s2s_jax.embedding import waiting_ids
from s2s_jax.embedding.id_keys import EMPTY, is_there, segment_of
from s2s_jax.embedding.tables import NUM_SEGMENTS, SLOTS

# The row of an id without a row.
NO_ROW = -1
_BIG = np.iinfo(np.int32).max


class IdMap(NamedTuple):
    """The map from ids to rows.

    Attributes:
      keys_R2: uint32 words of the key of each row's id, `EMPTY` if a row has none.
      seen_R: int32 step in which the row was last used in training.
      count_R: int32 number of places in batches that used the row, at most 2^31 - 1.
      sketch_SW: int32 sightings of ids that have no row yet, see `waiting_ids`; W = 1 if ids do not
        wait.
      rows_S: int32 number of rows that have an id.
      dropped_S: int32 number of ids that found no free slot, counted once per step.
      evicted_S: int32 number of ids that lost their row.
    """

    keys_R2: jax.Array
    seen_R: jax.Array
    count_R: jax.Array
    sketch_SW: jax.Array
    rows_S: jax.Array
    dropped_S: jax.Array
    evicted_S: jax.Array


def empty_map(rows: int, admit_after: int) -> IdMap:
    """The map of a whole table, without ids."""
    return IdMap(
        keys_R2=jnp.full((rows, 2), EMPTY),
        seen_R=jnp.zeros(rows, jnp.int32),
        count_R=jnp.zeros(rows, jnp.int32),
        sketch_SW=waiting_ids.empty(rows, admit_after),
        rows_S=jnp.zeros(NUM_SEGMENTS, jnp.int32),
        dropped_S=jnp.zeros(NUM_SEGMENTS, jnp.int32),
        evicted_S=jnp.zeros(NUM_SEGMENTS, jnp.int32),
    )


def bucket_pairs(id_map: IdMap, keys_U2: jax.Array, first_segment: jax.Array) -> jax.Array:
    """int32 `[U, 2]`: the two buckets of each key in this device's part."""
    segments = id_map.dropped_S.shape[0]
    buckets = id_map.keys_R2.shape[0] // (segments * SLOTS)
    local_U = segment_of(keys_U2) - first_segment
    within_U2 = (keys_U2 & np.uint32(buckets - 1)).astype(jnp.int32)
    return jnp.clip(local_U, 0, segments - 1)[:, None] * buckets + within_U2


def find(id_map: IdMap, keys_U2: jax.Array, first_segment: jax.Array) -> jax.Array:
    """int32 `[U]` row of each key in this device's part, `NO_ROW` if it has none."""
    bucket_U2 = bucket_pairs(id_map, keys_U2, first_segment)
    words = id_map.keys_R2.reshape(-1, SLOTS * 2).at[bucket_U2].get(mode="promise_in_bounds")
    same = words.reshape(-1, 2, SLOTS, 2) == keys_U2[:, None, None, :]
    match = same.all(axis=-1).reshape(-1, 2 * SLOTS)
    place_U = jnp.argmax(match, axis=-1).astype(jnp.int32)
    bucket_U = jnp.where(place_U < SLOTS, bucket_U2[:, 0], bucket_U2[:, 1])
    row_U = bucket_U * SLOTS + place_U % SLOTS
    return jnp.where(match.any(axis=-1) & is_there(keys_U2), row_U, NO_ROW)


def saturated(before_S: jax.Array, after_S: jax.Array) -> jax.Array:
    """Sums that stop at 2^31 - 1, also if they have wrapped around in an older checkpoint."""
    return jnp.where((before_S < 0) | (after_S < before_S), _BIG, after_S)


def record_seen(
    id_map: IdMap, keys_U2: jax.Array, first_segment: jax.Array, step: jax.Array
) -> IdMap:
    """Records that some keys, which may repeat, occur in this step, so that they keep their rows."""
    row_U = find(id_map, keys_U2, first_segment)
    index_U = jnp.where(row_U >= 0, row_U, id_map.seen_R.shape[0])
    return id_map._replace(seen_R=id_map.seen_R.at[index_U].set(step, mode="drop"))


def doubled(id_map: IdMap) -> IdMap:
    """The map with twice as many buckets per segment; see `doubled_rows` for the table's arrays."""
    segments = id_map.dropped_S.shape[0]
    buckets = id_map.keys_R2.shape[0] // (segments * SLOTS)
    wide = id_map._replace(
        keys_R2=doubled_rows(id_map.keys_R2, segments),
        seen_R=doubled_rows(id_map.seen_R, segments),
        count_R=doubled_rows(id_map.count_R, segments),
    )
    # Either the first or the second word of a key put it into its bucket.
    old, new = np.uint32(buckets - 1), np.uint32(2 * buckets - 1)
    number_R = jnp.arange(2 * id_map.seen_R.shape[0], dtype=jnp.int32) // SLOTS
    bucket_R = (number_R % (2 * buckets)).astype(jnp.uint32)
    by_first_R = (wide.keys_R2[:, 0] & old) == (bucket_R & old)
    word_R = jnp.where(by_first_R, wide.keys_R2[:, 0], wide.keys_R2[:, 1])
    stays_R = (word_R & new) == bucket_R
    return wide._replace(
        keys_R2=jnp.where(stays_R[:, None], wide.keys_R2, EMPTY),
        sketch_SW=waiting_ids.doubled(id_map.sketch_SW),
    )


def doubled_rows(x_R: jax.Array, segments: int) -> jax.Array:
    """`[2R, …]`: for each segment, its buckets and then its buckets again."""
    by_segment = x_R.reshape(segments, -1, *x_R.shape[1:])
    return jnp.concatenate([by_segment, by_segment], axis=1).reshape(-1, *x_R.shape[1:])


def evicted(id_map: IdMap, step: jax.Array, unseen_for: int | None, fewer_than: int) -> IdMap:
    """Evicts ids that were not seen for more than `unseen_for` steps, or were rarely used.

    Args:
      id_map: the map.
      step: int32, steps done.
      unseen_for: the number of steps; None: no limit.
      fewer_than: ids with fewer uses than this are evicted, unless they were seen in the last step.
    """
    age_R = step - id_map.seen_R
    there_R = is_there(id_map.keys_R2)
    goes_R = jnp.zeros_like(there_R)
    if unseen_for is not None:
        goes_R |= age_R > unseen_for
    goes_R |= (id_map.count_R < fewer_than) & (age_R > 1)
    goes_R &= there_R
    gone_S = goes_R.reshape(id_map.evicted_S.shape[0], -1).sum(axis=1, dtype=jnp.int32)
    return id_map._replace(
        keys_R2=jnp.where(goes_R[:, None], EMPTY, id_map.keys_R2),
        rows_S=id_map.rows_S - gone_S,
        evicted_S=saturated(id_map.evicted_S, id_map.evicted_S + gone_S),
    )
