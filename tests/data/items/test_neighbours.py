"""Counted neighbours against an independent count, pair by pair."""

import dataclasses
from collections import Counter
from fractions import Fraction
from itertools import chain

import numpy as np
import of_config
import pyarrow as pa
import pytest
import small
from hypothesis import given, settings
from hypothesis import strategies as st
from logs import write_log
from pyarrow import orc

from s2s_jax.config import ByTime, FeatureConfig, IOConfig, LastEvents
from s2s_jax.config.settings import Items, Logs
from s2s_jax.data.items import neighbours
from s2s_jax.data.items import seen as seen_items
from s2s_jax.data.items.neighbours import NeighbourCounts, Neighbours, Scorer, count_neighbours

ITEMS = 7
ROWS = st.lists(st.lists(st.integers(-1, ITEMS - 1), max_size=9), min_size=1, max_size=6)


def counted(rows, items=ITEMS, **how):
    counts = NeighbourCounts(items, **how)
    for row in rows:
        counts.add(np.array(row, np.int32), np.array([len(row)]))
    return counts.matrix()


def by_hand(rows):
    weights = Counter()
    for row in rows:
        for place, item in enumerate(row):
            for distance in (1, 2, 3):
                if place >= distance and item >= 0 and row[place - distance] >= 0:
                    weights[row[place - distance], item] += Fraction(1, distance)
    return weights


def scores_by_hand(weights, row):
    scores = Counter()
    for number, item in enumerate(row[::-1][:5], 1):
        for (first, second), weight in weights.items():
            if item == first:
                scores[second] += weight / number
    return scores


@given(ROWS)
def test_counts_against_a_count_by_hand(rows):
    expected = np.zeros((ITEMS, ITEMS))
    for (first, second), weight in by_hand(rows).items():
        expected[first, second] = weight
    np.testing.assert_allclose(counted(rows).toarray(), expected, rtol=1e-15)
    together = NeighbourCounts(ITEMS)
    together.add(np.array(list(chain(*rows)), np.int32), np.array([len(row) for row in rows]))
    assert (together.matrix() != counted(rows)).nnz == 0


@settings(max_examples=100)
@given(ROWS, ROWS, st.booleans(), st.sets(st.integers(0, ITEMS - 1), max_size=3))
def test_ranks_and_lists_against_sorting_all_items(rows, histories, filter_seen, left_out):
    weights = by_hand(rows)
    count_I = np.bincount(
        [item for row in rows for item in row if item >= 0], minlength=ITEMS
    ).astype(np.int64)
    count_I[list(left_out)] = -1
    scorer, model = Scorer(counted(rows)), Neighbours(count_I)
    events_U = np.array([len(row) for row in histories])
    item_P = np.array(list(chain(*histories)), np.int32)
    pairs = seen_items.distinct(np.repeat(np.arange(len(histories)), events_U), item_P)
    seen = pairs if filter_seen else None
    scores = model.allowed(scorer.score(item_P, events_U), seen)
    best_UK, score_UK = model.top_k(scores, len(histories), ITEMS, seen)
    for user, row in enumerate(histories):
        exact = scores_by_hand(weights, row)
        allowed = [i for i in range(ITEMS) if i not in left_out]
        allowed = [i for i in allowed if not (filter_seen and i in row)]
        expected = sorted(allowed, key=lambda i: (-exact[i], -count_I[i], i))
        assert best_UK[user].tolist() == expected + [-1] * (ITEMS - len(expected))
        of_items = [float(exact[i]) for i in expected]
        np.testing.assert_allclose(score_UK[user, : len(expected)], of_items, rtol=1e-6)
        assert (score_UK[user, len(expected) :] == -np.inf).all()
        for target in allowed:
            others = [i for i in allowed if i != target]
            key = (exact[target], count_I[target])
            rank = sum((exact[i], count_I[i]) >= key for i in others)
            popularity = sum(count_I[i] >= count_I[target] for i in others)
            target_U = np.full(len(histories), target)
            found = model.ranks(scores, target_U, np.full(len(histories), popularity))
            assert found[user] == rank


