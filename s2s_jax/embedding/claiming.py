"""Gives rows to new ids: which ids get one, and where in the map.

A new id waits until it has been seen often enough (`waiting_ids`). Then it takes a free slot of one of
its two buckets. If both are full, it takes the slot of an id that can move to its other bucket or, in a
table that may no longer grow, the slot of the id not seen for longest. `id_map` cites the papers.

Everything here works on one device's part of a map, inside `jax.shard_map`. Shapes: R rows, S segments
and U ids of a device, C new ids that are placed together, W words of a segment.
"""

import math
from collections.abc import Callable
from typing import Generic, NamedTuple, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from s2s_jax.embedding import waiting_ids
from s2s_jax.embedding.id_keys import EMPTY, UniqueKeys, is_there, rank_among_equals, segment_of
from s2s_jax.embedding.id_map import NO_ROW, IdMap, bucket_pairs, find, saturated
from s2s_jax.embedding.tables import SLOTS

# New ids are placed an eighth of all ids at a time, since after a while few are new.
_CHUNKS = 8
_BIG = np.iinfo(np.int32).max

# A tree of arrays `[R, …]` with an entry for each row of a map, such as the table.
Attached = TypeVar("Attached")
# `(attached, rows_C, keys_C2) -> attached` writes the rows of new ids; row numbers from R on are not
# written.
MakeRows: TypeAlias = Callable[[Attached, jax.Array, jax.Array], Attached]


class Policy(NamedTuple):
    """The policy for new ids.

    Attributes:
      admit_after: sightings after which an id gets a row.
      evict: whether an id that finds no free slot takes the slot of the id not seen for longest.
    """

    admit_after: int
    evict: bool


class Claimed(NamedTuple, Generic[Attached]):
    """The result of `find_or_claim`.

    Attributes:
      id_map: the updated map.
      row_U: int32 row of each key, `NO_ROW` if it has none. If rows moved, it may be outdated.
      attached: the updated arrays, with new rows made by `make_rows`.
      moved: int32, number of rows that moved.
    """

    id_map: IdMap
    row_U: jax.Array
    attached: Attached
    moved: jax.Array


def find_or_claim(
    id_map: IdMap,
    unique: UniqueKeys,
    first_segment: jax.Array,
    step: jax.Array,
    policy: Policy,
    attached: Attached,
    make_rows: MakeRows[Attached],
) -> Claimed[Attached]:
    """Gives rows to keys that have none, according to `policy`, and records that all were seen.

    Keys of one segment are placed together, independently of other segments. So the result does not
    depend on the placement of segments on devices.

    Args:
      id_map: the map.
      unique: the keys.
      first_segment: int32 number of this device's first segment.
      step: int32, this step.
      policy: policy of admission and eviction.
      attached: arrays `[R, …]` in which rows of new ids are written.
      make_rows: writes the rows of new ids.
    """
    keys_U2 = unique.keys_U2
    there_U = is_there(keys_U2)
    row_U = find(id_map, keys_U2, first_segment)
    wanting_U = there_U & (row_U < 0)
    if policy.admit_after > 1:
        sighted = waiting_ids.record_sightings(
            id_map.sketch_SW,
            keys_U2,
            unique.count_U,
            wanting_U,
            segment_of(keys_U2) - first_segment,
        )
        wanting_U &= sighted.sightings_U >= policy.admit_after
    # Recorded before evictions, so that no id of this step is evicted.
    id_map = _record_seen(id_map, row_U, unique.count_U, step)
    id_map, row_U, attached, moved = _claim(
        id_map, unique, row_U, wanting_U, first_segment, step, policy.evict, attached, make_rows
    )
    if policy.admit_after > 1:
        words_SW = waiting_ids.forget(sighted.words_SW, sighted.at_U, wanting_U & (row_U >= 0))
        id_map = id_map._replace(sketch_SW=words_SW)
    lost_U = wanting_U & (row_U < 0)
    dropped_S = _count(id_map.dropped_S, segment_of(keys_U2) - first_segment, lost_U)
    return Claimed(id_map._replace(dropped_S=dropped_S), row_U, attached, moved)


def _count(number_S: jax.Array, segment_U: jax.Array, which_U: jax.Array) -> jax.Array:
    """Adds to each segment its number of marked keys."""
    at_U = jnp.where(which_U, segment_U, number_S.size)
    return saturated(number_S, number_S.at[at_U].add(1, mode="drop"))


