"""64-bit ids → rows without collisions, in device memory: two-choice bucketed hashing.

A map's arrays lie beside the rows of its table and are sharded as these are. An id belongs to one of S
segments, and to two buckets of 16 slots in it, by bits of its key; a key is the id scrambled by a
permutation of 64-bit numbers (`id_keys`). The slot is the row. Finding looks at these two buckets; a new
id takes a free slot of the emptier one (Azar et al., "Balanced allocations", 1999; on GPUs, Awad et al.,
"Analyzing and implementing GPU hash tables", 2023) or, if both are full, the slot of one that can move
to its other bucket (Pagh and Rodler, "Cuckoo hashing", 2001); removing empties the slot and leaves no
trace. When the number of buckets doubles, what is in bucket b goes to the same slot of bucket b or of
its double, so growing copies and never fails.

Everything here works on one device's part of a map, inside `jax.shard_map`. Shapes: R rows, S segments
and U ids of a device, C new ids that are placed together, D table width, W words of a segment.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from s2s_jax.embedding import waiting_ids
from s2s_jax.embedding.id_keys import (
    EMPTY,
    UniqueKeys,
    is_there,
    rank_among_equals,
    segment_of,
)
from s2s_jax.embedding.tables import NUM_SEGMENTS, SLOTS

# New ids that are placed together: an eighth of all, since after a while few are new.
_CHUNKS = 8
_BIG = np.iinfo(np.int32).max


class IdMap(NamedTuple):
    """Which id has which row.

    Attributes:
      keys_R2: uint32 words of the key of each row's id, `EMPTY` where a row has none.
      seen_R: int32 step at which the row was last used in training.
      count_R: int32 places of batches that used the row, 2^31 - 1 for more.
      sketch_SW: int32, what is known of ids that have no row yet, see `waiting_ids`; W = 1 where none
        has to wait.
      rows_S: int32 rows that have an id.
      dropped_S: int32 ids, counted once a step, that found no free slot.
      evicted_S: int32 ids that lost their row.
    """

    keys_R2: jax.Array
    seen_R: jax.Array
    count_R: jax.Array
    sketch_SW: jax.Array
    rows_S: jax.Array
    dropped_S: jax.Array
    evicted_S: jax.Array


class Policy(NamedTuple):
    """What happens to new ids.

    Attributes:
      admit_after: sightings that give an id a row.
      evict: whether ids that find no free slot take that of the id not seen for longest.
    """

    admit_after: int
    evict: bool


def empty_map(rows: int, admit_after: int) -> IdMap:
    """A map of a whole table, without ids."""
    return IdMap(
        keys_R2=jnp.full((rows, 2), EMPTY),
        seen_R=jnp.zeros(rows, jnp.int32),
        count_R=jnp.zeros(rows, jnp.int32),
        sketch_SW=waiting_ids.empty(rows, admit_after),
        rows_S=jnp.zeros(NUM_SEGMENTS, jnp.int32),
        dropped_S=jnp.zeros(NUM_SEGMENTS, jnp.int32),
        evicted_S=jnp.zeros(NUM_SEGMENTS, jnp.int32),
    )


def _bucket_pairs(id_map: IdMap, keys_U2: jax.Array, first_segment: jax.Array) -> jax.Array:
    """int32 `[U, 2]`: the two buckets of each key in this device's part."""
    segments = id_map.dropped_S.shape[0]
    buckets = id_map.keys_R2.shape[0] // (segments * SLOTS)
    local_U = segment_of(keys_U2) - first_segment
    within_U2 = (keys_U2 & np.uint32(buckets - 1)).astype(jnp.int32)
    return jnp.clip(local_U, 0, segments - 1)[:, None] * buckets + within_U2


def _slots_of(x_R: jax.Array, bucket_U2: jax.Array) -> jax.Array:
    """`[U, 2, SLOTS, …]`: what is in the slots of some buckets."""
    by_bucket = x_R.reshape(-1, SLOTS, *x_R.shape[1:])
    return by_bucket.at[bucket_U2].get(mode="promise_in_bounds")


