"""A few users for people to look at: what they did last, and what a checkpoint recommends to them.

Where events are held out, histories end before the last event of a row, as when the test events are
evaluated; otherwise they are whole.

Shapes: U users, K items of a list.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

from s2s_jax.cluster.mesh import make_mesh
from s2s_jax.config import Config
from s2s_jax.data.batching.histories import Histories, HistoryReader, ItemNumbers
from s2s_jax.data.encoding import held_out
from s2s_jax.data.encoding.indexing import index_files
from s2s_jax.data.items.catalogue import Catalogue, collect, item_text
from s2s_jax.ranking import metrics
from s2s_jax.ranking.candidates import returns
from s2s_jax.ranking.evaluation import make_candidates, user_vectors
from s2s_jax.ranking.restored import Restored, restore

_EVENTS = 10
_TOP_K = 10


class Event(NamedTuple):
    """An event of a user.

    Attributes:
      item: its item's id in the log; None where it has none.
      held_out: "", or what training kept it for: "test", "validation" or, between, "held out".
    """

    item: str | None
    held_out: str


class Recommended(NamedTuple):
    """An item that is recommended.

    Attributes:
      item: its id in the log.
      score: cosine similarity with what the user is expected to do next.
      is_next: whether it is the item of the event that was to be found.
    """

    item: str
    score: float
    is_next: bool


class ShownUser(NamedTuple):
    """A row of the log.

    Attributes:
      file: its name.
      row: of the file, from 0.
      events: events of the row.
      last: the newest of them, oldest first.
      best: best first.
      rank: of the event that was to be found, from 1; None if there is none, none with an item, or only
        one that is not recommended.
      returns: whether it is None because the user had the item before.
    """

    file: str
    row: int
    events: int
    last: list[Event]
    best: list[Recommended]
    rank: int | None
    returns: bool


class Shown(NamedTuple):
    """The users, and what they were shown by.

    Attributes:
      step: of the checkpoint.
      items: of the catalogue.
      collisions: ids of the log that stand for others, see `Catalogue`.
      users: at most as many as were asked for.
    """

    step: int
    items: int
    collisions: int
    users: list[ShownUser]


def show_users(config: Config, run_dir: Path, users: int) -> Shown:
    """Restores the best checkpoint, or the newest where nothing was evaluated, and ranks.

    Args:
      config: of the run.
      run_dir: its directory, which may have been moved.
      users: U, at least 1; they come from stripes all over the log.

    Raises:
      UserError: there is no checkpoint, or it or the log cannot be read.
    """
    moved = dataclasses.replace(config.train, output_dir=str(run_dir))
    config = dataclasses.replace(config, train=moved)
    index = index_files(config)
    mesh = make_mesh()
    run = restore(config, mesh)
    catalogue = collect(config)
    stripes = len(index.stripes)
    each = -(-users // stripes)
    numbers = ItemNumbers(catalogue, config)
    reader = HistoryReader(config, index, numbers, -(-each // mesh.size) * mesh.size)
    shower = _Shower(config, run, catalogue, mesh)
    shown: list[ShownUser] = []
    targets = held_out.targets(config, "test") if anything_held_out(config) else None
    for stripe, batch in _spread(reader, users, targets):
        wanted = min(each, batch.users, users - len(shown))
        shown += shower.show(batch, wanted, index.stripes[stripe][0].path.name)
        if len(shown) == users:
            break
    return Shown(run.step, len(catalogue.item), catalogue.collisions, shown)


def anything_held_out(config: Config) -> bool:
    """Whether some events of a row are to be found."""
    return config.eval.held_out > 0 or config.eval.split_at is not None


def _spread(
    reader: HistoryReader, users: int, targets: held_out.Targets | None
) -> Iterator[tuple[int, Histories]]:
    """The first batch of each stripe, those first that lie evenly over the log."""
    stripes = reader.stripes
    evenly = np.linspace(0, stripes - 1, min(users, stripes)).round().astype(int).tolist()
    for stripe in dict.fromkeys([*evenly, *range(stripes)]):
        batch = next(reader.read(stripe, targets), None)
        if batch is not None:
            yield stripe, batch


class _Shower:
    def __init__(self, config: Config, run: Restored, catalogue: Catalogue, mesh: Mesh):
        self._config, self._run, self._mesh = config, run, mesh
        self._item = catalogue.item
        self._candidates = make_candidates(run.functions, run.state, catalogue, config, mesh)

    def show(self, batch: Histories, users: int, file: str) -> list[ShownUser]:
        """The first `users` of a batch."""
        users_UE, _ = user_vectors(self._run.functions, self._run.state, batch, self._mesh)
        index_UK, score_UK = self._candidates.top_k(users_UE, _TOP_K, batch)
        rank_U = self._candidates.ranks(users_UE, batch)
        again_U = returns(batch) & (rank_U == metrics.MISSED)
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
            rank = None if rank_U[n] == metrics.MISSED else int(rank_U[n]) + 1
            row = int(batch.row_U[n])
            again = bool(again_U[n])
            shown.append(ShownUser(file, row, len(events), events[-_EVENTS:], listed, rank, again))
        return shown

    def _events(self, batch: Histories, n: int) -> list[Event]:
        items = batch.items_of(n).tolist()
        if anything_held_out(self._config):
            items.append(int(batch.target_U[n]))
        # Of a split by time, the last event shown is the only one known to be held out.
        last = 1 if self._config.eval.split_at else self._config.eval.held_out
        events = []
        for back, index in zip(range(len(items), 0, -1), items, strict=True):
            kept_for = "held out" if back <= last else ""
            if last and back in (1, last):
                kept_for = "test" if back == 1 else "validation"
            events.append(Event(item_text(self._item, index) if index >= 0 else None, kept_for))
        return events
