"""Ranking in blocks, compared with NumPy: ties, seen items, any block, batch and number of devices."""

import itertools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s2s_jax.cluster.mesh import make_mesh
from s2s_jax.data.items.seen import of_rows
from s2s_jax.ranking import ranking_metrics
from s2s_jax.ranking import ranks as ranks_module
from s2s_jax.ranking import scores as scores_module
from s2s_jax.ranking import top_k as top_k_module
from s2s_jax.ranking.baselines import popularity_ranks
from s2s_jax.ranking.ranked_items import Bias, put_items
from s2s_jax.ranking.ranks import ranks, ranks_by_weight
from s2s_jax.ranking.top_k import top_k, top_k_by_weight

SEEN = 6


def mesh_of(devices):
    return make_mesh(jax.devices()[:devices])


def bias_of(bias):
    """The pairs whose bias is not 0."""
    user, item = np.nonzero(bias)
    return Bias(user.astype(np.int32), item.astype(np.int32), bias[None, user, item])


def expected_top_k(users, vectors, k, seen, bias):
    """The expected result; all values are whole numbers, so that sums are exact in any order."""
    index = np.full((len(users), k), -1)
    score = np.full((len(users), k), -np.inf, np.float32)
    for u, user in enumerate(users):
        left = [i for i in range(len(vectors)) if i not in seen[u]]
        scores = (vectors[left] @ user).astype(np.float32) if left else np.zeros(0)
        scores = scores + bias[u, left]
        order = np.argsort(-scores, kind="stable")[:k]
        index[u, : len(order)] = np.asarray(left, int)[order]
        score[u, : len(order)] = scores[order]
    return index, score


def expected_ranks(users, target, vectors, seen, bias=None):
    found = []
    for u, user in enumerate(users):
        scores = vectors @ user + (0 if bias is None else bias[u])
        others = [i for i in range(len(vectors)) if i != target[u] and i not in seen[u] and i >= 0]
        found.append(sum(scores[i] >= scores[target[u]] for i in others))
    return np.asarray(found)


@pytest.fixture
def _small_sizes(monkeypatch):
    """Makes tiles, chunks and groups small, so that there are many of them."""
    monkeypatch.setattr(scores_module, "USERS", 4)
    monkeypatch.setattr(scores_module, "TILE", 16)
    monkeypatch.setattr(top_k_module, "_CHUNK", 4)
    monkeypatch.setattr(top_k_module, "_FEW_CHUNKS", (1, 2))
    monkeypatch.setattr(ranks_module, "_LANES", 4)
    top_k_module._top_k.clear_cache()
    ranks_module._ranks.clear_cache()
    yield
    top_k_module._top_k.clear_cache()
    ranks_module._ranks.clear_cache()


@st.composite
def problems(draw):
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    # Only two sizes after padding, so that little is compiled.
    items = draw(st.integers(1, 16) | st.integers(81, 96))
    users = draw(st.integers(1, 4))
    spread = draw(st.sampled_from([0, 1, 5]))
    vectors = rng.integers(-spread, spread, (items, 3), endpoint=True).astype(np.float32)
    queries = rng.integers(-spread, spread, (users, 3), endpoint=True).astype(np.float32)
    seen = rng.integers(-1, items, (users, SEEN)).astype(np.int32)
    bias = rng.integers(-3, 4, (users, items)) * (rng.random((users, items)) < 0.3)
    target = rng.integers(0, items, users).astype(np.int32)
    return queries, target, vectors, seen, bias.astype(np.float32)


@pytest.mark.usefixtures("_small_sizes")
@pytest.mark.parametrize(
    ("devices", "k", "block"), [pytest.param(1, 3, 32, marks=pytest.mark.slow), (4, 100, 16)]
)
def test_any_problem(devices, k, block):
    mesh = mesh_of(devices)

    @settings(max_examples=60, database=None)
    @given(problems())
    def check(problem):
        users, target, vectors, seen, bias = problem
        catalogue = put_items(vectors, mesh, block)
        for of_pairs in (None, bias_of(bias)):
            added = np.zeros_like(bias) if of_pairs is None else bias
            best = top_k(users, catalogue, k, of_rows(seen), of_pairs)
            index, score = expected_top_k(users, vectors, k, seen, added)
            np.testing.assert_array_equal(best.index_BK, index)
            np.testing.assert_array_equal(best.score_BK, score)
            found = ranks(users, target, catalogue, of_rows(seen), of_pairs)
            expected = expected_ranks(users, target, vectors, seen, added)
            np.testing.assert_array_equal(found, expected)

    check()


