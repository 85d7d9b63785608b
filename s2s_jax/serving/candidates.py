"""What a user may be recommended, for recommending and for evaluation alike.

Both ask here, so a target counts as found only where recommending could have given it: with
`eval.filter_seen`, an item of the history is never recommended, and a target that is one is missed.

Shapes: U users, I items, E width, K items of a list.
"""

from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from s2s_jax.data.histories import Histories
from s2s_jax.data.seen import Seen
from s2s_jax.serving import metrics, ranking


class Lists(NamedTuple):
    """The best items of each user: see `ranking.Best`.

    Attributes:
      index_UK: int32; -1 where fewer than K items are left.
      score_UK: f32; -inf there.
    """

    index_UK: np.ndarray
    score_UK: np.ndarray


class Candidates:
    """The items of a catalogue, ranked for batches of users."""

    def __init__(self, vectors_IE: np.ndarray, mesh: Mesh, filter_seen: bool):
        """Puts the items on the devices.

        Args:
          vectors_IE: f32, one for each item of the catalogue.
          mesh: the devices.
          filter_seen: whether items of the history are left out.
        """
        self._items = ranking.make_catalogue(vectors_IE, mesh)
        self._filter_seen = filter_seen

    def seen(self, batch: Histories) -> Seen | None:
        """The items that each user of a batch is not recommended; None: no such items."""
        return batch.seen if self._filter_seen else None

    def top_k(self, users_UE: jax.Array, k: int, batch: Histories) -> Lists:
        """The K best items that each user may be recommended."""
        best = ranking.top_k(users_UE, self._items, k, self.seen(batch))
        return Lists(*map(np.asarray, best))

    def ranks(self, users_UE: jax.Array, batch: Histories) -> np.ndarray:
        """int64 `[U]` ranks of the targets among these items, from 0.

        Items that score the same as the target come before it. The rank of a target that cannot be
        recommended, and of none, is `metrics.MISSED`.
        """
        rank_U = np.asarray(
            ranking.ranks(users_UE, batch.target_U, self._items, self.seen(batch)), np.int64
        )
        return np.where(self.can_be_found(batch), rank_U, metrics.MISSED)

    def can_be_found(self, batch: Histories) -> np.ndarray:
        """bool `[U]`: whose target may be recommended."""
        there_U = batch.target_U >= 0
        return there_U & ~returns(batch) if self._filter_seen else there_U


def returns(batch: Histories) -> np.ndarray:
    """bool `[U]`: whose target is an item of the history."""
    user_T, item_T = batch.seen
    again_U = np.zeros(len(batch.target_U), bool)
    again_U[user_T[item_T == batch.target_U[user_T]]] = True
    return again_U
