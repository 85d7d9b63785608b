"""Finds the exactly best items of users, in blocks of items.

Shapes: U users, E width, I items, B items of a block, S pairs of a user and an item, K best items.
"""

from typing import NamedTuple

import numpy as np

# Maximum number of scores in memory, and of items in a block.
_MOST_SCORES = 2**24
_BLOCK = 2**18


class Pairs(NamedTuple):
    """Distinct pairs of a user and an item, in any order.

    Attributes:
      user_S: int, users, from 0.
      item_S: int, items, from 0.
    """

    user_S: np.ndarray
    item_S: np.ndarray


class Best(NamedTuple):
    """The best items of each user: highest score first, for equal scores the lower number first.

    Attributes:
      item_UK: int64; -1 if fewer than K items are left.
      score_UK: f32; -inf where `item_UK` is -1.
    """

    item_UK: np.ndarray
    score_UK: np.ndarray


NO_PAIRS = Pairs(np.zeros(0, np.int64), np.zeros(0, np.int64))


def top_k(
    users_UE: np.ndarray,
    vectors_IE: np.ndarray,
    k: int,
    left_out: Pairs = NO_PAIRS,
    biased: Pairs = NO_PAIRS,
    bias_S: np.ndarray | None = None,
    allowed_I: np.ndarray | None = None,
) -> Best:
    """Return the K best items of each user.

    Args:
      users_UE: f32, the vectors of users.
      vectors_IE: f32, the vectors of items; may be a memory map.
      k: K, at least 1; it may exceed the number of items.
      left_out: pairs that are left out.
      biased: pairs whose scores are changed.
      bias_S: f32, what is added to their scores.
      allowed_I: bool, the items that may be recommended to anyone; None: all.

    Examples:
      >>> vectors = np.array([[1, 0], [0, 1], [0.5, 0]], np.float32)
      >>> top_k(np.array([[2, 1]], np.float32), vectors, k=2).item_UK.tolist()
      [[0, 1]]
    """
    users, items = len(users_UE), len(vectors_IE)
    k = min(k, max(items, 1))
    best = Best(np.full((users, k), -1, np.int64), np.full((users, k), -np.inf, np.float32))
    block = max(min(_BLOCK, _MOST_SCORES // max(users, 1)), 1)
    for begin in range(0, items, block):
        vectors_BE = vectors_IE[begin : begin + block]
        scores_UB = users_UE @ vectors_BE.T
        if bias_S is not None:
            user, item, of = _inside(biased, begin, len(vectors_BE))
            scores_UB[user, item] += bias_S[of]
        user, item, _ = _inside(left_out, begin, len(vectors_BE))
        scores_UB[user, item] = -np.inf
        if allowed_I is not None:
            scores_UB[:, ~allowed_I[begin : begin + block]] = -np.inf
        best = _better(best, scores_UB, begin)
    return best


def best_of(item_C: np.ndarray, score_C: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the K best of some items of one user, and their scores; -inf is never among them.

    Args:
      item_C: int, distinct items, ascending.
      score_C: f32.
      k: K; the result is shorter if there are fewer items.
    """
    least = np.partition(score_C, -k)[-k] if len(score_C) > k else -np.inf
    (kept,) = np.nonzero(score_C >= least if least > -np.inf else score_C > -np.inf)
    item_C, score_C = item_C[kept], score_C[kept]
    order = np.argsort(-score_C, kind="stable")[:k]
    return item_C[order], score_C[order]


def _inside(pairs: Pairs, begin: int, items: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the pairs whose item is in a block, with its place there, and which pairs these are."""
    (of,) = np.nonzero((pairs.item_S >= begin) & (pairs.item_S < begin + items))
    return pairs.user_S[of], pairs.item_S[of] - begin, of


def _better(best: Best, scores_UB: np.ndarray, begin: int) -> Best:
    """Return the best items of a block and those found before it."""
    k = best.item_UK.shape[1]
    place_B = np.arange(begin, begin + scores_UB.shape[1])
    for user, score_B in enumerate(scores_UB):
        item_B = place_B
        there = best.item_UK[user] >= 0
        if not there.any():
            item, score = best_of(item_B, score_B, k)
            best.item_UK[user, : len(item)], best.score_UK[user, : len(item)] = item, score
            continue
        worst = best.score_UK[user, -1]
        if worst > -np.inf:
            (better,) = np.nonzero(score_B > worst)
            if not len(better):
                continue
            item_B, score_B = item_B[better], score_B[better]
        # Earlier blocks have lower numbers, and come first among equals.
        items = np.concatenate([np.sort(best.item_UK[user][there]), item_B])
        of_items = np.argsort(best.item_UK[user][there], kind="stable")
        scores = np.concatenate([best.score_UK[user][there][of_items], score_B])
        item, score = best_of(items, scores, k)
        best.item_UK[user, : len(item)], best.score_UK[user, : len(item)] = item, score
    return best
