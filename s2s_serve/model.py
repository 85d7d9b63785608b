"""A loaded export, which answers what users will do next.

Shapes: N histories, P events, I items, K items of a list, E width.
"""

import operator
import os
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa

from s2s_serve.encoder import Encoded, Encoder
from s2s_serve.encoding.plain_histories import Histories
from s2s_serve.errors import UnknownItemError, UserError
from s2s_serve.items import Items
from s2s_serve.manifest import Manifest
from s2s_serve.neighbours import Neighbours
from s2s_serve.search.searcher import Asked, Search, Searcher
from s2s_serve.storage.address import StorePath, place_of
from s2s_serve.storage.scratch import Scratch
from s2s_serve.tables import Table
from s2s_serve.tower import Tower
from s2s_serve.versions import copied, current_version, open_version

# Maximum numbers of histories, and of their items with a count, that are ranked together.
_MOST_USERS = 64
_MOST_SCORES = 2**20


class Recommendation(NamedTuple):
    """The recommended items for one history.

    Attributes:
      items: ids as in the log, best first; fewer than k if no more items may be recommended.
      scores: their similarities with the predicted next event, plus what counted neighbours add; the
        number of events of each item, if popularity answered.
      unknown: number of events, among the newest that the model sees, whose item it has never seen; see
        `Encoded.unknown_N`.
      by: what answered: "model", or "popularity" if the history has no events.
    """

    items: list
    scores: list[float]
    unknown: int
    by: Literal["model", "popularity"]


class Similar(NamedTuple):
    """The items with the most similar vectors.

    Attributes:
      items: ids as in the log, the most similar first.
      scores: the cosines of their vectors with that of the item.
    """

    items: list
    scores: list[float]


def load(
    directory: str | os.PathLike[str] | StorePath,
    *,
    version: int | None = None,
    search: Search = "auto",
    check: Literal["all", "sizes"] = "all",
    threads: int | None = None,
) -> "Model":
    """Loads an export.

    Args:
      directory: the directory of the export, which `s2s export --output` made. From an address such as
        `s3://bucket/shop`, the version is copied to a temporary directory as long as the model exists.
      version: the number of a version; None: the newest, which `current.json` names.
      search: how items are searched: "exact" compares all; "index" is approximate and faster; "auto"
        uses the index if there are many items.
      check: whether the contents of all files are compared with their checksums, or only their sizes.
      threads: the number of threads that encode the histories of one call; None: one for each core.

    Raises:
      UserError: there is no such export, or it is broken or of a newer format.
    """
    if search not in ("auto", "exact", "index"):
        raise UserError(f"search: expected auto, exact or index, found {search!r}")
    if check not in ("all", "sizes"):
        raise UserError(f"check: expected all or sizes, found {check!r}")
    if not isinstance(directory, str | os.PathLike | StorePath):
        raise UserError(f"directory: expected a path, found {directory!r:.60}")
    for name, number in (("version", version), ("threads", threads)):
        if number is not None and (not isinstance(number, int) or number < 1):
            raise UserError(f"{name}: expected a whole number of at least 1, found {number!r:.60}")
    place, copy = place_of(directory), None
    if isinstance(place, StorePath):
        version = current_version(place) if version is None else version
        copy = copied(place, version)
        place = copy.path
    model = Model(*open_version(place, version, check), search, threads)
    # Its files are needed as long as the model.
    model._copy = copy
    return model


