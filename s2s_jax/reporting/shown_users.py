"""A few example users: their last events, and what a checkpoint recommends to them.

If events are held out, histories end before the last event of a row, as in the evaluation of test
events. Otherwise histories are complete.

Shapes: U users, K recommended items.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

from s2s_jax.cluster.mesh import make_mesh
from s2s_jax.config import Config
from s2s_jax.config.settings import Decoding, Items, Logs, Ranking, ShownHistory, Split
from s2s_jax.data.batching.histories import Histories, HistoryReader, ItemNumbers
from s2s_jax.data.encoding import held_out
from s2s_jax.data.encoding.indexing import index_files
from s2s_jax.data.items.catalogue import Catalogue, collect, item_text
from s2s_jax.ranking.candidates import make_candidates, returns
from s2s_jax.ranking.encode import user_vectors
from s2s_jax.ranking.ranking_metrics import MISSED
from s2s_jax.ranking.restored import Restored, restore

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


def show_users(config: Config, run_dir: Path, users: int) -> Shown:
    """Restores the best checkpoint, or the newest if none was evaluated, and recommends items.

    Args:
      config: configuration of the run.
      run_dir: directory of the run; it may have been moved.
      users: U, at least 1; users are taken from stripes all over the log.

    Raises:
      UserError: there is no checkpoint, or the checkpoint or the log cannot be read.
    """
    logs, items, split = Logs.of(config), Items.of(config), Split.of(config)
    index = index_files(logs, Decoding.of(config))
    mesh = make_mesh()
    run = restore(config, mesh, run_dir=run_dir)
    catalogue = collect(items, logs, index, held_out.catalogue_cut(split))
    stripes = len(index.stripes)
    each = -(-users // stripes)
    numbers = ItemNumbers(catalogue.ids[items.item.name])
    together = -(-each // mesh.size) * mesh.size
    reader = HistoryReader(ShownHistory.of(config), logs, index, numbers, together)
    shower = _Shower(config, run, catalogue, mesh)
    shown: list[ShownUser] = []
    targets = held_out.targets(split, "test") if split.holds_out else None
    for stripe, batch in _spread(reader, users, targets):
        wanted = min(each, batch.users, users - len(shown))
        shown += shower.show(batch, wanted, index.stripes[stripe][0].path.name)
        if len(shown) == users:
            break
    return Shown(run.step, len(catalogue.item), catalogue.collisions, shown)


def _spread(
    reader: HistoryReader, users: int, targets: held_out.Targets | None
) -> Iterator[tuple[int, Histories]]:
    """The first batch of each stripe; begins with stripes that are evenly spread over the log."""
    stripes = reader.stripes
    evenly = np.linspace(0, stripes - 1, min(users, stripes)).round().astype(int).tolist()
    for stripe in dict.fromkeys([*evenly, *range(stripes)]):
        batch = next(reader.read(stripe, targets), None)
        if batch is not None:
            yield stripe, batch


class _Shower:
    def __init__(self, config: Config, run: Restored, catalogue: Catalogue, mesh: Mesh):
        self._split, self._run, self._mesh = Split.of(config), run, mesh
        self._item = catalogue.item
        ranking = Ranking.of(config)
        self._candidates = make_candidates(run.functions, run.state, catalogue, ranking, mesh)

    def show(self, batch: Histories, users: int, file: str) -> list[ShownUser]:
        """The first `users` of a batch."""
        users_UE, _ = user_vectors(self._run.functions, self._run.state, batch, self._mesh)
        index_UK, score_UK = self._candidates.top_k(users_UE, _TOP_K, batch)
        rank_U = self._candidates.ranks(users_UE, batch)
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