def _record_seen(id_map: IdMap, row_U: jax.Array, count_U: jax.Array, step: jax.Array) -> IdMap:
    rows = id_map.seen_R.shape[0]
    index_U = jnp.where(row_U >= 0, row_U, rows + jnp.arange(row_U.size, dtype=jnp.int32))
    before_U = id_map.count_R.at[jnp.maximum(row_U, 0)].get(mode="promise_in_bounds")
    # Counts that have wrapped around, possibly in old checkpoints, are large.
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
    attached: Attached,
    make_rows: MakeRows[Attached],
) -> tuple[IdMap, jax.Array, Attached, jax.Array]:
    """Places the wanting keys, C at a time. A segment with at most C of them is never split."""
    size, rows = row_U.size, id_map.seen_R.shape[0]
    chunk = min(size, max(256, math.ceil(size / _CHUNKS)))
    wanting_U = wanting_U.astype(jnp.int32)
    total = wanting_U.sum()
    # The indices of the wanting keys, in order.
    rank_U = jnp.where(wanting_U > 0, jnp.cumsum(wanting_U) - 1, size + chunk)
    number_U = jnp.arange(size, dtype=jnp.int32)
    place_of = jnp.full(size + chunk, size, jnp.int32).at[rank_U].set(number_U, mode="drop")

    def one_chunk(state: tuple) -> tuple:
        begin, id_map, row_U, attached, moved = state
        place_C = jax.lax.dynamic_slice(place_of, (begin,), (chunk,))
        keys_C2 = unique.keys_U2.at[place_C].get(mode="fill", fill_value=EMPTY)
        after = unique.keys_U2.at[place_of[jnp.minimum(begin + chunk, size)]]
        following = after.get(mode="fill", fill_value=EMPTY)[None]
        # Keys of a segment that continues in the next chunk wait for it.
        segment_C, next_segment = segment_of(keys_C2), segment_of(following)[0]
        waits_C = (begin + chunk < total) & (segment_C == next_segment) & (segment_C[0] < segment_C)
        active_C = (place_C < size) & ~waits_C
        id_map, new_C, evicts_C = _place(id_map, keys_C2, active_C, first_segment, step, evict)
        if not evict:
            id_map, new_C, attached, of_chunk = _make_room(
                id_map, keys_C2, active_C & (new_C < 0), new_C, first_segment, step, attached
            )
            moved += of_chunk
        count_C = unique.count_U.at[place_C].get(mode="clip")
        placed_C = new_C >= 0
        index_C = jnp.where(placed_C, new_C, rows + jnp.arange(chunk, dtype=jnp.int32))
        segment_C -= first_segment
        id_map = id_map._replace(
            count_R=id_map.count_R.at[index_C].set(count_C, mode="drop", unique_indices=True),
            rows_S=_count(id_map.rows_S, segment_C, placed_C & ~evicts_C),
            evicted_S=_count(id_map.evicted_S, segment_C, evicts_C),
        )
        attached = make_rows(attached, index_C, keys_C2)
        row_U = row_U.at[jnp.where(placed_C, place_C, size)].set(new_C, mode="drop")
        taken = active_C.sum(dtype=jnp.int32)
        return begin + taken, id_map, row_U, attached, moved

    start = (jnp.zeros_like(total), id_map, row_U, attached, jnp.zeros_like(total))
    return jax.lax.while_loop(lambda state: state[0] < total, one_chunk, start)[1:]