def find(id_map: IdMap, keys_U2: jax.Array, first_segment: jax.Array) -> jax.Array:
    """int32 `[U]` row of each key in this device's part, -1 where it has none."""
    bucket_U2 = _bucket_pairs(id_map, keys_U2, first_segment)
    words = id_map.keys_R2.reshape(-1, SLOTS * 2).at[bucket_U2].get(mode="promise_in_bounds")
    same = words.reshape(-1, 2, SLOTS, 2) == keys_U2[:, None, None, :]
    match = same.all(axis=-1).reshape(-1, 2 * SLOTS)
    place_U = jnp.argmax(match, axis=-1).astype(jnp.int32)
    bucket_U = jnp.where(place_U < SLOTS, bucket_U2[:, 0], bucket_U2[:, 1])
    row_U = bucket_U * SLOTS + place_U % SLOTS
    return jnp.where(match.any(axis=-1) & is_there(keys_U2), row_U, -1)


class Claimed(NamedTuple):
    """What `find_or_claim` did.

    Attributes:
      id_map: the map afterwards.
      row_U: int32 row of each key, -1 where it has none. If rows moved, it may be an earlier one.
      beside: the arrays beside the map, new rows made by `make_rows`.
      moved: int32, how many rows moved.
    """

    id_map: IdMap
    row_U: jax.Array
    beside: Any
    moved: jax.Array


def find_or_claim(
    id_map: IdMap,
    unique: UniqueKeys,
    first_segment: jax.Array,
    step: jax.Array,
    policy: Policy,
    beside: Any,
    make_rows: Any,
) -> Claimed:
    """Gives rows to keys that have none, as `policy` says, and notes that all were seen.

    Keys of one segment are placed together and without regard to others, so the outcome does not depend
    on how segments lie on devices.

    Args:
      id_map: the map.
      unique: keys.
      first_segment: int32 number of this device's first segment.
      step: int32, this step.
      policy: of admission and eviction.
      beside: arrays `[R, …]` to be changed where rows get new owners.
      make_rows: `(beside, rows_C, keys_C2) -> beside` writes the rows of new ids; rows that are not to
        be written count on from R.
    """
    keys_U2 = unique.keys_U2
    there_U = is_there(keys_U2)
    row_U = find(id_map, keys_U2, first_segment)
    wanting_U = there_U & (row_U < 0)
    if policy.admit_after > 1:
        sighted = waiting_ids.sight(
            id_map.sketch_SW,
            keys_U2,
            unique.count_U,
            wanting_U,
            segment_of(keys_U2) - first_segment,
        )
        wanting_U &= sighted.sightings_U >= policy.admit_after
    # Seen before any is evicted, so that no id of this step is.
    id_map = _see(id_map, row_U, unique.count_U, step)
    id_map, row_U, beside, moved = _claim(
        id_map, unique, row_U, wanting_U, first_segment, step, policy.evict, beside, make_rows
    )
    if policy.admit_after > 1:
        words_SW = waiting_ids.forget(sighted.words_SW, sighted.at_U, wanting_U & (row_U >= 0))
        id_map = id_map._replace(sketch_SW=words_SW)
    lost_U = wanting_U & (row_U < 0)
    dropped_S = _count(id_map.dropped_S, segment_of(keys_U2) - first_segment, lost_U)
    return Claimed(id_map._replace(dropped_S=dropped_S), row_U, beside, moved)


def _count(number_S: jax.Array, segment_U: jax.Array, which_U: jax.Array) -> jax.Array:
    """Adds to each segment how many of its own are meant."""
    at_U = jnp.where(which_U, segment_U, number_S.size)
    return _saturated(number_S, number_S.at[at_U].add(1, mode="drop"))


def _saturated(before_S: jax.Array, after_S: jax.Array) -> jax.Array:
    """Sums that stop at 2^31 - 1; what has wrapped around in an older checkpoint was there already."""
    return jnp.where((before_S < 0) | (after_S < before_S), _BIG, after_S)


