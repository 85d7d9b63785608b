"""The items that may be recommended to a user, for recommending and for evaluating.

Both use the same candidates, so evaluation counts a target as found only if it can be recommended. With
`eval.filter_seen`, items of the history are not recommended, so a target among them counts as missed.
`eval.untrained` says whether items that were never trained are ranked like others, last, or not at all.

Shapes: U users, I items, G items of a group, E width, K items of a list, T pairs of a user and an item,
W weights of counted neighbours.
"""

import copy
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

from s2s_jax.config.settings import Ranking
from s2s_jax.data.batching.histories import Histories
from s2s_jax.data.items.catalogue import Catalogue
from s2s_jax.data.items.seen import Seen
from s2s_jax.errors import UserError
from s2s_jax.ranking.encode import item_ids, item_vectors
from s2s_jax.ranking.neighbour_bias import NeighbourBias, scored_parts
from s2s_jax.ranking.ranked_items import Bias, RankedItems, no_bias, put_items
from s2s_jax.ranking.ranking_metrics import MISSED
from s2s_jax.ranking.ranks import ranks_by_weight
from s2s_jax.ranking.top_k import top_k_by_weight
from s2s_jax.training.step.functions import StepFunctions
from s2s_jax.training.step.state import TrainState


class Lists(NamedTuple):
    """The best items of each user; see `top_k.Best`.

    Attributes:
      index_UK: int32; -1 if fewer than K items are left.
      score_UK: f32; -inf where `index_UK` is -1.
    """

    index_UK: np.ndarray
    score_UK: np.ndarray


class _Group(NamedTuple):
    """Items that are ranked together.

    Attributes:
      items: the vectors of these items.
      item_G: int32, the items of the group, ascending.
      place_I: int32, the index of each item in the group; -1 if it is not in the group.
    """

    items: RankedItems
    item_G: np.ndarray
    place_I: np.ndarray


class Candidates:
    """The items of a catalogue, ranked for batches of users.

    Attributes:
      trained_I: bool, whether an item was ever trained; see `StepFunctions.items_trained`.
      left_out_I: bool, whether an item is recommended to nobody.
    """

    def __init__(
        self,
        vectors_IE: np.ndarray,
        trained_I: np.ndarray,
        mesh: Mesh,
        ranking: Ranking,
        neighbours: NeighbourBias | None,
    ):
        """Puts the items on the devices.

        Args:
          vectors_IE: f32, the vector of each item of the catalogue.
          trained_I: bool, whether an item was ever trained.
          mesh: the devices.
          ranking: which items may be recommended, and in which order.
          neighbours: counted neighbours that are added to the scores; None: the model alone.

        Raises:
          UserError: all items would be left out.
        """
        self._neighbours = neighbours
        self.trained_I = trained_I
        self.left_out_I = ~trained_I & (ranking.untrained == "drop")
        if self.left_out_I.all():
            raise UserError(
                f"eval.untrained: expected keep or last, because none of the {len(trained_I):,} items "
                f"of the catalogue was ever trained, found drop; or give the catalogue of the training "
                f"log"
            )
        self._filter_seen = ranking.filter_seen
        # The items of the first group are recommended before those of the second.
        groups = [~self.left_out_I] if ranking.untrained != "last" else [trained_I, ~trained_I]
        self._groups = [_group(vectors_IE, member_I, mesh) for member_I in groups if member_I.any()]

    def filtering(self, filter_seen: bool) -> "Candidates":
        """Return the same candidates, with or without the items of the history."""
        other = copy.copy(self)
        other._filter_seen = filter_seen
        return other

    def seen(self, batch: Histories) -> Seen | None:
        """Return the items that are not recommended to each user of a batch; None if there are none."""
        return batch.seen if self._filter_seen else None

    def top_k(self, users_UE: np.ndarray, k: int, batch: Histories) -> Lists:
        """Return the K best items that may be recommended to each user."""
        parts = [
            self.top_k_by_weight(of_part_UE, k, part, bias)[0]
            for of_part_UE, part, bias in self._parts(users_UE, batch)
        ]
        return Lists(*(np.concatenate(of_parts) for of_parts in zip(*parts, strict=True)))

    def ranks(self, users_UE: np.ndarray, batch: Histories) -> np.ndarray:
        """Return the int64 `[U]` ranks of the targets among these items, from 0.

        Items with the same score as the target rank before it. The rank is `MISSED` if the target cannot
        be recommended or the user has no target.
        """
        parts = self._parts(users_UE, batch)
        return np.concatenate([self.ranks_by_weight(*part)[0] for part in parts])

    def _parts(
        self, users_UE: np.ndarray, batch: Histories
    ) -> Iterator[tuple[np.ndarray, Histories, Bias]]:
        """Yields parts of a batch with what is added to their scores."""
        if self._neighbours is None:
            yield users_UE, batch, no_bias()
        else:
            for of_part_UE, part, scores in scored_parts(self._neighbours.scorer, users_UE, batch):
                yield of_part_UE, part, self._neighbours.of(scores)

    def top_k_by_weight(
        self, users_UE: np.ndarray, k: int, batch: Histories, bias: Bias
    ) -> list[Lists]:
        """Return the K best items that may be recommended to each user, for each weight of a bias."""
        found: list[Lists] = []
        for group in self._groups:
            seen = _inside(group, self.seen(batch))
            best = top_k_by_weight(users_UE, group.items, k, seen, _bias_inside(group, bias))
            lists = [_of_catalogue(group, *map(np.asarray, of_weight)) for of_weight in best]
            pairs = zip(found, lists, strict=True)
            found = [_appended(first, second) for first, second in pairs] if found else lists
            if all((each.index_UK[:, -1] >= 0).all() for each in found):
                break
        return found

    def ranks_by_weight(self, users_UE: np.ndarray, batch: Histories, bias: Bias) -> np.ndarray:
        """Return int64 `[W, U]`: the ranks of the targets, see `ranks`, for each weight of a bias."""
        rank_WU = np.full((len(bias.bias_WS), len(batch.target_U)), MISSED)
        found_U = self.can_be_found(batch)
        before_U = np.zeros(len(batch.target_U), np.int64)
        for group in self._groups:
            target_U = np.where(found_U, group.place_I[batch.target_U], -1)
            seen = _inside(group, self.seen(batch))
            if (target_U >= 0).any():
                inside = _bias_inside(group, bias)
                found = ranks_by_weight(users_UE, target_U, group.items, seen, inside)
                rank_WU = np.where(target_U[None] >= 0, before_U[None] + np.asarray(found), rank_WU)
            before_U += len(group.item_G)
            if seen is not None:
                before_U -= np.bincount(seen.user_T, minlength=len(before_U))
        return rank_WU

    def counts_of_ranked(self, count_I: np.ndarray) -> np.ndarray:
        """Return the counts of items, with -1 for those that are recommended to nobody."""
        return np.where(self.left_out_I, -1, count_I)

    def can_be_found(self, batch: Histories) -> np.ndarray:
        """Return bool `[U]`: whether the target of a user may be recommended."""
        found_U = (batch.target_U >= 0) & ~self.left_out_I[batch.target_U]
        return found_U & ~returns(batch) if self._filter_seen else found_U