class Model:
    """A loaded export; its methods may be called from several threads."""

    def __init__(self, directory: Path, manifest: Manifest, search: Search, threads: int | None):
        """Opens the files of a version, which `open_version` has checked."""
        self._copy: Scratch | None = None
        self._manifest = manifest
        self._items = Items(directory, manifest)
        tables = {name: Table(directory, entry) for name, entry in manifest.tables.items()}
        self._encoder = Encoder(
            tables,
            Tower(directory, manifest.width, threads),
            manifest.decoded,
            manifest.kinds,
            manifest.item,
            manifest.shown_len,
            manifest.width,
        )
        self._neighbours = None
        if manifest.neighbours:
            self._neighbours = Neighbours(
                directory, manifest.items, manifest.neighbours, manifest.temperature
            )
        self._searcher = Searcher(directory, manifest, self._items, search)
        # Equally popular items keep their order.
        self._popular_I = np.argsort(-self._items.count_I, kind="stable")

    def __repr__(self) -> str:
        return f"Model(version={self.version}, items={len(self._items):,})"

    @property
    def version(self) -> int:
        """The number of the version."""
        return self._manifest.version

    @property
    def features(self) -> tuple[str, ...]:
        """The columns of a history."""
        return tuple(dict.fromkeys(f.column_name for f in self._manifest.decoded))

    @property
    def items(self) -> pa.Table:
        """The items: `item`, `count`, `trained` and the columns of the catalogue and of the titles."""
        found = self._items
        own = {"item": found.ids, "count": pa.array(found.count_I)}
        return pa.table(own | {"trained": pa.array(found.trained_I)} | found.columns)

    @property
    def card(self) -> dict[str, Any]:
        """What the model is and how good it is, for people; JSON can hold all of it."""
        manifest = self._manifest
        index = manifest.index
        return {
            "version": manifest.version,
            "created": manifest.created,
            "made_by": manifest.made_by,
            "step": manifest.step,
            "evaluation": _main_figures(manifest.evaluation),
            "items": manifest.items,
            "item_columns": list(self._items.columns),
            "features": [
                {
                    "column": f.column_name,
                    "name": f.name,
                    "op": f.op,
                    "bag_size": f.bag_size,
                    "kind": manifest.kinds[f.name] if f.name in manifest.kinds else None,
                }
                for f in manifest.decoded
            ],
            "item_feature": manifest.item.column_name,
            "events_seen": manifest.shown_len,
            "filter_seen": manifest.filter_seen,
            "similarity": manifest.similarity,
            "neighbours": manifest.neighbours,
            "search": self._searcher.name,
            "index_recall": {} if index is None else index.recall,
        }

    def encode(self, histories: Histories) -> np.ndarray:
        """The vectors of users, which are compared with those of items.

        Args:
          histories: N histories, see `recommend`.

        Returns:
          f32 `[N, E]`; zeros for a history without events.

        Raises:
          UserError: a history cannot be read.
        """
        return self._encoder.encode(histories, self._items.numbers).users_NE

    def recommend(
        self,
        histories: Histories,
        k: int = 10,
        exclude: Collection[Any] | None = None,
        allow: Collection[Any] | None = None,
        where: Mapping[str, Collection[Any]] | None = None,
        keep_seen: bool | None = None,
    ) -> list[Recommendation]:
        """Recommends the most likely next items for each history.

        Args:
          histories: a list of `{column: list of entries}`, oldest event first. An entry is an id as
            stored in the log, a list of ids, or None for no id. All lists of a history have the same
            length, or are empty. May also be an Arrow table with such columns.
          k: number of items for each history.
          exclude: items that are not recommended; unknown ones are ignored.
          allow: the only items that may be recommended; None: all.
          where: for each column of the items, the allowed values; see `items`.
          keep_seen: whether to recommend items of the history too; None: as in the run's evaluation.

        Returns:
          One `Recommendation` for each history. A history without events gets the most popular items.

        Raises:
          UserError: a history, k or a rule is wrong.
        """
        k = _checked(k)
        if keep_seen is not None and not isinstance(keep_seen, bool):
            raise UserError(f"keep_seen: expected True, False or None, found {keep_seen!r:.60}")
        allowed_I = self._allowed(exclude, allow, where)
        encoded = self._encoder.encode(histories, self._items.numbers)
        keep_seen = not self._manifest.filter_seen if keep_seen is None else keep_seen
        found: list[Recommendation | None] = [None] * len(encoded.events_N)
        for rows, part in self._parts(encoded):
            best = self._searcher.top_k(self._asked(part, keep_seen, allowed_I), k)
            for row, item_K, score_K in zip(rows, best.item_UK, best.score_UK, strict=True):
                there_K = item_K >= 0
                ids = self._items.ids.take(pa.array(item_K[there_K])).to_pylist()
                unknown = int(encoded.unknown_N[row])
                found[row] = Recommendation(ids, score_K[there_K].tolist(), unknown, "model")
        popular = None
        if not encoded.events_N.all():
            popular = self._popular(k, allowed_I)
        return [popular if each is None else each for each in found]  # pyright: ignore

    def similar(self, item: Any, k: int = 10) -> Similar:
        """The items whose vectors are the most similar to that of an item.

        Args:
          item: an id as stored in the log.
          k: number of items.

        Raises:
          UnknownItemError: there is no such item.
          UserError: the id is of another kind, or k is below 1.
        """
        k = _checked(k)
        number = int(self._items.numbers_of([item], "item")[0])
        if number < 0:
            raise UnknownItemError(
                f"item: expected one of the {len(self._items):,} items of the export, found {item!r:.60}"
            )
        item_K, score_K = self._searcher.similar(number, k)
        return Similar(self._items.ids.take(pa.array(item_K)).to_pylist(), score_K.tolist())

    def _parts(self, encoded: Encoded) -> Iterator[tuple[np.ndarray, Encoded]]:
        """Yields the histories that have events: few at a time, so that their scores fit into memory."""
        (rows,) = np.nonzero(encoded.events_N)
        events_U = encoded.events_N[rows]
        scores_U = np.zeros(len(rows), np.int64)
        if self._neighbours is not None:
            scores_U = self._neighbours.most_scores(encoded.item_P, events_U)
        ends_U, scored_U = np.cumsum(events_U), np.cumsum(scores_U)
        begin = 0
        while begin < len(rows):
            before = scored_U[begin] - scores_U[begin]
            fitting = int(np.searchsorted(scored_U, before + _MOST_SCORES, side="right"))
            stop = min(max(fitting, begin + 1), begin + _MOST_USERS)
            chosen = rows[begin:stop]
            first = ends_U[begin] - events_U[begin]
            part = Encoded(
                encoded.users_NE[chosen],
                encoded.events_N[chosen],
                encoded.item_P[first : ends_U[min(stop, len(rows)) - 1]],
                encoded.unknown_N[chosen],
            )
            yield chosen, part
            begin = stop

    def _asked(self, encoded: Encoded, keep_seen: bool, allowed_I: np.ndarray | None) -> Asked:
        """Return what is searched for histories that have events."""
        events_U = encoded.events_N
        user_P = np.repeat(np.arange(len(events_U)), events_U)
        neighbours = self._neighbours
        biased = None if neighbours is None else neighbours.bias(encoded.item_P, events_U)
        known_P = encoded.item_P >= 0
        seen = np.unique(user_P[known_P] * len(self._items) + encoded.item_P[known_P])
        left_out = np.divmod(seen[: 0 if keep_seen else None], len(self._items))
        return Asked(encoded.users_NE, left_out, biased, allowed_I)

    def _allowed(
        self,
        exclude: Collection[Any] | None,
        allow: Collection[Any] | None,
        where: Mapping[str, Collection[Any]] | None,
    ) -> np.ndarray | None:
        """Return bool `[I]`: the items that may be recommended to anyone; None: all."""
        if exclude is None and allow is None and where is None:
            return None
        allowed_I = np.ones(len(self._items), bool)
        if where is not None:
            allowed_I = self._items.where(where)
        if allow is not None:
            number = self._items.numbers_of(allow, "allow")
            listed_I = np.zeros(len(self._items), bool)
            listed_I[number[number >= 0]] = True
            allowed_I &= listed_I
        if exclude is not None:
            number = self._items.numbers_of(exclude, "exclude")
            allowed_I[number[number >= 0]] = False
        return allowed_I

    def _popular(self, k: int, allowed_I: np.ndarray | None) -> Recommendation:
        """Return the most popular items that may be recommended."""
        popular_I = self._popular_I
        ranked_I = self._searcher.ranked_I[popular_I]
        if allowed_I is not None:
            ranked_I &= allowed_I[popular_I]
        number = popular_I[ranked_I][:k]
        ids = self._items.ids.take(pa.array(number)).to_pylist()
        scores = self._items.count_I[number].astype(np.float64).tolist()
        return Recommendation(ids, scores, 0, "popularity")


def _checked(k: int) -> int:
    """Return k as a Python number."""
    try:
        number = operator.index(k)
    except TypeError:
        number = 0
    if number < 1 or isinstance(k, bool):
        raise UserError(f"k: expected a whole number of at least 1, found {k!r:.60}")
    return number


def _main_figures(evaluation: dict[str, float]) -> dict[str, float]:
    """Return the figures of all users; the others are about parts of them, or about baselines."""
    return {name: x for name, x in evaluation.items() if name.count("/") == 1}