def seen(id_map: IdMap, keys_U2: jax.Array, first_segment: jax.Array, step: jax.Array) -> IdMap:
    """The map with a note that some keys, which may repeat, come in this step and keep their rows."""
    row_U = find(id_map, keys_U2, first_segment)
    index_U = jnp.where(row_U >= 0, row_U, id_map.seen_R.shape[0])
    return id_map._replace(seen_R=id_map.seen_R.at[index_U].set(step, mode="drop"))


def _see(id_map: IdMap, row_U: jax.Array, count_U: jax.Array, step: jax.Array) -> IdMap:
    rows = id_map.seen_R.shape[0]
    index_U = jnp.where(row_U >= 0, row_U, rows + jnp.arange(row_U.size, dtype=jnp.int32))
    before_U = id_map.count_R.at[jnp.maximum(row_U, 0)].get(mode="promise_in_bounds")
    # What has wrapped around, also in checkpoints of old, was counted often enough.
    count_U = jnp.where((before_U < 0) | (before_U > _BIG - count_U), _BIG, before_U + count_U)
    return id_map._replace(
        seen_R=id_map.seen_R.at[index_U].set(step, mode="drop", unique_indices=True),
        count_R=id_map.count_R.at[index_U].set(count_U, mode="drop", unique_indices=True),
    )


def _claim(
    id_map: IdMap,
    unique: UniqueKeys,
    row_U: jax.Array,
    wanting_U: jax.Array,
    first_segment: jax.Array,
    step: jax.Array,
    evict: bool,
    beside: Any,
    make_rows: Any,
) -> tuple[IdMap, jax.Array, Any, jax.Array]:
    """Places the wanting keys, C of them at a time; a segment is cut only if it alone has more."""
    size, rows = row_U.size, id_map.seen_R.shape[0]
    chunk = min(size, max(256, math.ceil(size / _CHUNKS)))
    wanting_U = wanting_U.astype(jnp.int32)
    total = wanting_U.sum()
    # Places of the wanting keys, in order.
    rank_U = jnp.where(wanting_U > 0, jnp.cumsum(wanting_U) - 1, size + chunk)
    number_U = jnp.arange(size, dtype=jnp.int32)
    place_of = jnp.full(size + chunk, size, jnp.int32).at[rank_U].set(number_U, mode="drop")

    def one_chunk(state: tuple) -> tuple:
        begin, id_map, row_U, beside, moved = state
        place_C = jax.lax.dynamic_slice(place_of, (begin,), (chunk,))
        keys_C2 = unique.keys_U2.at[place_C].get(mode="fill", fill_value=EMPTY)
        after = unique.keys_U2.at[place_of[jnp.minimum(begin + chunk, size)]]
        following = after.get(mode="fill", fill_value=EMPTY)[None]
        # What belongs to the segment that goes on in the next chunk waits for it.
        segment_C, next_segment = segment_of(keys_C2), segment_of(following)[0]
        waits_C = (begin + chunk < total) & (segment_C == next_segment) & (segment_C[0] < segment_C)
        active_C = (place_C < size) & ~waits_C
        id_map, new_C, robbed_C = _place(id_map, keys_C2, active_C, first_segment, step, evict)
        if not evict:
            id_map, new_C, beside, of_chunk = _make_room(
                id_map, keys_C2, active_C & (new_C < 0), new_C, first_segment, step, beside
            )
            moved += of_chunk
        count_C = unique.count_U.at[place_C].get(mode="clip")
        placed_C = new_C >= 0
        index_C = jnp.where(placed_C, new_C, rows + jnp.arange(chunk, dtype=jnp.int32))
        segment_C -= first_segment
        id_map = id_map._replace(
            count_R=id_map.count_R.at[index_C].set(count_C, mode="drop", unique_indices=True),
            rows_S=_count(id_map.rows_S, segment_C, placed_C & ~robbed_C),
            evicted_S=_count(id_map.evicted_S, segment_C, robbed_C),
        )
        beside = make_rows(beside, index_C, keys_C2)
        row_U = row_U.at[jnp.where(placed_C, place_C, size)].set(new_C, mode="drop")
        taken = active_C.sum(dtype=jnp.int32)
        return begin + taken, id_map, row_U, beside, moved

    start = (jnp.zeros_like(total), id_map, row_U, beside, jnp.zeros_like(total))
    return jax.lax.while_loop(lambda state: state[0] < total, one_chunk, start)[1:]


