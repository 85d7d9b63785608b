"""A few example users: their last events, and what a checkpoint recommends to them.

If events are held out, histories end before the last event of a row, as in the evaluation of test
events. Otherwise histories are complete.

Shapes: U users, K recommended items.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from s2s_jax.config.settings import Split
from s2s_jax.data.batching.histories import Histories, HistoryReader
from s2s_jax.data.encoding.held_out import Targets
from s2s_jax.data.items.catalogue import item_text
from s2s_jax.ranking.candidates import Candidates, returns
from s2s_jax.ranking.encode import UserEncoder
from s2s_jax.ranking.ranking_metrics import MISSED

_EVENTS = 10
_TOP_K = 10


class Event(NamedTuple):
    """An event of a user.

    Attributes:
      item: id of the item in the log; None if the event has none.
      held_out: "" for a training event, else "test", "validation" or, between these, "held out".
    """

    item: str | None
    held_out: str


class Recommended(NamedTuple):
    """A recommended item.

    Attributes:
      item: id of the item in the log.
      score: cosine similarity with the predicted next event.
      is_next: whether it is the item of the held-out event.
    """

    item: str
    score: float
    is_next: bool


class ShownUser(NamedTuple):
    """A row of the log, with recommendations.

    Attributes:
      file: name of the file.
      row: number of the row in the file, from 0.
      events: number of events of the row.
      last: the last events, oldest first.
      best: recommended items, best first.
      rank: rank of the held-out event's item, from 1; None if there is no such event, if it has no item,
        or if its item cannot be recommended.
      returns: whether `rank` is None because the item is already in the history.
    """

    file: str
    row: int
    events: int
    last: list[Event]
    best: list[Recommended]
    rank: int | None
    returns: bool


class Shown(NamedTuple):
    """Example users, and the checkpoint and catalogue that were used.

    Attributes:
      step: step of the checkpoint.
      items: number of items of the catalogue.
      collisions: number of ids that are shown as another id, see `Catalogue`.
      users: the users, at most as many as requested.
    """

    step: int
    items: int
    collisions: int
    users: list[ShownUser]


def spread_over_log(
    reader: HistoryReader, users: int, targets: Targets | None
) -> Iterator[tuple[int, Histories]]:
    """Yields the first batch of each stripe, with the number of the stripe.

    The first stripes are evenly spread over the log.

    Args:
      reader: the reader of histories.
      users: the number of users to show, one of each stripe if there are enough stripes.
      targets: defines the targets; None: there are no targets, and histories are complete.
    """
    stripes = reader.stripes
    evenly = np.linspace(0, stripes - 1, min(users, stripes)).round().astype(int).tolist()
    for stripe in dict.fromkeys([*evenly, *range(stripes)]):
        batch = next(reader.read(stripe, targets), None)
        if batch is not None:
            yield stripe, batch


class ExampleUsers:
    """Shows users of a batch: their last events, and the items recommended to them."""

    def __init__(self, encoder: UserEncoder, candidates: Candidates, item: pa.Array, split: Split):
        """Prepares recommending.

        Args:
          encoder: encodes the users with a restored checkpoint.
          candidates: the items to rank.
          item: the ids of these items, as stored in the log.
          split: the events that are held out.
        """
        self._encoder, self._candidates, self._item = encoder, candidates, item
        self._split = split

    def show(self, batch: Histories, users: int, file: str) -> list[ShownUser]:
        """Return the first users of a batch.

        Args:
          batch: a batch of users.
          users: the number of users to show.
          file: the name of their file.
        """
        (encoded,) = self._encoder.encode([batch])
        index_UK, score_UK = self._candidates.top_k(encoded.users_UE, _TOP_K, batch)
        rank_U = self._candidates.ranks(encoded.users_UE, batch)
        again_U = returns(batch) & (rank_U == MISSED)
        shown = []
        for n in range(users):
            target = int(batch.target_U[n])
            places = zip(index_UK[n].tolist(), score_UK[n].tolist(), strict=True)
            listed = [
                Recommended(item_text(self._item, index), score, index == target)
                for index, score in places
                if index >= 0
            ]
            events = self._events(batch, n)
            rank = None if rank_U[n] == MISSED else int(rank_U[n]) + 1
            row = int(batch.row_U[n])
            again = bool(again_U[n])
            shown.append(ShownUser(file, row, len(events), events[-_EVENTS:], listed, rank, again))
        return shown

    def _events(self, batch: Histories, n: int) -> list[Event]:
        """Return the events of user `n`, including held-out ones."""
        items = batch.items_of(n).tolist()
        if self._split.holds_out:
            items.append(int(batch.target_U[n]))
        # With a split by time, only the last event shown is known to be held out.
        last = 1 if self._split.at is not None else self._split.events
        events = []
        for back, index in zip(range(len(items), 0, -1), items, strict=True):
            kept_for = "held out" if back <= last else ""
            if last and back in (1, last):
                kept_for = "test" if back == 1 else "validation"
            events.append(Event(item_text(self._item, index) if index >= 0 else None, kept_for))
        return events
