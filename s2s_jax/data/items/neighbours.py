"""Counts which items follow each other, and ranks items by these counts: a baseline without a model.

An item is a neighbour of the items up to three events before it in a row. The weight of such a pair is
1, 1/2 or 1/3, for a distance of one, two or three events. An item's score for a user is the weighted sum
of its weights as a neighbour of the user's newest five events: the newest event counts 1, the one before
it 1/2, and so on. Items without a score come after all others, ordered by popularity. (The factorized
form of such item-to-item transitions is in Rendle, Freudenthaler, Schmidt-Thieme, "Factorizing
personalized Markov chains for next-basket recommendation", 2010.)

Shapes: P events, N rows, T pairs of items, U users, I items of a catalogue, S scored pairs of a user and
an item, E newest events of a user, K items of a list.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import scipy.sparse

from s2s_jax.config.settings import Decoding, Items, Logs
from s2s_jax.data.encoding.held_out import Cut
from s2s_jax.data.encoding.row_decoding import decode_rows
from s2s_jax.data.items.each_stripe import each_stripe
from s2s_jax.data.items.item_counts import codes_of
from s2s_jax.data.items.seen import Seen
from s2s_jax.data.logs import orc
from s2s_jax.data.logs.index import FileIndex
from s2s_serve.encoding import blocks, features
from s2s_serve.encoding.item_numbers import ItemNumbers
from s2s_serve.encoding.neighbour_scores import EVENT_WEIGHTS, PAIR_UNIT, newest_items

# Weights by distance, in units of `PAIR_UNIT`, so that sums are exact in any order.
_WEIGHTS = (6, 3, 2)
# Maximum number of pairs in memory. A pair takes 16 bytes, and twice that while pairs are merged.
MOST_PAIRS = 2**25
# Maximum number of scores of the users that are scored together. A score takes about 100 bytes while
# users are ranked.
MOST_SCORES = 2**21


class NeighbourCounts:
    """Counts pairs of items, stripe by stripe, in bounded memory.

    >>> counts = NeighbourCounts(items=3)
    >>> counts.add(np.array([0, 1, 2, 0, 1]), np.array([3, 2]))
    >>> counts.matrix().toarray().tolist()
    [[0.0, 2.0, 0.5], [0.0, 0.0, 1.0], [0.0, 0.0, 0.0]]
    """

    def __init__(self, items: int, most: int = MOST_PAIRS):
        """Starts without pairs.

        Args:
          items: I, the number of items in the catalogue.
          most: maximum number of pairs in memory. If a log has more, every item keeps the same number of
            neighbours, those with the largest weights. A pair that was dropped starts again from 0 when
            it occurs again.
        """
        self._items = items
        self._most = most
        self._pair_T = np.zeros(0, np.int64)
        self._weight_T = np.zeros(0, np.int64)
        # Not yet merged.
        self._waiting: list[np.ndarray] = []
        self._waiting_pairs = 0

    def add(self, item_P: np.ndarray, length_N: np.ndarray) -> None:
        """Counts the events of some rows.

        Args:
          item_P: int items, row after row, oldest first; negative if the item is not in the catalogue.
          length_N: int, number of events of each row.
        """
        row_P = np.repeat(np.arange(len(length_N)), length_N)
        for distance, weight in enumerate(_WEIGHTS, 1):
            before_T, after_T = item_P[:-distance], item_P[distance:]
            pair = (row_P[:-distance] == row_P[distance:]) & (before_T >= 0) & (after_T >= 0)
            pair_T = before_T[pair].astype(np.int64) * self._items + after_T[pair]
            self._waiting.append(pair_T * len(_WEIGHTS) + _WEIGHTS.index(weight))
            self._waiting_pairs += len(pair_T)
        # Merges only when about as many pairs wait as are merged, so that a pair is sorted few times.
        if self._waiting_pairs > max(len(self._pair_T), self._most // 4):
            self._merge()

    def _merge(self) -> None:
        found_T = np.concatenate([np.zeros(0, np.int64), *self._waiting])
        self._waiting, self._waiting_pairs = [], 0
        pair_T = np.concatenate([self._pair_T, found_T // len(_WEIGHTS)])
        weight_T = np.concatenate([self._weight_T, np.take(_WEIGHTS, found_T % len(_WEIGHTS))])
        order_T = np.argsort(pair_T, kind="stable")
        pair_T, weight_T = pair_T[order_T], weight_T[order_T]
        begins_T = np.flatnonzero(np.diff(pair_T, prepend=-1))
        self._pair_T = pair_T[begins_T]
        self._weight_T = np.add.reduceat(weight_T, begins_T) if len(begins_T) else weight_T
        if len(self._pair_T) > self._most:
            self._keep_heaviest()

    def _keep_heaviest(self) -> None:
        """Drops pairs until at most half of the maximum is left, but keeps one of each item."""
        item_T = self._pair_T // self._items
        order_T = np.lexsort((self._pair_T, -self._weight_T, item_T))
        begins_T = np.diff(item_T[order_T], prepend=-1) != 0
        rank_T = np.arange(len(order_T))
        rank_T -= np.maximum.accumulate(np.where(begins_T, rank_T, 0))
        held = np.cumsum(np.bincount(rank_T))
        kept = max(int(np.searchsorted(held, self._most // 2, side="right")), 1)
        chosen_T = np.sort(order_T[rank_T < kept])
        self._pair_T, self._weight_T = self._pair_T[chosen_T], self._weight_T[chosen_T]

    def matrix(self) -> scipy.sparse.csr_matrix:
        """Return f64 `[I, I]`: the weight of the second item as a neighbour of the first."""
        self._merge()
        rows, columns = np.divmod(self._pair_T, self._items)
        shape = (self._items, self._items)
        weights = self._weight_T / PAIR_UNIT
        return scipy.sparse.csr_matrix((weights, (rows, columns)), shape=shape)


def count_neighbours(
    items: Items, logs: Logs, index: FileIndex, cut: Cut, numbers: ItemNumbers, catalogue_items: int
) -> scipy.sparse.csr_matrix:
    """Counts the neighbours of a catalogue's items in a log, with one stripe per thread in memory.

    Args:
      items: what an item is.
      logs: how the files are read.
      index: the index of the log's files.
      cut: events before this cut are counted, such as `held_out.training_cut`.
      numbers: the numbers of the catalogue's items.
      catalogue_items: I.

    Returns:
      See `NeighbourCounts.matrix`.

    Raises:
      UserError: a stripe cannot be read, and may not be skipped.
    """
    feature = items.item
    decoding = Decoding.of_whole_rows((feature,))
    columns = list(dict.fromkeys([*features.column_names((feature,)), *cut.column_names]))
    item = features.id_columns((feature,))[feature.name]

    def items_of(stripe: int) -> tuple[np.ndarray, np.ndarray]:
        file, number, first_row = index.stripes[stripe]
        batch = orc.read_stripe(file, number, columns)
        block = decode_rows(batch, file, first_row, decoding)
        kept_N = cut.kept(batch, block.lengths_N, file, first_row)
        item_P = numbers.of(codes_of(block.values_PC[:, item]))
        kept = blocks.Block(item_P[:, None], block.begins_N, kept_N)
        return blocks.positions_of(kept)[:, 0], kept_N

    counts = NeighbourCounts(catalogue_items)
    # What is skipped was already reported when the items were counted.
    for item_P, length_N in each_stripe(index, logs, items_of, skipped=lambda reason: None):
        counts.add(item_P, length_N)
    return counts.matrix()


class Scores(NamedTuple):
    """Scores above 0, sorted by user, then item.

    Attributes:
      user_S: int32.
      item_S: int32.
      score_S: f64, above 0.
    """

    user_S: np.ndarray
    item_S: np.ndarray
    score_S: np.ndarray


class Scorer:
    """Scores items for users by the items that follow their newest events in the log."""

    def __init__(self, matrix: scipy.sparse.csr_matrix):
        """Prepares scoring; `matrix` is the result of `NeighbourCounts.matrix`."""
        # Whole numbers, so that sums are exact in any order.
        self._matrix = (matrix * PAIR_UNIT).rint()
        self._followers_I = np.diff(self._matrix.indptr)

    @property
    def matrix(self) -> scipy.sparse.csr_matrix:
        """f64 `[I, I]`: the weights of pairs in units of `PAIR_UNIT`: whole numbers."""
        return self._matrix

    def score(self, item_P: np.ndarray, events_U: np.ndarray) -> Scores:
        """Scores the items for each user.

        Args:
          item_P: int items of all events, user after user, oldest first; negative if the item is not in
            the catalogue.
          events_U: int, number of events of each user.
        """
        item_UE = newest_items(item_P, events_U)
        user_T, event_T = np.nonzero(item_UE >= 0)
        weights = np.take(EVENT_WEIGHTS, event_T).astype(np.float64)
        shape = (len(item_UE), len(self._followers_I))
        newest = scipy.sparse.csr_matrix((weights, (user_T, item_UE[user_T, event_T])), shape=shape)
        scored = newest @ self._matrix
        scored.sort_indices()
        user_S = np.repeat(np.arange(len(item_UE), dtype=np.int32), np.diff(scored.indptr))
        return Scores(user_S, scored.indices, scored.data / (PAIR_UNIT * EVENT_WEIGHTS[0]))

    def slices(self, item_P: np.ndarray, events_U: np.ndarray) -> Iterator[slice]:
        """Yields slices of the users, in order, each with at most `MOST_SCORES` scores or a single user.

        Users are halved again and again, so that slices have few different sizes.

        Args:
          item_P: see `score`.
          events_U: see `score`.
        """
        item_UE = newest_items(item_P, events_U)
        # Two events may have the same followers, so a user has at most as many scores.
        scores_U = np.where(item_UE >= 0, self._followers_I[item_UE], 0).sum(axis=1)

        def halves(begin: int, stop: int) -> Iterator[slice]:
            if stop - begin > 1 and scores_U[begin:stop].sum() > MOST_SCORES:
                middle = (begin + stop + 1) // 2
                yield from halves(begin, middle)
                yield from halves(middle, stop)
            else:
                yield slice(begin, stop)

        return halves(0, len(scores_U))


class Neighbours:
    """Ranks a catalogue for users by their scores, then by popularity."""

    def __init__(self, count_I: np.ndarray):
        """Prepares the ranking.

        Args:
          count_I: int, number of events of each item; negative for items that are recommended to nobody.
        """
        self._count_I = count_I
        # Equally popular items keep the order of the catalogue.
        order_I = np.argsort(-count_I, kind="stable")
        self._popular = order_I[count_I[order_I] >= 0]

    def allowed(self, scores: Scores, seen: Seen | None) -> Scores:
        """Return the scores of the items that may be recommended.

        Args:
          scores: the result of `Scorer.score`.
          seen: items that are left out of the ranking; None: no items are left out.
        """
        user_S, item_S, score_S = scores
        items = len(self._count_I)
        allowed_S = self._count_I[item_S] >= 0
        if seen is not None and len(seen.user_T):
            # Sorted, as pairs of `Seen` are.
            pair_T = seen.user_T.astype(np.int64) * items + seen.item_T
            pair_S = user_S.astype(np.int64) * items + item_S
            place_S = np.minimum(np.searchsorted(pair_T, pair_S), len(pair_T) - 1)
            allowed_S &= pair_T[place_S] != pair_S
        return Scores(user_S[allowed_S], item_S[allowed_S], score_S[allowed_S])

    def ranks(self, scores: Scores, target_U: np.ndarray, popularity_U: np.ndarray) -> np.ndarray:
        """Return the int64 `[U]` ranks of the targets, from 0; items that tie with a target come first.

        Args:
          scores: the result of `allowed`.
          target_U: int, the target item of each user, which must be one that may be recommended; the
            rank of a negative one has no meaning.
          popularity_U: int, ranks of the targets by popularity, among the items that may be recommended
            to the user.
        """
        user_S, item_S, score_S = scores
        target_S = target_U[user_S]
        own_U = np.zeros(len(target_U))
        own_U[user_S[item_S == target_S]] = score_S[item_S == target_S]
        as_popular_S = self._count_I[item_S] >= self._count_I[target_S]
        own_S = own_U[user_S]
        before_S = (score_S > own_S) | ((score_S == own_S) & as_popular_S)
        before_S &= item_S != target_S
        before_U = np.bincount(user_S, before_S, minlength=len(target_U))
        # A target without a score comes after all items with a score, and is ranked by popularity among
        # the others.
        rest_U = popularity_U - np.bincount(
            user_S, as_popular_S & (item_S != target_S), minlength=len(target_U)
        )
        return np.where(own_U > 0, before_U, before_U + rest_U).astype(np.int64)

    def top_k(
        self, scores: Scores, users: int, k: int, seen: Seen | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the best items of each user, and their scores.

        Items with equal scores are ordered by popularity, and equally popular ones as in the catalogue.

        Args:
          scores: the result of `allowed`.
          users: U.
          k: K.
          seen: items that are left out of the ranking; None: no items are left out.

        Returns:
          int32 `[U, K]`, -1 where fewer items are left; f32 `[U, K]`, 0 for items that have no score and
          -inf where there is no item.
        """
        best_UK = np.full((users, k), -1, np.int32)
        score_UK = np.full((users, k), -np.inf, np.float32)
        order_S = np.lexsort(
            (scores.item_S, -self._count_I[scores.item_S], -scores.score_S, scores.user_S)
        )
        begin_U = np.searchsorted(scores.user_S, np.arange(users + 1))
        seen_begin_U = np.searchsorted(seen.user_T, np.arange(users + 1)) if seen else None
        for user in range(users):
            of_user = order_S[begin_U[user] : begin_U[user + 1]][:k]
            best = scores.item_S[of_user]
            if len(best) < k:
                had = np.zeros(0, np.int32)
                if seen is not None and seen_begin_U is not None:
                    had = seen.item_T[seen_begin_U[user] : seen_begin_U[user + 1]]
                popular = self._popular[: k + len(had)]
                more = popular[~np.isin(popular, np.concatenate([best, had]))]
                best = np.concatenate([best, more])[:k]
            best_UK[user, : len(best)] = best
            score_UK[user, : len(best)] = 0
            score_UK[user, : len(of_user)] = scores.score_S[of_user]
        return best_UK, score_UK
