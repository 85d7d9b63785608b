"""A restored checkpoint that encodes histories in memory and ranks items for them.

Batches have one of a few sizes, so that few programs are compiled for any number of histories.

Shapes: N histories, U users of a batch, E width, K items of a list.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from jax.sharding import Mesh

from s2s_jax.config.settings import ShownHistory
from s2s_jax.data.batching.histories import Histories, HistoryEncoder
from s2s_jax.data.items.catalogue import Catalogue
from s2s_jax.data.items.item_numbers import ItemNumbers
from s2s_jax.library import plain_histories
from s2s_jax.library.plain_histories import HistorySource
from s2s_jax.ranking.candidates import Candidates
from s2s_jax.ranking.encode import user_vectors
from s2s_jax.ranking.restored import Restored

# Possible numbers of users per device in a batch, besides the maximum.
_SIZES = (4, 32)


class Recommendations(NamedTuple):
    """Recommended items for each history, best first.

    Attributes:
      items: a list of at most k ids for each history, as stored in the log.
      scores: their similarities (see `loss.similarity`) with the predicted next event.
    """

    items: list[list]
    scores: list[list[float]]


class Ranker:
    """Encodes histories, and ranks the items of a catalogue for them."""

    def __init__(self, run: Restored, shown: ShownHistory, width: int, batch_size: int, mesh: Mesh):
        """Prepares encoding.

        Args:
          run: the restored checkpoint.
          shown: the part of a history that the model sees.
          width: E.
          batch_size: the maximum number of users per device in a batch.
          mesh: the devices on which the checkpoint was restored.
        """
        self._run, self._shown, self._width, self._mesh = run, shown, width, mesh
        sizes = [*(size for size in _SIZES if size < batch_size), batch_size]
        self._sizes = [size * mesh.size for size in sizes]
        self._encoder = HistoryEncoder(shown, None)
        self._catalogue: Catalogue | None = None
        self._candidates: Candidates | None = None

    @property
    def has_items(self) -> bool:
        """Whether there are items to rank."""
        return self._catalogue is not None

    def set_items(self, catalogue: Catalogue, candidates: Candidates) -> None:
        """Sets the items to rank.

        Args:
          catalogue: the items.
          candidates: the same items with their vectors.
        """
        numbers = ItemNumbers(catalogue.ids[self._shown.items.item.name])
        self._encoder = HistoryEncoder(self._shown, numbers)
        self._catalogue, self._candidates = catalogue, candidates

    def encode(self, histories: plain_histories.Histories) -> np.ndarray:
        """f32 `[N, E]`: vectors to compare with items' vectors; zeros for histories without events."""
        rows = self._rows(histories)
        vectors_NE = np.zeros((rows.num_rows, self._width), np.float32)
        for batch in self._batches(rows):
            users_UE, _ = user_vectors(self._run.functions, self._run.state, batch, self._mesh)
            vectors_NE[batch.row_U] = np.asarray(users_UE)[: batch.users]
        return vectors_NE

    def recommend(
        self, histories: plain_histories.Histories, k: int, keep_seen: bool | None
    ) -> Recommendations:
        """The best k items for each history; no items for histories without events.

        Args:
          histories: N histories.
          k: K, at least 1.
          keep_seen: whether to recommend items of the history too; None: only if `eval.filter_seen`
            is False.
        """
        assert self._catalogue is not None, "`set_items` was called"
        assert self._candidates is not None, "`set_items` was called"
        candidates = self._candidates
        if keep_seen is not None:
            candidates = candidates.filtering(not keep_seen)
        rows = self._rows(histories)
        found = Recommendations(
            [[] for _ in range(rows.num_rows)], [[] for _ in range(rows.num_rows)]
        )
        for batch in self._batches(rows):
            users_UE, _ = user_vectors(self._run.functions, self._run.state, batch, self._mesh)
            best = candidates.top_k(users_UE, k, batch)
            there_UK = best.index_UK[: batch.users] >= 0
            items = self._catalogue.item.take(pa.array(best.index_UK[: batch.users][there_UK]))
            listed, begin = items.to_pylist(), 0
            scores = best.score_UK[: batch.users][there_UK].tolist()
            for row, count in zip(batch.row_U.tolist(), there_UK.sum(axis=1).tolist(), strict=True):
                found.items[row] = listed[begin : begin + count]
                found.scores[row] = scores[begin : begin + count]
                begin += count
        return found

    def _rows(self, histories: plain_histories.Histories) -> pa.RecordBatch:
        return plain_histories.to_rows(histories, self._shown.items.features, self._run.kinds)

    def _batches(self, rows: pa.RecordBatch) -> Iterator[Histories]:
        """The histories that have events; `row_U` are their numbers."""
        encoded = self._encoder.encode(rows, HistorySource(rows.schema), 0, 0, None)
        begin, users = 0, len(encoded.row_N)
        while begin < users:
            # At most half of a batch is padding, unless it has the smallest size.
            fitting = [size for size in self._sizes if size <= 2 * (users - begin)]
            size = max(fitting, default=self._sizes[0])
            stop = min(begin + size, users)
            yield self._encoder.batch([encoded.part(begin, stop)], size)
            begin = stop
