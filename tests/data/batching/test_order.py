import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s2s_jax.data.batching import order as orders_module
from s2s_jax.data.batching.order import BlockKey, Order, permutation


@pytest.fixture(autouse=True, scope="module")
def _shards_of_few_stripes():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(orders_module, "STRIPES_PER_SHARD", 8)
        yield


MASK = 2**64 - 1
GOLDEN = 0x9E3779B97F4A7C15


def splitmix64(state: int) -> int:
    """The output of the generator for `state` (Vigna's splitmix64.c)."""
    z = state = (state + GOLDEN) & MASK
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & MASK
    z = (z ^ z >> 27) * 0x94D049BB133111EB & MASK
    return z ^ z >> 31


def expected_permutation(size: int, *key: int) -> list[int]:
    state = 0
    for part in key:
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


@given(st.integers(0, 300), st.lists(st.integers(-5, 2**64), min_size=1, max_size=5))
@settings(max_examples=60)
def test_permutations_are_frozen(size, key):
    found = permutation(size, *key).tolist()
    assert found == expected_permutation(size, *key)
    assert sorted(found) == list(range(size))


def test_seed_epoch_and_stream_all_count():
    orders = {
        tuple(permutation(50, seed, epoch, stream).tolist())
        for seed in range(4)
        for epoch in range(4)
        for stream in range(4)
    }
    assert len(orders) == 4**3


def make(stripe_rows, block_rows=64, shuffle=True, seed=0, shards=16) -> Order:
    return Order(stripe_rows, shards, block_rows, shuffle, seed)


def read(order: Order, epoch: int, begin: int, end: int, first=0, last=2**40) -> list:
    """(stripe, row in the stripe) of the requested rows of a batch, in the batch's order."""
    rows = []
    for key, start, stop in order.parts(epoch, begin, end, first, last):
        assert start < stop
        pieces, permuted = order.block(key)
        there = [(p.stripe, row) for p in pieces for row in range(p.start, p.stop)]
        assert len(permuted) == len(there)
        rows += [there[i] for i in permuted[start:stop]]
    return rows


def line(order: Order, epoch: int) -> list[tuple[int, int]]:
    """(stripe, row in the stripe) of all rows of an epoch, in order."""
    return [row for at in range(order.rows) for row in read(order, epoch, at, at + 1)]


STRIPES = st.lists(st.integers(1, 12), min_size=1, max_size=40)


@given(
    STRIPES,
    st.integers(1, 50),
    st.integers(1, 9),
    st.integers(0, 2**32),
    st.integers(0, 9),
    st.booleans(),
    st.data(),
)
@settings(max_examples=150)
def test_each_row_occurs_once_an_epoch_with_any_batch_size(
    stripe_rows, block_rows, shards, seed, epoch, shuffle, data
):
    order = make(stripe_rows, block_rows, shuffle, seed, shards)
    all_rows = [(s, row) for s, rows in enumerate(stripe_rows) for row in range(rows)]
    assert order.rows == len(all_rows)
    found = line(order, epoch)
    assert sorted(found) == all_rows
    if not shuffle:
        assert found == all_rows
    # Every batch has the rows of its part of the line; the parts of hosts follow each other.
    begin = data.draw(st.integers(0, len(all_rows)))
    end = data.draw(st.integers(begin, len(all_rows)))
    batch = read(order, epoch, begin, end)
    assert sorted(batch) == sorted(found[begin:end])
    cut = data.draw(st.integers(0, end - begin + 2))
    parts = read(order, epoch, begin, end, 0, cut) + read(order, epoch, begin, end, cut)
    assert parts == batch


@given(STRIPES, st.integers(1, 50), st.integers(1, 9), st.integers(0, 2**32))
@settings(max_examples=60)
def test_shuffle_blocks_follow_each_other(stripe_rows, block_rows, shards, seed):
    """`after` visits every shuffle block of a shard, and blocks end where stripes or shards end."""
    order = make(stripe_rows, block_rows, True, seed, shards)
    least = -(-block_rows // order.shards)
    sizes = []
    for shard in range(order.shards):
        key, rows = BlockKey(0, shard, 0), 0
        while key.epoch == 0:
            pieces, permuted = order.block(key)
            following = order.after(key)
            assert following.shard == shard
            if following.epoch == 0:
                assert len(permuted) >= least
                assert pieces[-1].stop == stripe_rows[pieces[-1].stripe]
            rows, key = rows + len(permuted), following
        assert key == BlockKey(1, shard, 0)
        sizes.append(rows)
    assert sum(sizes) == sum(stripe_rows)
    assert max(sizes) - min(sizes) <= 1


def test_shards_are_few_where_stripes_are():
    """A stripe at the border of two shards is read twice."""
    assert [make([5] * n).shards for n in (1, 15, 16, 127, 128, 1000)] == [1, 1, 2, 15, 16, 16]
    assert make([5] * 1000, shuffle=False).shards == 1


def test_a_batch_draws_from_all_shards_alike():
    order = make([10] * 64, block_rows=1, shards=4)
    for begin in (0, 7, 300):
        shards = [part.key.shard for part in order.parts(0, begin, begin + 8, 0, 8)]
        assert shards == sorted(shards)
        rows = dict.fromkeys(range(4), 0)
        for key, start, stop in order.parts(0, begin, begin + 8, 0, 8):
            rows[key.shard] += stop - start
        assert rows == dict.fromkeys(range(4), 2)
    # A host that reads the second half of each batch only needs the second half of the shards.
    assert {part.key.shard for part in order.parts(0, 8, 16, 4, 8)} == {2, 3}


def test_epochs_and_seeds_differ_and_repeat():
    stripe_rows = (40, 7, 100, 53)
    orders = {
        seed: [line(make(stripe_rows, seed=seed), epoch) for epoch in range(3)] for seed in (1, 2)
    }
    assert len({tuple(rows) for epochs in orders.values() for rows in epochs}) == 6
    assert [line(make(stripe_rows, seed=1), epoch) for epoch in range(3)] == orders[1]


def test_rows_move_between_shuffle_blocks_and_inside_them():
    order = make((64,) * 20, seed=3)
    first = {order.block(BlockKey(epoch, 0, 0)).pieces[0].stripe for epoch in range(10)}
    assert len(first) > 3
    blocks = [BlockKey(0, shard, 0) for shard in range(order.shards)]
    inside = {tuple(order.block(key).order.tolist()) for key in blocks}
    assert len(inside) == order.shards == 2
    # In a log of a single shuffle block, only the order inside the block changes.
    single = make((64,), seed=3)
    assert len({tuple(line(single, epoch)) for epoch in range(10)}) == 10


def test_a_shuffle_block_depends_on_nothing_but_its_key():
    order = make((30,) * 20, 32, seed=5)
    key = BlockKey(9, 1, 2)
    late = order.block(key)
    for epoch in range(20):
        order.block(BlockKey(epoch, 0, 1))
    for again in (order.block(key), make((30,) * 20, 32, seed=5).block(key)):
        assert late.pieces == again.pieces
        assert np.array_equal(late.order, again.order)
