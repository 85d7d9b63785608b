"""How many of the best items an index finds, and the effort that it takes to find enough.

Shapes: I items, U users, E width, K best items.
"""

from typing import NamedTuple

import numpy as np

from s2s_serve.search import exact
from s2s_serve.search.index import TUNED, Index

# Scores of equal vectors may differ by the order of their sums.
_ROUNDING = 1e-6
# Length of the noise of `users_like_items`, in lengths of the item.
_NOISE = 1.5


class Tuned(NamedTuple):
    """The effort that an index needs.

    Attributes:
      effort: the lowest effort that reaches the wanted recall, for `Index.open`; if none does, the
        highest.
      recall: the recall with it.
      reached: whether that is enough.
      share: the share of the groups, and so about of the items, that a user is compared with. If it is
        near 1, exact search is nearly as fast.
    """

    effort: int
    recall: float
    reached: bool
    share: float


def tune(
    index: Index,
    vectors_IE: np.ndarray,
    users_UE: np.ndarray,
    k: int = TUNED,
    wanted: float = 0.98,
) -> Tuned:
    """Finds the lowest effort that reaches a recall.

    Other users have other recalls. So that these reach it too, the mean has to be above it by its
    standard error.

    Args:
      index: an index of these items; its `effort` stays as it is.
      vectors_IE: f32, the vectors of the items; may be a memory map.
      users_UE: f32, users like those who will be served; a thousand make the standard error small.
      k: K, see `recall`.
      wanted: the recall to reach.
    """
    worst_U = _kth_scores(vectors_IE, users_UE, k)

    def tried(effort: int) -> tuple[float, bool]:
        """The recall, and whether it is enough."""
        recall_U = _recalls(index, vectors_IE, users_UE, worst_U, k, effort)
        error = float(recall_U.std()) / len(recall_U) ** 0.5
        return float(recall_U.mean()), float(recall_U.mean()) - error >= wanted

    # Few groups are enough for most indexes, so high efforts, which take long, are tried last.
    low, high = 0, 1
    best, reached = tried(high)
    while not reached and high < index.groups:
        low, high = high, min(2 * high, index.groups)
        best, reached = tried(high)
    while reached and high - low > 1:
        middle = (low + high) // 2
        found, enough = tried(middle)
        if enough:
            high, best = middle, found
        else:
            low = middle
    return Tuned(high, best, reached, high / index.groups)


def recall(
    index: Index, vectors_IE: np.ndarray, users_UE: np.ndarray, k: int, effort: int | None = None
) -> float:
    """Return the share of the exactly best K items that an index finds, as a mean over users.

    An item counts as one of the best if its exact score is at least the K-th best score, so any of the
    items with equal scores is right.

    Args:
      index: an index of these items.
      vectors_IE: f32, the vectors of the items; may be a memory map.
      users_UE: f32, at least one user.
      k: K; if there are fewer items, their number is used.
      effort: see `Index.search`; None: as in serving.
    """
    worst_U = _kth_scores(vectors_IE, users_UE, k)
    return float(_recalls(index, vectors_IE, users_UE, worst_U, k, effort).mean())


def users_like_items(vectors_IE: np.ndarray, users: int, seed: int = 0) -> np.ndarray:
    """Return f32 `[U, E]`: vectors to tune an index with where there are no vectors of users.

    Each is an item with noise, at a cosine of about .55, as the best items of users in trained models.
    For these vectors, the index needs as much effort as for real users, or up to four times as much.

    Args:
      vectors_IE: f32, the vectors of the items; may be a memory map.
      users: U.
      seed: seed of the draw.
    """
    rng = np.random.default_rng(seed)
    items, width = vectors_IE.shape
    # A memory map is read in ascending order.
    drawn_UE = np.asarray(vectors_IE[np.sort(rng.integers(items, size=users))])
    noise_UE = rng.normal(size=(users, width)) / width**0.5
    length_U1 = np.linalg.norm(drawn_UE, axis=1, keepdims=True)
    return (drawn_UE + _NOISE * length_U1 * noise_UE).astype(np.float32)


def _kth_scores(vectors_IE: np.ndarray, users_UE: np.ndarray, k: int) -> np.ndarray:
    """Return f32 `[U]`: scores from which on an item is one of the best K."""
    assert len(users_UE) > 0, "there are users"
    score_UK = exact.top_k(users_UE, vectors_IE, k).score_UK
    return score_UK[:, -1] - _ROUNDING * np.abs(score_UK).max(axis=1)


def _recalls(
    index: Index,
    vectors_IE: np.ndarray,
    users_UE: np.ndarray,
    worst_U: np.ndarray,
    k: int,
    effort: int | None,
) -> np.ndarray:
    """Return f64 `[U]`: the recall of each user."""
    k = min(k, len(vectors_IE))
    recall_U = np.empty(len(users_UE))
    for user, found_K in enumerate(index.search(users_UE, k, effort)):
        found_K = found_K[found_K >= 0]
        right = vectors_IE[found_K] @ users_UE[user] >= worst_U[user]
        recall_U[user] = right.sum() / k
    return recall_U
