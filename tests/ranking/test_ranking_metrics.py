"""Metrics of rankings, compared with loops over users, and with values worked out by hand."""

import numpy as np
import pytest

from s2s_jax.ranking import ranking_metrics


def test_values_against_loops():
    rng = np.random.default_rng(0)
    rank = rng.integers(0, 30, (200, 3))
    rank[rng.random(rank.shape) < 0.4] = -1
    rank[:, 0] = np.abs(rank[:, 0])
    values = ranking_metrics.user_values(rank, (5, 10))
    for u, row in enumerate(rank.tolist()):
        targets = [r for r in row if r >= 0]
        for k in (5, 10):
            hits = [r for r in targets if r < k]
            best = sum(1 / np.log2(p + 2) for p in range(min(k, len(targets))))
            assert values[f"hr@{k}"][u] == bool(hits)
            assert values[f"recall@{k}"][u] == len(hits) / len(targets)
            assert values[f"ndcg@{k}"][u] == pytest.approx(
                sum(1 / np.log2(r + 2) for r in hits) / best
            )
        assert values["mrr"][u] == pytest.approx(1 / (min(targets) + 1))
    # In the integer type of the devices.
    result = ranking_metrics.summarize(
        ranking_metrics.user_values(np.asarray([0, 9, 10, 300], np.int32))
    )
    assert result["eval/hr@10"] == result["eval/recall@10"] == 0.5
    assert result["eval/ndcg@10"] == pytest.approx((1 + 1 / np.log2(11)) / 4)
    assert result["eval/mrr"] == pytest.approx((1 + 1 / 10 + 1 / 11 + 1 / 301) / 4)
    assert result["eval/users"] == 4
    with pytest.raises(ValueError, match="one target"):
        ranking_metrics.user_values(np.asarray([[1, 2], [-1, -1]]))


def test_intervals(monkeypatch):
    rng = np.random.default_rng(0)
    values = ranking_metrics.user_values(rng.integers(0, 40, 400), (10,))
    found = ranking_metrics.intervals(values)
    for name, value in values.items():
        low, high = found[f"eval/{name}"]
        error = 1.96 * value.std() / np.sqrt(value.size)
        assert low == pytest.approx(value.mean() - error, abs=0.25 * error)
        assert high == pytest.approx(value.mean() + error, abs=0.25 * error)
    # Resamples do not depend on how many are held in memory at once.
    monkeypatch.setattr(ranking_metrics, "_DRAWS", 3 * 400)
    again = ranking_metrics.intervals(values)
    for name, pair in found.items():
        assert again[name] == pytest.approx(pair, rel=1e-12)


def test_slices():
    """Histories of one item are in the first slice."""
    rank = np.asarray([0, 100, 0, 100, 0, 0])
    values = ranking_metrics.user_values(rank, (10,))
    found = ranking_metrics.by_length(values, np.asarray([1, 5, 6, 200, 201, 10_000]))
    assert {n: v for n, v in found.items() if "hr@" in n} == {
        "eval/length_1-5/hr@10": 0.5,
        "eval/length_6-20/hr@10": 1.0,
        "eval/length_51-200/hr@10": 0.0,
        "eval/length_201+/hr@10": 1.0,
    }
    assert found["eval/length_1-5/users"] == 2
    # Item 2 has half of the events, items 0 and 3 have the next 40%.
    target = np.asarray([2, 0, 3, 1, 4, 99])
    found = ranking_metrics.by_popularity(values, target, np.asarray([25, 10, 50, 15, 0]))
    assert {n: v for n, v in found.items() if "users" in n} == {
        "eval/target_head/users": 1,
        "eval/target_middle/users": 2,
        "eval/target_tail/users": 3,
    }
    assert found["eval/target_middle/hr@10"] == 0.5


def test_coverage():
    coverage = ranking_metrics.Coverage(4)
    coverage.add(np.asarray([[0, 1, 2], [0, 1, -1]]))
    coverage.add(np.asarray([[1, -1, -1]]))
    assert coverage.summarize((1, 2, 3, 10)) == {
        "eval/coverage@1": 0.5,
        "eval/coverage@2": 0.5,
        "eval/coverage@3": 0.75,
        "eval/coverage@10": 0.75,
    }