def _place(
    id_map: IdMap,
    keys_C2: jax.Array,
    active_C: jax.Array,
    first_segment: jax.Array,
    step: jax.Array,
    evict: bool,
) -> tuple[IdMap, jax.Array, jax.Array]:
    """Finds slots in rounds: all keys choose a bucket, and keys in a bucket share its free slots.

    Returns the map, the row of each key (`NO_ROW` if it has none), and whether it evicted another id.
    """
    bucket_C2 = bucket_pairs(id_map, keys_C2, first_segment)
    chunk, rows = active_C.size, id_map.seen_R.shape[0]
    number_C = jnp.arange(chunk, dtype=jnp.int32)

    def one_round(state: tuple) -> tuple:
        pending_C, row_C, evicts_C, keys_R2, seen_R = state
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
        evicts_C |= placed_C & (score_CS[number_C, slot_C] >= 0)
        index_C = jnp.where(placed_C, at_C, rows + number_C)
        keys_R2 = keys_R2.at[index_C].set(keys_C2, mode="drop", unique_indices=True)
        seen_R = seen_R.at[index_C].set(step, mode="drop", unique_indices=True)
        row_C = jnp.where(placed_C, at_C, row_C)
        # Keys that found both buckets full give up.
        return pending_C & ~placed_C & (usable_C > 0), row_C, evicts_C, keys_R2, seen_R

    # Computed from values that vary over devices, because shard_map requires it here.
    nowhere_C, not_C = jnp.where(active_C, NO_ROW, NO_ROW), active_C & ~active_C
    start = (active_C, nowhere_C, not_C, id_map.keys_R2, id_map.seen_R)
    _, row_C, evicts_C, keys_R2, seen_R = jax.lax.while_loop(
        lambda state: state[0].any(), one_round, start
    )
    return id_map._replace(keys_R2=keys_R2, seen_R=seen_R), row_C, evicts_C


def _make_room(
    id_map: IdMap,
    keys_C2: jax.Array,
    failed_C: jax.Array,
    row_C: jax.Array,
    first_segment: jax.Array,
    step: jax.Array,
    attached: Attached,
) -> tuple[IdMap, jax.Array, Attached, jax.Array]:
    """For each key whose buckets are full, one after the other, moves a row to its other bucket.

    Returns the map, the row of each key, the arrays of the map, and the number of rows that moved.
    """

    def one_key(state: tuple) -> tuple:
        failed_C, row_C, keys_R2, seen_R, count_R, attached, moved = state
        number = jnp.argmax(failed_C)
        key_2 = keys_C2[number]
        bucket_2 = bucket_pairs(id_map, key_2[None], first_segment)[0]
        held_N2 = keys_R2.reshape(-1, SLOTS, 2)[bucket_2].reshape(-1, 2)
        pair_N2 = bucket_pairs(id_map, held_N2, first_segment)
        here_N = jnp.repeat(bucket_2, SLOTS)
        other_N = jnp.where(pair_N2[:, 0] == here_N, pair_N2[:, 1], pair_N2[:, 0])
        free_NS = (keys_R2.reshape(-1, SLOTS, 2)[other_N] == EMPTY).all(axis=-1)
        place = jnp.argmax(free_NS.sum(axis=-1))
        can = free_NS[place].any()
        to = other_N[place] * SLOTS + jnp.argmax(free_NS[place]).astype(jnp.int32)
        source = here_N[place] * SLOTS + place.astype(jnp.int32) % SLOTS

        def move(x_R: jax.Array) -> jax.Array:
            # A row moves to itself if none can move.
            return x_R.at[jnp.where(can, to, source)].set(x_R[source])

        keys_R2, seen_R, count_R, attached = jax.tree.map(
            move, (keys_R2, seen_R, count_R, attached)
        )
        keys_R2 = keys_R2.at[source].set(jnp.where(can, key_2, keys_R2[source]))
        seen_R = seen_R.at[source].set(jnp.where(can, step, seen_R[source]))
        # The key that moves may have just been placed.
        row_C = jnp.where(can & (row_C == source), to, row_C)
        row_C = row_C.at[number].set(jnp.where(can, source, NO_ROW))
        failed_C = failed_C.at[number].set(False)
        return failed_C, row_C, keys_R2, seen_R, count_R, attached, moved + can

    moved = jnp.zeros_like(failed_C.sum(dtype=jnp.int32))
    start = (failed_C, row_C, id_map.keys_R2, id_map.seen_R, id_map.count_R, attached, moved)
    _, row_C, keys_R2, seen_R, count_R, attached, moved = jax.lax.while_loop(
        lambda state: state[0].any(), one_key, start
    )
    id_map = id_map._replace(keys_R2=keys_R2, seen_R=seen_R, count_R=count_R)
    return id_map, row_C, attached, moved


def _slots_of(x_R: jax.Array, bucket_U2: jax.Array) -> jax.Array:
    """`[U, 2, SLOTS, …]`: the contents of the slots of some buckets."""
    by_bucket = x_R.reshape(-1, SLOTS, *x_R.shape[1:])
    return by_bucket.at[bucket_U2].get(mode="promise_in_bounds")
