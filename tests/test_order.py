import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s2s_jax.data.order import Order, permutation

MASK = 2**64 - 1
GOLDEN = 0x9E3779B97F4A7C15


def splitmix64(state: int) -> int:
    """The output of the generator in `state` (Vigna's splitmix64.c)."""
    z = state = (state + GOLDEN) & MASK
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & MASK
    z = (z ^ z >> 27) * 0x94D049BB133111EB & MASK
    return z ^ z >> 31


def expected_permutation(size: int, seed: int, epoch: int, stream: int) -> list[int]:
    state = 0
    for part in (seed, epoch, stream):
        state = splitmix64(state ^ part % 2**64)
    keys = [splitmix64((state + i * GOLDEN) & MASK) for i in range(1, size + 1)]
    return sorted(range(size), key=lambda i: keys[i])


def test_the_reference_is_splitmix64():
    # The first outputs for the state 1234567, as published with the algorithm's test vectors.
    state, outputs = 1234567, []
    for _ in range(5):
        outputs.append(splitmix64(state))
        state = (state + GOLDEN) & MASK
    assert outputs == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]


@given(st.integers(0, 300), st.integers(-5, 2**64), st.integers(0, 2**40), st.integers(0, 2**40))
@settings(deadline=None, max_examples=60)
def test_permutations_are_frozen(size, seed, epoch, stream):
    found = permutation(size, seed, epoch, stream).tolist()
    assert found == expected_permutation(size, seed, epoch, stream)
    assert sorted(found) == list(range(size))


def test_seed_epoch_and_stream_all_count():
    orders = {
        tuple(permutation(50, seed, epoch, stream).tolist())
        for seed in range(4)
        for epoch in range(4)
        for stream in range(4)
    }
    assert len(orders) == 4**3


def line(order: Order, epoch: int) -> list[tuple[int, int]]:
    """(stripe, row in it) of all rows of an epoch in order, checking each window's size."""
    rows = []
    windows = -(-order.rows // order.window_rows)
    for number in range(windows):
        pieces, permuted = order.window(epoch, number)
        there = [(p.stripe, row) for p in pieces for row in range(p.start, p.stop)]
        last = number == windows - 1
        expected = order.rows - number * order.window_rows if last else order.window_rows
        assert len(there) == len(permuted) == expected
        assert all(p.start < p.stop for p in pieces)
        rows += [there[i] for i in permuted]
    return rows


STRIPES = st.lists(st.integers(0, 30), min_size=1, max_size=12).filter(any)


@given(STRIPES, st.integers(1, 50), st.integers(0, 2**32), st.integers(0, 9), st.booleans())
@settings(deadline=None, max_examples=150)
def test_each_row_once_an_epoch(stripe_rows, window_rows, seed, epoch, shuffle):
    order = Order(tuple(stripe_rows), window_rows, shuffle, seed)
    all_rows = [(s, row) for s, rows in enumerate(stripe_rows) for row in range(rows)]
    assert order.rows == len(all_rows)
    found = line(order, epoch)
    if not shuffle:
        assert found == all_rows
    assert sorted(found) == all_rows


def test_epochs_and_seeds_differ_and_repeat():
    stripe_rows = (40, 7, 100, 53)
    orders = {
        seed: [line(Order(stripe_rows, 64, True, seed), epoch) for epoch in range(3)]
        for seed in (1, 2)
    }
    assert len({tuple(rows) for epochs in orders.values() for rows in epochs}) == 6
    assert [line(Order(stripe_rows, 64, True, 1), epoch) for epoch in range(3)] == orders[1]


def test_rows_move_between_windows_and_inside_them():
    stripe_rows = (64,) * 20
    order = Order(stripe_rows, 64, True, 3)
    first = {order.window(epoch, 0).pieces[0].stripe for epoch in range(10)}
    assert len(first) > 3
    inside = {tuple(order.window(0, number).order.tolist()) for number in range(20)}
    assert len(inside) == 20
    # A log of a single window has nothing but the order inside it.
    single = Order((64,), 64, True, 3)
    assert len({tuple(line(single, epoch)) for epoch in range(10)}) == 10


@pytest.mark.parametrize("window_rows", [1, 9, 10, 11, 19, 20, 21, 100])
def test_windows_that_end_at_and_beside_stripe_boundaries(window_rows):
    order = Order((10, 0, 10, 5), window_rows, False, 0)
    assert line(order, 0) == [(s, r) for s, n in enumerate((10, 0, 10, 5)) for r in range(n)]


def test_a_window_depends_on_nothing_but_its_numbers():
    order = Order((30, 40, 50), 32, True, 5)
    late = order.window(4, 2)
    for epoch in range(4):
        order.window(epoch, 1)
    again = Order((30, 40, 50), 32, True, 5).window(4, 2)
    assert late.pieces == again.pieces
    assert np.array_equal(late.order, again.order)