def test_bits_do_not_depend_on_devices_blocks_and_batches():
    """Realistic sizes and values that get rounded; a third of the items have the same vector."""
    rng = np.random.default_rng(0)
    items, width, users = 9_001, 50, 70
    vectors = rng.normal(size=(items, width)).astype(np.float32)
    same = rng.permutation(items)[: items // 3]
    vectors[same] = vectors[same[0]]
    queries = rng.normal(size=(users, width)).astype(np.float32)
    seen = rng.integers(-1, items, (users, SEEN)).astype(np.int32)
    target = rng.integers(0, items, users).astype(np.int32)
    target[:30] = same[:30]
    # The same bias for all items with the same vector, so that they still tie.
    bias = np.where(rng.random((users, items)) < 0.1, rng.normal(size=(users, items)), 0)
    bias[:, same] = 0.25
    of_pairs = bias_of(bias.astype(np.float32))
    results = []
    for devices, block in [(1, 2**14), (2, 2048), (8, 1)]:
        catalogue = put_items(vectors, mesh_of(devices), block)
        best = top_k(queries, catalogue, 10, of_rows(seen), of_pairs)
        rank = ranks(queries, target, catalogue, of_rows(seen), of_pairs)
        results.append((*best, rank))
    for result, (found, first) in itertools.product(
        results, enumerate(map(np.asarray, results[0]))
    ):
        np.testing.assert_array_equal(result[found], first)
    # The same users at other places in smaller batches.
    some = np.asarray([69, 3, 20])
    of_some = bias_of(bias[some].astype(np.float32))
    best = top_k(queries[some], catalogue, 10, of_rows(seen[some]), of_some)
    rank = ranks(queries[some], target[some], catalogue, of_rows(seen[some]), of_some)
    for found, first in zip((*best, rank), results[0], strict=True):
        np.testing.assert_array_equal(found, np.asarray(first)[some])
    # Items with the same vector tie, wherever they are: a target among them ranks below all the others.
    seen_of_them = np.isin(seen, same) & (seen != target[:, None])
    others = [len(same) - 1 - len(set(s[m])) for s, m in zip(seen, seen_of_them, strict=True)]
    assert (np.asarray(results[0][2])[:30] >= np.asarray(others)[:30]).all()
    close = queries @ vectors.T + bias
    clearly_better = (close > np.take_along_axis(close, target[:, None], 1) + 1e-4).sum(axis=1)
    assert (np.asarray(results[0][2])[:30] - clearly_better[:30] < len(same)).all()


def test_edges():
    vectors = np.asarray([[1.0], [0.0], [-1.0]], np.float32)
    catalogue = put_items(jax.numpy.asarray(vectors), mesh_of(1))
    users = np.asarray([[1.0], [-1.0]], np.float32)
    all_seen = np.asarray([[0, 1, 2, 2], [2, -1, -1, -1]], np.int32)
    best = top_k(users, catalogue, 5, of_rows(all_seen))
    np.testing.assert_array_equal(best.index_BK, [[-1] * 5, [1, 0, -1, -1, -1]])
    np.testing.assert_array_equal(best.score_BK[0], [-np.inf] * 5)
    # The target is ranked although it was seen; a target outside the catalogue ranks last.
    np.testing.assert_array_equal(
        ranks(users, np.asarray([2, 7]), catalogue, of_rows(all_seen)), [0, 3]
    )
    # A NaN score is not a hit.
    nan = np.full((1, 1), np.nan, np.float32)
    np.testing.assert_array_equal(ranks(nan, np.asarray([1]), catalogue), [2])
    # -0 and 0 are equal, so the lower index comes first.
    zeros = put_items(np.asarray([[0.0], [-0.0], [0.0]], np.float32), mesh_of(1))
    np.testing.assert_array_equal(top_k(users, zeros, 5).index_BK[:, :3], [[0, 1, 2]] * 2)
    with pytest.raises(ValueError, match="width 1"):
        top_k(np.zeros((2, 3), np.float32), catalogue, 1)
    with pytest.raises(ValueError, match="at least 1"):
        top_k(users, catalogue, 0)
    with pytest.raises(ValueError, match="1 to about"):
        put_items(vectors[:0], mesh_of(1))


@settings(max_examples=100, database=None)
@given(problems())
def test_popularity_baseline(problem):
    _, target, vectors, seen, _ = problem
    counts = np.abs(vectors[:, :1]).astype(int)
    expected = expected_ranks(np.ones((len(target), 1), int), target, counts, seen)
    np.testing.assert_array_equal(popularity_ranks(counts[:, 0], target, of_rows(seen)), expected)
    unseen = np.full_like(seen, -1)
    np.testing.assert_array_equal(
        popularity_ranks(counts[:, 0], target),
        popularity_ranks(counts[:, 0], target, of_rows(unseen)),
    )
    gone = np.full(len(target), len(counts))
    assert (popularity_ranks(counts[:, 0], gone, of_rows(seen)) == len(counts)).all()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_public_evaluator_agrees():
    """The evaluator sorts its own lists, so scores here are distinct."""
    ranx = pytest.importorskip("ranx")
    rng = np.random.default_rng(0)
    items, users = 300, 150
    vectors = rng.normal(size=(items, 8)).astype(np.float32)
    queries = rng.normal(size=(users, 8)).astype(np.float32)
    target = rng.integers(0, items, users).astype(np.int32)
    seen = rng.integers(0, items, (users, SEEN)).astype(np.int32)
    seen[seen == target[:, None]] = -1
    catalogue = put_items(vectors, mesh_of(2))
    found = ranking_metrics.summarize(
        ranking_metrics.user_values(np.asarray(ranks(queries, target, catalogue, of_rows(seen))))
    )
    best = top_k(queries, catalogue, items, of_rows(seen))
    run = {
        str(u): {str(i): float(s) for i, s in zip(index, score, strict=True) if i >= 0}
        for u, (index, score) in enumerate(zip(*map(np.asarray, best), strict=True))
    }
    relevant = {str(u): {str(item): 1} for u, item in enumerate(target)}
    names = {"mrr": "mrr"}
    for k in ranking_metrics.CUTOFFS:
        names |= {
            f"hit_rate@{k}": f"hr@{k}",
            f"ndcg@{k}": f"ndcg@{k}",
            f"recall@{k}": f"recall@{k}",
        }
    expected = ranx.evaluate(ranx.Qrels(relevant), ranx.Run(run), list(names))
    for name, ours in names.items():
        assert found[f"eval/{ours}"] == pytest.approx(expected[name], rel=1e-6)


@pytest.mark.usefixtures("_small_sizes")
def test_several_weights_against_sorting_on_any_number_of_devices():
    rng = np.random.default_rng(0)
    users, items, k = 9, 70, 12
    queries = rng.integers(-2, 3, (users, 3)).astype(np.float32)
    vectors = rng.integers(-2, 3, (items, 3)).astype(np.float32)
    seen = rng.integers(-1, items, (users, SEEN))
    target = rng.integers(0, items, users)
    counts = rng.integers(1, 4, (users, items)) * (rng.random((users, items)) < 0.3)
    # Whole numbers, so that many scores tie. The first weight is no bias at all.
    weights = np.array([0, 1, 3])
    user, item = np.nonzero(counts)
    bias_WS = (weights[:, None] * counts[user, item]).astype(np.float32)
    bias = Bias(user.astype(np.int32), item.astype(np.int32), bias_WS)
    for devices in (1, 2, 4, 8):
        catalogue = put_items(vectors, mesh_of(devices), block_items=16)
        found = ranks_by_weight(queries, target, catalogue, of_rows(seen), bias)
        best = top_k_by_weight(queries, catalogue, k, of_rows(seen), bias)
        assert len(found) == len(best) == len(weights)
        for weight, rank, of_weight in zip(weights, found, best, strict=True):
            expected = expected_ranks(queries, target, vectors, seen, weight * counts)
            np.testing.assert_array_equal(rank, expected)
            index, score = expected_top_k(queries, vectors, k, seen, weight * counts)
            np.testing.assert_array_equal(of_weight.index_BK, index)
            np.testing.assert_array_equal(of_weight.score_BK, score)
