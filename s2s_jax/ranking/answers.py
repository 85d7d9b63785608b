"""Answers histories with lists of items: by the model, by counted neighbours or by popularity.

Shapes: U users of a batch, V users of a part, I items, K items of a list.
"""

from collections.abc import Iterable, Iterator
from typing import Literal, NamedTuple

import numpy as np

from s2s_jax.data.batching.encoding_shapes import stretches
from s2s_jax.data.batching.histories import Histories
from s2s_jax.data.items.neighbours import Neighbours, Scorer
from s2s_jax.ranking.candidates import Candidates, Lists
from s2s_jax.ranking.encode import Encoded, UserEncoder

# What may answer a history.
By = Literal["model", "neighbours"]
# What answered a history, by its number.
ANSWERED_BY = ("model", "neighbours", "popularity")
_MODEL, _NEIGHBOURS, _POPULARITY = range(3)


class Answers(NamedTuple):
    """The answers to the users of a batch.

    Attributes:
      lists: the best items of each user.
      by_U: int8, what answered: an index into `ANSWERED_BY`.
      unknown_U: int32, number of events shown to the model whose item has no row in its table.
    """

    lists: Lists
    by_U: np.ndarray
    unknown_U: np.ndarray


class ByModel:
    """Answers with the items that the model ranks first."""

    def __init__(self, encoder: UserEncoder, candidates: Candidates):
        """Prepares answering.

        Args:
          encoder: encodes the users.
          candidates: the items to rank.
        """
        self.encoder, self.candidates = encoder, candidates

    def answers(self, batch: Histories, encoded: Encoded, k: int) -> Answers:
        """Return the answers for all users of a batch that was encoded."""
        by_U = np.full(len(batch.events_U), _MODEL, np.int8)
        best = self.candidates.top_k(encoded.users_UE, k, batch)
        return Answers(best, by_U, encoded.unknown_U)


class ByCounts:
    """Answers with the items that followed the user's newest items, then with the most popular ones."""

    def __init__(self, scorer: Scorer, count_I: np.ndarray, filter_seen: bool):
        """Prepares answering.

        Args:
          scorer: scores items by their counts as neighbours.
          count_I: int64, events of each item.
          filter_seen: whether the items of a user's history are left out.
        """
        self._scorer, self._ranking = scorer, Neighbours(count_I)
        self._filter_seen = filter_seen

    def answers(self, batch: Histories, k: int) -> Answers:
        """Return the answers for all users; padding has empty lists."""
        users = len(batch.events_U)
        return self.instead(_nothing(users, k), batch, np.arange(users) < batch.users)

    def instead(self, answers: Answers, batch: Histories, chosen_U: np.ndarray) -> Answers:
        """Return other answers for some users, and the same for all others.

        Args:
          answers: the answers so far.
          batch: the users.
          chosen_U: bool, which users get other answers.
        """
        k = answers.lists.index_UK.shape[1]
        index_UK, score_UK = map(np.array, answers.lists)
        users = np.flatnonzero(chosen_U)
        for of in self._scorer.slices(*batch.items_of_users(chosen_U)[:2]):
            of_part_U = np.zeros(len(chosen_U), bool)
            of_part_U[users[of]] = True
            item_P, events_V, seen = batch.items_of_users(of_part_U)
            seen = seen if self._filter_seen else None
            scores = self._ranking.allowed(self._scorer.score(item_P, events_V), seen)
            index_UK[users[of]], score_UK[users[of]] = self._ranking.top_k(
                scores, len(events_V), k, seen
            )
        by_U = np.where(batch.events_U > 0, _NEIGHBOURS, _POPULARITY)
        by_U = np.where(chosen_U, by_U, answers.by_U).astype(np.int8)
        unknown_U = np.where(chosen_U, 0, answers.unknown_U)
        return Answers(Lists(index_UK, score_UK), by_U, unknown_U)


class Answerer:
    """Answers by the model, and short histories by counts."""

    def __init__(self, model: ByModel | None, counts: ByCounts | None, short_history: int):
        """Prepares answering.

        Args:
          model: answers by the model; None: all answers are by counts.
          counts: answers by counts; None: all answers are by the model.
          short_history: histories of fewer events are answered by counts.
        """
        assert model is not None or counts is not None, "something must answer"
        self._model, self._counts, self._short = model, counts, short_history

    @property
    def trained_I(self) -> np.ndarray | None:
        """Whether an item was ever trained; None without a model."""
        return None if self._model is None else self._model.candidates.trained_I

    def answers(self, batches: Iterable[Histories], k: int) -> Iterator[tuple[Histories, Answers]]:
        """Yields batches with the K best items that may be recommended to each user.

        Args:
          batches: batches of users, which are read ahead of their answers.
          k: K.
        """
        if self._model is None:
            assert self._counts is not None, "something must answer"
            for batch in batches:
                yield batch, self._counts.answers(batch, k)
            return
        encoder = self._model.encoder
        for stretch in stretches(batches, encoder.shapes):
            for batch, encoded in zip(stretch, encoder.encode(stretch, self._short), strict=True):
                yield batch, self._by_model(self._model, batch, encoded, k)

    def _by_model(self, model: ByModel, batch: Histories, encoded: Encoded, k: int) -> Answers:
        """Return the answers by the model, but those to short histories by counts."""
        real_U = np.arange(len(batch.events_U)) < batch.users
        short_U = (batch.events_U < self._short) & real_U
        if self._counts is not None and short_U.sum() == batch.users:
            return self._counts.answers(batch, k)
        answers = model.answers(batch, encoded, k)
        if self._counts is None or not short_U.any():
            return answers
        return self._counts.instead(answers, batch, short_U)


def _nothing(users: int, k: int) -> Answers:
    lists = Lists(np.full((users, k), -1, np.int32), np.full((users, k), -np.inf, np.float32))
    return Answers(lists, np.full(users, _NEIGHBOURS, np.int8), np.zeros(users, np.int32))