def _group(vectors_IE: np.ndarray, member_I: np.ndarray, mesh: Mesh) -> _Group:
    item_G = np.flatnonzero(member_I).astype(np.int32)
    place_I = np.full(len(member_I), -1, np.int32)
    place_I[item_G] = np.arange(len(item_G))
    vectors_GE = vectors_IE if len(item_G) == len(member_I) else vectors_IE[item_G]
    return _Group(put_items(vectors_GE, mesh), item_G, place_I)


def _inside(group: _Group, seen: Seen | None) -> Seen | None:
    """Return the pairs whose item is in the group, with the item's index in the group."""
    if seen is None:
        return None
    place_T = group.place_I[seen.item_T]
    return Seen(seen.user_T[place_T >= 0], place_T[place_T >= 0])


def _bias_inside(group: _Group, bias: Bias) -> Bias:
    """Return the biases of the pairs whose item is in the group, with the item's index in the group."""
    place_S = group.place_I[bias.item_S]
    inside_S = place_S >= 0
    return Bias(bias.user_S[inside_S], place_S[inside_S], bias.bias_WS[:, inside_S])


def _of_catalogue(group: _Group, index_UK: np.ndarray, score_UK: np.ndarray) -> Lists:
    """Return lists of items of the catalogue from lists of items of a group."""
    there_UK = index_UK >= 0
    index_UK = np.where(there_UK, group.item_G[np.where(there_UK, index_UK, 0)], -1)
    return Lists(index_UK.astype(np.int32), score_UK)


def _appended(first: Lists, second: Lists) -> Lists:
    """Fills the free places at the end of the first lists with the second lists."""
    index = np.concatenate([first.index_UK, second.index_UK], axis=1)
    score = np.concatenate([first.score_UK, second.score_UK], axis=1)
    order = np.argsort(index < 0, axis=1, kind="stable")[:, : first.index_UK.shape[1]]
    return Lists(np.take_along_axis(index, order, 1), np.take_along_axis(score, order, 1))


def returns(batch: Histories) -> np.ndarray:
    """Return bool `[U]`: whether the target of a user is an item of the history."""
    user_T, item_T = batch.seen
    again_U = np.zeros(len(batch.target_U), bool)
    again_U[user_T[item_T == batch.target_U[user_T]]] = True
    return again_U


def make_candidates(
    functions: StepFunctions,
    state: TrainState,
    catalogue: Catalogue,
    ranking: Ranking,
    mesh: Mesh,
    neighbours: NeighbourBias | None,
) -> Candidates:
    """Return the candidates of a catalogue, with the vectors of a state.

    Args:
      functions: the functions of the model.
      state: the state on the devices.
      catalogue: the items.
      ranking: which items may be recommended, and in which order.
      mesh: the devices.
      neighbours: the result of `count_bias` for this ranking.

    Raises:
      UserError: all items would be left out.
    """
    items = ranking.items
    vectors_IE = item_vectors(functions, state, catalogue, items, mesh)
    trained = [
        np.asarray(functions.items_trained(state, ids)) for ids in item_ids(catalogue, items, mesh)
    ]
    trained_I = np.concatenate(trained)[: len(catalogue.item)]
    return Candidates(vectors_IE, trained_I, mesh, ranking, neighbours)
