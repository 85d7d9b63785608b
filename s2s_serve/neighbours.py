"""Counted neighbours of an export: which items follow each other in the training log.

Shapes: I items, T pairs of items, U users, E newest events of a user, S pairs of a user and an item.
"""

from pathlib import Path

import numpy as np

from s2s_serve import tensor_file
from s2s_serve.encoding import neighbour_scores
from s2s_serve.encoding.neighbour_scores import EVENT_WEIGHTS, PAIR_UNIT, newest_items
from s2s_serve.errors import UserError
from s2s_serve.search.exact import Pairs

NAME = "neighbours.safetensors"


class Neighbours:
    """Scores items by the items that follow the newest events of users."""

    def __init__(self, directory: Path, items: int, weight: float, temperature: float):
        """Opens the counts.

        Args:
          directory: the directory of the version.
          items: I.
          weight: the weight of counts in a logit.
          temperature: a score is a logit times this.

        Raises:
          UserError: the file does not have counts for this number of items.
        """
        path = directory / NAME
        arrays = tensor_file.read(path)
        if set(arrays) != {"begin", "item", "weight"} or len(arrays["begin"]) != items + 1:
            raise UserError(
                f"{path}: expected begin, item and weight of {items:,} items, found "
                f"{', '.join(arrays)}; export the run again"
            )
        # Row i of a sparse matrix: the items from begin[i] to begin[i + 1], with their weights.
        self._begin = np.asarray(arrays["begin"])
        self._item_T, self._weight_T = arrays["item"], arrays["weight"]
        self._items = items
        self._weight, self._temperature = weight, temperature

    def most_scores(self, item_P: np.ndarray, events_U: np.ndarray) -> np.ndarray:
        """Return int64 `[U]`: how many items of each user may have a count, at most.

        Args:
          item_P: see `bias`.
          events_U: see `bias`.
        """
        item_UE = newest_items(item_P, events_U)
        return np.where(item_UE >= 0, np.diff(self._begin)[item_UE], 0).sum(axis=1)

    def bias(self, item_P: np.ndarray, events_U: np.ndarray) -> tuple[Pairs, np.ndarray]:
        """Return the pairs of users and items with a count, and what it adds to their scores, f32.

        Args:
          item_P: int items of all events, user after user, oldest first; -1 if unknown.
          events_U: int, number of events of each user.
        """
        item_UE = newest_items(item_P, events_U)
        user_T, event_T = np.nonzero(item_UE >= 0)
        of_T = item_UE[user_T, event_T]
        begin_T, count_T = self._begin[of_T], self._begin[of_T + 1] - self._begin[of_T]
        total = int(count_T.sum())
        if not total:
            return Pairs(np.zeros(0, np.int64), np.zeros(0, np.int64)), np.zeros(0, np.float32)
        ends = np.cumsum(count_T)
        place = np.repeat(begin_T - (ends - count_T), count_T) + np.arange(total)
        pair = np.repeat(user_T, count_T) * self._items + self._item_T[place]
        weights = np.repeat(np.take(EVENT_WEIGHTS, event_T), count_T) * self._weight_T[place]
        # Whole numbers, so that sums are exact in any order.
        pair_S, number = np.unique(pair, return_inverse=True)
        sum_S = np.bincount(number, weights.astype(np.float64), len(pair_S))
        score_S = sum_S / (PAIR_UNIT * EVENT_WEIGHTS[0])
        bias_S = neighbour_scores.bias_of(score_S, self._weight, self._temperature)
        return Pairs(*np.divmod(pair_S, self._items)), bias_S