def _place(
    id_map: IdMap,
    keys_C2: jax.Array,
    active_C: jax.Array,
    first_segment: jax.Array,
    step: jax.Array,
    evict: bool,
) -> tuple[IdMap, jax.Array, jax.Array]:
    """Finds slots in rounds: all choose a bucket, and those that chose the same share its free slots.

    Returns the map, the row of each key (-1 where there is none), and whether it was another's.
    """
    bucket_C2 = _bucket_pairs(id_map, keys_C2, first_segment)
    chunk, rows = active_C.size, id_map.seen_R.shape[0]
    number_C = jnp.arange(chunk, dtype=jnp.int32)

    def one_round(state: tuple) -> tuple:
        pending_C, row_C, robbed_C, keys_R2, seen_R = state
        free = (_slots_of(keys_R2, bucket_C2) == EMPTY).all(axis=-1)
        free_C2 = free.sum(axis=-1, dtype=jnp.int32)
        second_C = (free_C2[:, 1] > free_C2[:, 0]).astype(jnp.int32)
        if evict:
            seen = _slots_of(seen_R, bucket_C2)
            seen = jnp.where(seen < step, seen, _BIG)
            full_C = free_C2.max(axis=1) == 0
            older_C = seen[:, 1].min(axis=-1) < seen[:, 0].min(axis=-1)
            second_C = jnp.where(full_C, older_C.astype(jnp.int32), second_C)
            # Free slots come first, then those not seen for longest; never those of this step.
            score = jnp.where(free, -1, jnp.where(full_C[:, None, None], seen, _BIG))
        else:
            score = jnp.where(free, -1, _BIG)
        score_CS = score[number_C, second_C]
        bucket_C = bucket_C2[number_C, second_C]
        usable_C = (score_CS < _BIG).sum(axis=-1)
        rank_C = rank_among_equals(jnp.where(pending_C, bucket_C, _BIG))
        slot_C = jnp.argsort(score_CS, axis=-1)[number_C, jnp.minimum(rank_C, SLOTS - 1)]
        placed_C = pending_C & (rank_C < usable_C)
        at_C = bucket_C * SLOTS + slot_C.astype(jnp.int32)
        robbed_C |= placed_C & (score_CS[number_C, slot_C] >= 0)
        index_C = jnp.where(placed_C, at_C, rows + number_C)
        keys_R2 = keys_R2.at[index_C].set(keys_C2, mode="drop", unique_indices=True)
        seen_R = seen_R.at[index_C].set(step, mode="drop", unique_indices=True)
        row_C = jnp.where(placed_C, at_C, row_C)
        # Whoever found both buckets full gives up.
        return pending_C & ~placed_C & (usable_C > 0), row_C, robbed_C, keys_R2, seen_R

    # Made from what varies over devices, as all else here does.
    nowhere_C, not_C = jnp.where(active_C, -1, -1), active_C & ~active_C
    start = (active_C, nowhere_C, not_C, id_map.keys_R2, id_map.seen_R)
    _, row_C, robbed_C, keys_R2, seen_R = jax.lax.while_loop(
        lambda state: state[0].any(), one_round, start
    )
    return id_map._replace(keys_R2=keys_R2, seen_R=seen_R), row_C, robbed_C


