"""Exact search, compared with sorting all scores."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s2s_serve.search import exact
from s2s_serve.search.exact import Pairs


def by_sorting(scores_UI, k):
    """The best items by a stable sort of all scores in float64."""
    found = []
    for score_I in scores_UI:
        order = np.argsort(-score_I, kind="stable")
        found.append([(int(i), float(score_I[i])) for i in order[:k] if score_I[i] > -np.inf])
    return found


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**31),
    users=st.integers(0, 4),
    items=st.integers(1, 40),
    k=st.integers(1, 45),
    block=st.integers(1, 50),
    masked=st.booleans(),
)
def test_the_best_items_are_those_of_a_sort(seed, users, items, k, block, masked):
    """Scores are small whole numbers, so there are many ties, and sums are exact."""
    rng = np.random.default_rng(seed)
    users_UE = rng.integers(-2, 3, (users, 3)).astype(np.float32)
    vectors_IE = rng.integers(-2, 3, (items, 3)).astype(np.float32)
    scores_UI = users_UE.astype(np.float64) @ vectors_IE.T
    pairs = rng.random((users, items))
    biased, left_out = Pairs(*np.nonzero(pairs < 0.2)), Pairs(*np.nonzero(pairs > 0.7))
    bias_S = rng.integers(-3, 4, len(biased.user_S)).astype(np.float32)
    scores_UI[biased] += bias_S
    scores_UI[left_out] = -np.inf
    allowed_I = rng.random(items) < 0.5 if masked else None
    if allowed_I is not None:
        scores_UI[:, ~allowed_I] = -np.inf
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exact, "_BLOCK", block)
        best = exact.top_k(users_UE, vectors_IE, k, left_out, biased, bias_S, allowed_I)
    for item_K, score_K, expected in zip(*best, by_sorting(scores_UI, k), strict=True):
        there_K = item_K >= 0
        found = zip(item_K[there_K].tolist(), score_K[there_K].tolist(), strict=True)
        assert list(found) == expected
        assert (score_K[~there_K] == -np.inf).all()
