"""Metrics against ranx (Bassani, "ranx: a blazing-fast Python library for ranking evaluation", 2022)."""

import jax
import numpy as np
import pytest

from s2s_jax.cluster.mesh import make_mesh
from s2s_jax.data.items.seen import of_rows
from s2s_jax.ranking import ranking_metrics
from s2s_jax.ranking.ranked_items import put_items
from s2s_jax.ranking.ranks import ranks

# Numba warns about its own casts.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:unsafe cast")]
USERS, ITEMS, SEEN = 60, 500, 12


@pytest.fixture(scope="module")
def ranx():
    return pytest.importorskip("ranx", reason="needs pip install -e '.[reference]'")


def evaluate(ranx, targets, scores):
    """Mean metrics, by our names; `targets` and `scores` have the items of each user."""
    qrels = ranx.Qrels({str(u): {str(i): 1 for i in items} for u, items in enumerate(targets)})
    run = ranx.Run(
        {str(u): {str(i): float(x) for i, x in of.items()} for u, of in enumerate(scores)}
    )
    theirs = {"hr": "hit_rate", "recall": "recall", "ndcg": "ndcg"}
    names = {f"{m}@{k}": f"{theirs[m]}@{k}" for m in theirs for k in (5, 10, 50, 100)}
    names["mrr"] = "mrr"
    found = ranx.evaluate(qrels, run, list(names.values()))
    return {name: found[other] for name, other in names.items()}


def test_one_target_of_each_user_among_all_unseen_items(ranx):
    rng = np.random.default_rng(0)
    users_UE = rng.normal(size=(USERS, 16)).astype(np.float32)
    items_IE = rng.normal(size=(ITEMS, 16)).astype(np.float32)
    shuffled = np.argsort(rng.random((USERS, ITEMS)), axis=1).astype(np.int32)
    target_U, seen_US = shuffled[:, 0], shuffled[:, 1 : 1 + SEEN]
    # Better than chance, so that short lists also have hits.
    users_UE += 0.3 * items_IE[target_U]
    items = put_items(items_IE, make_mesh(jax.devices()[:2]))
    rank_U = np.asarray(ranks(users_UE, target_U, items, of_rows(seen_US)))
    ours = ranking_metrics.summarize(ranking_metrics.user_values(rank_U), prefix="")
    score_UI = users_UE @ items_IE.T
    scores = [
        {i: x for i, x in enumerate(score_UI[u]) if i not in seen_US[u]} for u in range(USERS)
    ]
    for name, value in evaluate(ranx, target_U[:, None].tolist(), scores).items():
        assert ours[name] == pytest.approx(value, abs=1e-6), name
    assert 0.1 < ours["hr@10"] < 0.9


def test_several_targets_of_a_user(ranx):
    rng = np.random.default_rng(1)
    score_UI = rng.random((USERS, ITEMS))
    counts = rng.integers(1, 8, USERS)
    targets = [rng.choice(ITEMS, n, replace=False).tolist() for n in counts]
    for u, items in enumerate(targets):
        score_UI[u, items] += 0.8
    rank_UT = np.full((USERS, 8), -1)
    for u, items in enumerate(targets):
        order = np.argsort(-score_UI[u])
        rank_UT[u, : len(items)] = np.argsort(order)[items]
    ours = ranking_metrics.summarize(ranking_metrics.user_values(rank_UT), prefix="")
    scores = [dict(enumerate(row)) for row in score_UI]
    for name, value in evaluate(ranx, targets, scores).items():
        assert ours[name] == pytest.approx(value, abs=1e-6), name