def _make_room(
    id_map: IdMap,
    keys_C2: jax.Array,
    failed_C: jax.Array,
    row_C: jax.Array,
    first_segment: jax.Array,
    step: jax.Array,
    beside: Any,
) -> tuple[IdMap, jax.Array, Any, jax.Array]:
    """For keys whose buckets are full, one after the other: moves a row to its other bucket.

    Returns the map, the row of each key, the arrays beside the map, and how many rows moved.
    """

    def one_key(state: tuple) -> tuple:
        failed_C, row_C, keys_R2, seen_R, count_R, beside, moved = state
        number = jnp.argmax(failed_C)
        key_2 = keys_C2[number]
        bucket_2 = _bucket_pairs(id_map, key_2[None], first_segment)[0]
        held_N2 = keys_R2.reshape(-1, SLOTS, 2)[bucket_2].reshape(-1, 2)
        pair_N2 = _bucket_pairs(id_map, held_N2, first_segment)
        here_N = jnp.repeat(bucket_2, SLOTS)
        other_N = jnp.where(pair_N2[:, 0] == here_N, pair_N2[:, 1], pair_N2[:, 0])
        free_NS = (keys_R2.reshape(-1, SLOTS, 2)[other_N] == EMPTY).all(axis=-1)
        place = jnp.argmax(free_NS.sum(axis=-1))
        can = free_NS[place].any()
        to = other_N[place] * SLOTS + jnp.argmax(free_NS[place]).astype(jnp.int32)
        source = here_N[place] * SLOTS + place.astype(jnp.int32) % SLOTS

        def move(x_R: jax.Array) -> jax.Array:
            # To itself where none can move.
            return x_R.at[jnp.where(can, to, source)].set(x_R[source])

        keys_R2, seen_R, count_R, beside = jax.tree.map(move, (keys_R2, seen_R, count_R, beside))
        keys_R2 = keys_R2.at[source].set(jnp.where(can, key_2, keys_R2[source]))
        seen_R = seen_R.at[source].set(jnp.where(can, step, seen_R[source]))
        # What moves may be a key that has just been placed.
        row_C = jnp.where(can & (row_C == source), to, row_C)
        row_C = row_C.at[number].set(jnp.where(can, source, -1))
        failed_C = failed_C.at[number].set(False)
        return failed_C, row_C, keys_R2, seen_R, count_R, beside, moved + can

    moved = jnp.zeros_like(failed_C.sum(dtype=jnp.int32))
    start = (failed_C, row_C, id_map.keys_R2, id_map.seen_R, id_map.count_R, beside, moved)
    _, row_C, keys_R2, seen_R, count_R, beside, moved = jax.lax.while_loop(
        lambda state: state[0].any(), one_key, start
    )
    id_map = id_map._replace(keys_R2=keys_R2, seen_R=seen_R, count_R=count_R)
    return id_map, row_C, beside, moved


def doubled(id_map: IdMap) -> IdMap:
    """The map with twice as many buckets a segment; see `doubled_rows` for the arrays beside it."""
    segments = id_map.dropped_S.shape[0]
    buckets = id_map.keys_R2.shape[0] // (segments * SLOTS)
    wide = id_map._replace(
        keys_R2=doubled_rows(id_map.keys_R2, segments),
        seen_R=doubled_rows(id_map.seen_R, segments),
        count_R=doubled_rows(id_map.count_R, segments),
    )
    # In bucket b lies what chose it by its first word or else by its second.
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
    """`[2R, …]`: in each of the segments, its buckets and then its buckets again."""
    by_segment = x_R.reshape(segments, -1, *x_R.shape[1:])
    return jnp.concatenate([by_segment, by_segment], axis=1).reshape(-1, *x_R.shape[1:])


def evicted(id_map: IdMap, step: jax.Array, unseen_for: int | None, fewer_than: int) -> IdMap:
    """The map without ids unseen for more than `unseen_for` steps or used `fewer_than` times till then.

    Args:
      id_map: the map.
      step: int32, steps done.
      unseen_for: steps; None: no limit.
      fewer_than: uses that an id must have to stay, once it was not seen in the last step.
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
        evicted_S=_saturated(id_map.evicted_S, id_map.evicted_S + gone_S),
    )