def test_memory_is_bounded_and_the_heaviest_stay():
    rng = np.random.default_rng(0)
    items, most = 400, 2_000
    # Every item has one true successor among random ones.
    rows = []
    for _ in range(600):
        row = [int(rng.integers(items))]
        while len(row) < 30:
            follows = rng.random() < 0.7
            row.append((row[-1] + 1) % items if follows else int(rng.integers(items)))
        rows.append(row)
    matrix = counted(rows, items, most=most)
    assert matrix.nnz <= most
    assert counted(rows, items).nnz > 4 * most
    heaviest = np.asarray(matrix.argmax(axis=1)).ravel()
    assert (heaviest == (np.arange(items) + 1) % items).mean() > 0.99


@given(ROWS, ROWS, st.integers(1, 20))
def test_slices_have_few_scores_and_change_none(rows, histories, most):
    scorer = Scorer(counted(rows))
    events_U = np.array([len(row) for row in histories])
    item_P = np.array(list(chain(*histories)), np.int32)
    whole = scorer.score(item_P, events_U)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(neighbours, "MOST_SCORES", most)
        slices = list(scorer.slices(item_P, events_U))
    assert list(chain(*(range(of.start, of.stop) for of in slices))) == list(range(len(histories)))
    begins_U = np.concatenate([[0], np.cumsum(events_U)])
    parts = [
        scorer.score(item_P[begins_U[of.start] : begins_U[of.stop]], events_U[of]) for of in slices
    ]
    for of, part in zip(slices, parts, strict=True):
        assert len(part.score_S) <= most or of.stop - of.start == 1
    pairs = zip(slices, parts, strict=True)
    user_S = np.concatenate([of.start + part.user_S for of, part in pairs])
    np.testing.assert_array_equal(user_S, whole.user_S)
    for name in ("item_S", "score_S"):
        joined = np.concatenate([getattr(part, name) for part in parts])
        np.testing.assert_array_equal(joined, getattr(whole, name))


@pytest.mark.parametrize("rows", [[[]], [[3]], [[-1, -1, -1, -1]]])
def test_nothing_to_count(rows):
    assert counted(rows).nnz == 0


AT = 500


@pytest.fixture(scope="module")
def timed(tmp_path_factory):
    """A log with times below 1,000, some events without an item, and its rows."""
    directory = tmp_path_factory.mktemp("timed")
    small.write_log(directory, 60)
    rng = np.random.default_rng(2)
    rows = []
    for path in sorted(directory.glob("*.orc")):
        mine = orc.read_table(str(path)).to_pylist()
        for row in mine:
            row["timestamp"] = [
                [int(t)] for t in np.sort(rng.integers(1000, size=len(row["item_id"])))
            ]
            for place in np.flatnonzero(rng.random(len(row["item_id"])) < 0.1):
                row["item_id"][place] = []
        write_log(path, mine, dict.fromkeys(mine[0], pa.list_(pa.list_(pa.int64()))))
        rows += mine
    return directory, rows


@pytest.mark.parametrize("threads", [0, 2])
@pytest.mark.parametrize("grows", [False, True])
@pytest.mark.parametrize("split", [LastEvents(events=2), ByTime(at=str(AT), feature="timestamp")])
def test_counts_of_a_log_are_of_the_events_that_training_sees(timed, split, grows, threads):
    directory, rows = timed
    config = small.config()
    time = FeatureConfig(name="timestamp", emb_dim=4, hash_bucket_size=50)
    config = dataclasses.replace(
        config,
        io=IOConfig(data_paths=str(directory), thread_num=threads),
        features=(*config.features, time),
        eval=dataclasses.replace(config.eval, split=split),
    )
    config = small.growing(config) if grows else config
    catalogue = of_config.collect(config)
    items = catalogue.item.to_pylist()
    index, cut = of_config.index(config), of_config.training_cut(config)
    numbers = of_config.numbers(catalogue, config)
    found = count_neighbours(
        Items.of(config), Logs.of(config), index, cut, numbers, len(items)
    ).toarray()
    expected = np.zeros_like(found)
    seen_by_training = []
    for row in rows:
        bags = row["item_id"][:-2]
        if isinstance(split, ByTime):
            late = [time >= AT for (time,) in row["timestamp"]]
            bags = row["item_id"][: late.index(True) if True in late else None]
        seen_by_training.append([items.index(bag[0]) if bag else -1 for bag in bags])
    for (first, second), weight in by_hand(seen_by_training).items():
        expected[first, second] = weight
    np.testing.assert_allclose(found, expected, rtol=1e-15)
    assert found.any()
