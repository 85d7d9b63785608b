"""Rankings without a model, which show how much the model adds.

Shapes: U users, I items, T pairs of a user and an item.
"""

import numpy as np

from s2s_jax.data.batching.histories import Histories
from s2s_jax.data.items import neighbours
from s2s_jax.data.items.seen import Seen
from s2s_jax.ranking.candidates import Candidates
from s2s_jax.ranking.ranking_metrics import MISSED


class Popularity:
    """Recommends the items with the most events to everybody."""

    def __init__(self, count_I: np.ndarray, candidates: Candidates):
        """Ranks the same items as the model.

        Args:
          count_I: int64, events of each item in training.
          candidates: the items that the model ranks.
        """
        self._count_I = candidates.counts_of_ranked(count_I)
        self._candidates = candidates

    def ranks(self, batch: Histories) -> np.ndarray:
        """Return the int64 `[U]` ranks of the targets; `MISSED` if a target cannot be recommended."""
        seen = self._candidates.seen(batch)
        rank_U = popularity_ranks(self._count_I, batch.target_U, seen)
        return np.where(self._candidates.can_be_found(batch), rank_U, MISSED)


class Neighbours:
    """Recommends the items that follow the user's newest items elsewhere in the log."""

    def __init__(self, count_I: np.ndarray, candidates: Candidates):
        """Ranks the same items as the model.

        Args:
          count_I: int64, events of each item in training.
          candidates: the items that the model ranks.
        """
        self._ranking = neighbours.Neighbours(candidates.counts_of_ranked(count_I))
        self._popularity = Popularity(count_I, candidates)
        self._candidates = candidates

    def ranks(self, batch: Histories, scores: neighbours.Scores) -> np.ndarray:
        """Return the int64 `[U]` ranks of the targets; `MISSED` if a target cannot be recommended.

        Args:
          batch: users.
          scores: their scores, see `neighbours.Scorer`.
        """
        allowed = self._ranking.allowed(scores, self._candidates.seen(batch))
        found_U = self._candidates.can_be_found(batch)
        popular_U = np.where(found_U, self._popularity.ranks(batch), 0)
        rank_U = self._ranking.ranks(allowed, np.where(found_U, batch.target_U, -1), popular_U)
        return np.where(found_U, rank_U, MISSED)


def popularity_ranks(
    count_I: np.ndarray, target_U: np.ndarray, seen: Seen | None = None
) -> np.ndarray:
    """Return the int64 `[U]` ranks of the targets if everybody gets the most popular items.

    Args:
      count_I: number of events of each item in training.
      target_U: int, the target item of each user. An item outside the catalogue has rank I.
      seen: items that are left out of the ranking; the target is ranked even if it is one of them. None:
        no items are left out.

    Examples:
      >>> popularity_ranks(np.array([5, 9, 7, 7]), target_U=np.array([1, 2, -1])).tolist()
      [0, 2, 4]
    """
    count_I = np.asarray(count_I)
    known_U = (target_U >= 0) & (target_U < count_I.size)
    target_U = np.where(known_U, target_U, 0)
    least_U = count_I[target_U]
    rank_U = count_I.size - np.searchsorted(np.sort(count_I), least_U) - 1
    if seen is not None:
        user_T, item_T = seen
        ahead_T = (count_I[item_T] >= least_U[user_T]) & (item_T != target_U[user_T])
        rank_U = rank_U - np.bincount(user_T[ahead_T], minlength=len(target_U))
    return np.where(known_U, rank_U, count_I.size)
