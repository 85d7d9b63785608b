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
from s2s_jax.data.batching.encoding_shapes import stretches
from s2s_jax.data.batching.histories import Histories, HistoryEncoder
from s2s_jax.data.items.catalogue import Catalogue
from s2s_jax.data.items.neighbours import Scorer
from s2s_jax.ranking.answers import Answerer, By, ByCounts, ByModel
from s2s_jax.ranking.candidates import Candidates
from s2s_jax.ranking.encode import UserEncoder, shapes_for
from s2s_jax.ranking.restored import Restored
from s2s_serve.encoding import plain_histories
from s2s_serve.encoding.item_numbers import ItemNumbers
from s2s_serve.encoding.plain_histories import HistorySource

# Possible numbers of users per device in a batch, besides the maximum.
_SIZES = (4, 32)


class Recommendations(NamedTuple):
    """Recommended items for each history, best first.

    Attributes:
      items: a list of at most k ids for each history, as stored in the log.
      scores: their similarities (see `loss.similarity`) with the predicted next event; of histories that
        neighbours answer, their counts, and 0 for items without a count.
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
        self._kinds, self._shown, self._width = run.kinds, shown, width
        sizes = [*(size for size in _SIZES if size < batch_size), batch_size]
        self._sizes = [size * mesh.size for size in sizes]
        shapes = shapes_for(shown.seq_len, batch_size, mesh)
        self._many = UserEncoder(run.functions, run.state, shapes, mesh)
        # Batches of few histories are smaller, because most of a large one would be padding.
        positions = min(shapes.positions, sizes[0] * shown.seq_len)
        small = shapes._replace(positions=positions)
        self._few = UserEncoder(run.functions, run.state, small, mesh)
        self._numbers: ItemNumbers | None = None
        self._catalogue: Catalogue | None = None
        self._candidates: Candidates | None = None
        self._counted: tuple[Scorer, np.ndarray] | None = None

    @property
    def has_items(self) -> bool:
        """Whether there are items to rank."""
        return self._catalogue is not None

    def set_items(self, catalogue: Catalogue) -> None:
        """Sets the items to rank."""
        self._numbers = ItemNumbers(catalogue.ids[self._shown.items.item.name])
        self._catalogue = catalogue

    @property
    def has_candidates(self) -> bool:
        """Whether histories can be answered by the model."""
        return self._candidates is not None

    def set_candidates(self, candidates: Candidates) -> None:
        """Sets the vectors of the items, with which the model answers."""
        self._candidates = candidates

    @property
    def has_counts(self) -> bool:
        """Whether histories can be answered by counts."""
        return self._counted is not None

    def set_counts(self, scorer: Scorer, count_I: np.ndarray) -> None:
        """Sets what answers histories by counts.

        Args:
          scorer: scores the same items by their counts as neighbours.
          count_I: int64, number of events of each item.
        """
        self._counted = scorer, count_I

    def encode(self, histories: plain_histories.Histories) -> np.ndarray:
        """f32 `[N, E]`: vectors to compare with items' vectors; zeros for histories without events."""
        rows = self._rows(histories)
        vectors_NE = np.zeros((rows.num_rows, self._width), np.float32)
        encoder = self._encoder_of(rows)
        for stretch in stretches(self._batches(rows, with_empty=False), encoder.shapes):
            for batch, encoded in zip(stretch, encoder.encode(stretch), strict=True):
                vectors_NE[batch.row_U] = encoded.users_UE[: batch.users]
        return vectors_NE

    def recommend(
        self,
        histories: plain_histories.Histories,
        k: int,
        keep_seen: bool,
        by: By,
        short_history: int,
    ) -> Recommendations:
        """The best k items for each history.

        Args:
          histories: N histories.
          k: K, at least 1.
          keep_seen: whether to recommend items of the history too.
          by: what ranks the items; "model" needs `set_candidates`, "neighbours" `set_counts`.
          short_history: histories of fewer events are answered by neighbours, and those without events
            by popularity, which needs `set_counts`; 0: those without events have no items.
        """
        assert self._catalogue is not None, "`set_items` was called"
        rows = self._rows(histories)
        answerer = self._answerer(self._encoder_of(rows), keep_seen, by, short_history)
        found = Recommendations(
            [[] for _ in range(rows.num_rows)], [[] for _ in range(rows.num_rows)]
        )
        batches = self._batches(rows, with_empty=short_history > 0)
        for batch, answers in answerer.answers(batches, min(k, max(len(self._catalogue.item), 1))):
            best = answers.lists
            there_UK = best.index_UK[: batch.users] >= 0
            items = self._catalogue.item.take(pa.array(best.index_UK[: batch.users][there_UK]))
            listed, begin = items.to_pylist(), 0
            scores = best.score_UK[: batch.users][there_UK].tolist()
            for row, count in zip(batch.row_U.tolist(), there_UK.sum(axis=1).tolist(), strict=True):
                found.items[row] = listed[begin : begin + count]
                found.scores[row] = scores[begin : begin + count]
                begin += count
        return found

    def _encoder_of(self, rows: pa.RecordBatch) -> UserEncoder:
        return self._few if rows.num_rows <= self._sizes[0] else self._many

    def _answerer(
        self, encoder: UserEncoder, keep_seen: bool, by: By, short_history: int
    ) -> Answerer:
        model, counts = None, None
        if by == "model":
            assert self._candidates is not None, "`set_candidates` was called"
            candidates = self._candidates.filtering(not keep_seen)
            model = ByModel(encoder, candidates)
        if by == "neighbours" or short_history > 0:
            assert self._counted is not None, "`set_counts` was called"
            scorer, count_I = self._counted
            if model is not None:
                count_I = model.candidates.counts_of_ranked(count_I)
            counts = ByCounts(scorer, count_I, filter_seen=not keep_seen)
        return Answerer(model, counts, short_history)

    def _rows(self, histories: plain_histories.Histories) -> pa.RecordBatch:
        return plain_histories.to_rows(histories, self._shown.decoded, self._kinds)

    def _batches(self, rows: pa.RecordBatch, with_empty: bool) -> Iterator[Histories]:
        """The histories, only those with events unless `with_empty`; `row_U` are their numbers."""
        encoder = HistoryEncoder(self._shown, self._numbers, with_empty)
        encoded = encoder.encode(rows, HistorySource(rows.schema), 0, 0, None)
        begin, users = 0, len(encoded.row_N)
        while begin < users:
            # At most half of a batch is padding, unless it has the smallest size.
            fitting = [size for size in self._sizes if size <= 2 * (users - begin)]
            size = max(fitting, default=self._sizes[0])
            stop = min(begin + size, users)
            yield encoder.batch([encoded.part(begin, stop)], size)
            begin = stop
