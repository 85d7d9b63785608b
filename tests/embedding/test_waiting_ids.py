"""Ids that wait for a row, compared with a dictionary, and streams of ids that occur once."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from s2s_jax.embedding import claiming, id_map, waiting_ids
from s2s_jax.embedding.id_keys import is_there, keys_of, segment_of, unique_keys
from s2s_jax.embedding.tables import NUM_SEGMENTS, SLOTS

ROWS = NUM_SEGMENTS * SLOTS


def keys(numbers):
    low, high = keys_of(numbers.astype(np.uint32), (numbers >> 32).astype(np.uint32))
    return jnp.stack([jnp.asarray(low), jnp.asarray(high)], axis=-1)


@jax.jit
def sight(words_SW, keys_M2):
    unique = unique_keys(keys_M2)
    there_U = is_there(unique.keys_U2)
    sighted = waiting_ids.record_sightings(
        words_SW, unique.keys_U2, unique.count_U, there_U, segment_of(unique.keys_U2)
    )
    return sighted, sighted.sightings_U[unique.place_M]


def test_sightings_are_counted_as_a_dictionary_does():
    rng = np.random.default_rng(0)
    words_SW, counts = waiting_ids.empty(ROWS, 2), {}
    for _ in range(30):
        batch = rng.integers(0, 2**40, 40) % 700 * 0x9E3779B97F
        sighted, found = sight(words_SW, keys(batch))
        words_SW = sighted.words_SW
        for number in batch.tolist():
            counts[number] = counts[number] + 1 if number in counts else 1
        assert found.tolist() == [counts[number] for number in batch.tolist()]


def test_sightings_stop_at_the_largest_count():
    words_SW = waiting_ids.empty(ROWS, 2)
    for _ in range(3):
        sighted, found = sight(words_SW, keys(np.full(800, 7)))
        words_SW = sighted.words_SW
    assert (found >= waiting_ids.MOST_SIGHTINGS).all()
    others, _ = sight(words_SW, keys(np.arange(100)))
    assert int(sight(others.words_SW, keys(np.array([7])))[1][0]) > waiting_ids.MOST_SIGHTINGS


def test_what_has_a_row_is_forgotten():
    numbers = np.arange(50)
    sighted, _ = sight(waiting_ids.empty(ROWS, 2), keys(numbers))
    gone = np.asarray(sighted.at_U)[:50] % 2 == 0
    which_U = jnp.zeros(sighted.at_U.shape, bool).at[:50].set(gone)
    words_SW = waiting_ids.forget(sighted.words_SW, sighted.at_U, which_U)
    unique = unique_keys(keys(numbers))
    _, found = sight(words_SW, keys(numbers))
    place = np.asarray(unique.place_M)
    assert found.tolist() == [1 if gone[at] else 2 for at in place]


def test_sightings_survive_growth():
    numbers = np.arange(500)
    sighted, _ = sight(waiting_ids.empty(ROWS, 2), keys(numbers))
    _, found = sight(waiting_ids.doubled(sighted.words_SW), keys(numbers))
    assert (found == 2).all()
    assert waiting_ids.doubled(waiting_ids.empty(ROWS, 1)).shape == (NUM_SEGMENTS, 1)


def stream(rows, total, batch, again_after=None):
    """The share of new ids that are mistaken for known ones, and of repeated ids that are forgotten.

    Each id occurs in one batch or, if `again_after` is given, once more after this many batches.
    """

    @functools.partial(jax.jit, donate_argnums=0)
    def some(words_SW, begin):
        def one(carry, number):
            words_SW, known, forgotten = carry
            first = jnp.uint32(batch) * number + jnp.arange(batch, dtype=jnp.uint32)
            fresh = _sight(words_SW, first)
            words_SW, known = fresh.words_SW, known + (fresh.sightings_U > 1).sum()
            if again_after is not None:
                again = _sight(words_SW, first - jnp.uint32(batch * again_after))
                counts = number >= again_after
                forgotten += jnp.where(counts, (again.sightings_U < 2).sum(), 0)
                words_SW = again.words_SW
            return (words_SW, known, forgotten), None

        zero = jnp.zeros((), jnp.int32)
        numbers = begin + jnp.arange(min(steps, 64), dtype=jnp.uint32)
        return jax.lax.scan(one, (words_SW, zero, zero), numbers)[0]

    def _sight(words_SW, low):
        first, second = keys_of(low, jnp.full_like(low, 9))
        unique = unique_keys(jnp.stack([first, second], axis=-1))
        every = jnp.ones(batch, bool)
        return waiting_ids.record_sightings(
            words_SW, unique.keys_U2, unique.count_U, every, segment_of(unique.keys_U2)
        )

    steps = total // batch
    words_SW, known, forgotten = waiting_ids.empty(rows, 2), 0, 0
    for begin in range(0, steps, 64):
        words_SW, k, f = some(words_SW, jnp.uint32(begin))
        known, forgotten = known + int(k), forgotten + int(f)
    return known / total, forgotten / total


def test_few_of_the_ids_that_come_once_are_taken_for_known():
    """Sixty times the capacity: a count-min sketch of this size would mistake nearly all for known."""
    known, _ = stream(ROWS, 64 * ROWS, 1024)
    assert known <= 15 / 2**22 * 4


@pytest.mark.slow
def test_few_are_taken_for_known_after_hundreds_of_millions():
    known, _ = stream(2**16, 2**28, 2**15)
    assert known <= 15 / 2**22 * 1.2


@pytest.mark.parametrize("capacities", [1, 2, 3])
def test_how_many_are_forgotten_until_they_come_again(capacities):
    """Each batch of repeated ids moves them to the front, like new ones."""
    batch = ROWS // 16
    _, forgotten = stream(ROWS, 48 * ROWS, batch, again_after=8 * capacities)
    mean = 4 * capacities
    expected = 1 - sum(math.exp(-mean) * mean**k / math.factorial(k) for k in range(15))
    assert abs(forgotten - expected) < 0.35 * expected + 1e-4


def test_rows_seen_often_stay_often():
    """Sightings of a row do not wrap around: a row seen 2^31 times does not become rare."""
    of_table = id_map.empty_map(ROWS, 1)
    unique = unique_keys(keys(np.array([5, 5, 6, 6])))
    policy = claiming.Policy(1, False)

    @jax.jit
    def admit(of_table, step):
        return claiming.find_or_claim(
            of_table, unique, jnp.int32(0), step, policy, (), lambda attached, *_: attached
        )

    claimed = admit(of_table, jnp.int32(1))
    rows = np.asarray(claimed.row_U)[:2]
    counts = claimed.id_map.count_R.at[rows].set(jnp.array([2**31 - 2, -5], jnp.int32))
    claimed = admit(claimed.id_map._replace(count_R=counts), jnp.int32(2))
    assert np.asarray(claimed.id_map.count_R)[rows].tolist() == [2**31 - 1] * 2
    left = id_map.evicted(claimed.id_map, jnp.int32(9), None, 1000)
    assert int(left.rows_S.sum()) == 2
