"""Recommends items for one stripe of a log after another.

Shapes: U users, K items of a list.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from s2s_jax.data.batching.histories import Histories, HistoryReader
from s2s_jax.data.logs import orc
from s2s_jax.data.logs.index import FileIndex
from s2s_jax.errors import UserError
from s2s_jax.ranking.answers import ANSWERED_BY, Answerer, Answers


class UserColumn(NamedTuple):
    """The column with user ids.

    Attributes:
      name: name of the column.
      type: the type of its values in the output.
    """

    name: str
    type: pa.DataType


class StripeRecommender:
    """Recommends items for one stripe after another."""

    def __init__(
        self,
        answerer: Answerer,
        reader: HistoryReader,
        index: FileIndex,
        item: pa.Array,
        users: UserColumn | None,
        top_k: int,
        tells_by: bool,
    ):
        """Prepares recommending.

        Args:
          answerer: ranks the items for the users.
          reader: the reader of the histories.
          index: the index of the log that it reads.
          item: the ids of the items that are ranked, as stored in the log.
          users: the column with user ids; None: rows are identified by file and number.
          top_k: K.
          tells_by: whether there is a column that says what answered.
        """
        self._answerer, self._reader, self._index = answerer, reader, index
        self._item, self._users, self._top_k = item, users, top_k
        self._tells_by = tells_by

    def recommend(self, stripes: Iterable[int]) -> Iterator[tuple[int, pa.Table, Counter[str]]]:
        """Yields each stripe when it is complete.

        Args:
          stripes: numbers of stripes, ascending.

        Yields:
          The number of the stripe; the table for its rows that have a history; and its counts, see
          `Recommended.counts`.
        """
        left = list(stripes)
        # A batch may have users of several stripes. A stripe is complete when a later one has begun.
        begun: list[_Part] = []
        read = self._reader.read_all(tuple(left), None)
        for batch, answers in self._answerer.answers(read, self._top_k):
            begun += self._one_batch(batch, answers)
            while left and left[0] < begun[-1].stripe:
                yield left[0], *self._table(left[0], begun)
                begun = [part for part in begun if part.stripe > left[0]]
                del left[0]
        for stripe in left:
            yield stripe, *self._table(stripe, begun)

    def _table(self, stripe: int, parts: Iterable["_Part"]) -> tuple[pa.Table, Counter[str]]:
        """Joins the parts of a stripe."""
        mine = [part for part in parts if part.stripe == stripe]
        try:
            columns = self._names_of_users(stripe, mine)
        except UserError as error:
            if not self._reader.skip(stripe, error):
                raise
            mine = []
            columns = self._names_of_users(stripe, mine)
        kinds = {"items": pa.list_(self._item.type), "scores": pa.list_(pa.float32())}
        kinds |= {"by": pa.string()} if self._tells_by else {}
        for field, kind in kinds.items():
            chunks = [part.columns[field] for part in mine]
            columns[field] = pa.concat_arrays(chunks) if chunks else pa.array([], kind)
        counts: Counter[str] = sum((part.counts for part in mine), Counter())
        if stripe in self._reader.skipped:
            counts["skipped_rows"] = self._index.stripe_rows[stripe]
        return pa.table(columns), counts

    def _names_of_users(self, stripe: int, parts: Sequence["_Part"]) -> dict[str, pa.Array]:
        """The columns that say whose the rows of a stripe are."""
        file, number, first_row = self._index.stripes[stripe]
        row = np.concatenate([np.zeros(0, np.int64), *(part.row_U for part in parts)])
        if self._users is None:
            paths = pa.array([str(file.path)] * len(row), pa.string())
            return {"file": paths.dictionary_encode(), "row": pa.array(row)}
        if not len(row):
            # The stripe may have been skipped because it cannot be read.
            return {self._users.name: pa.array([], self._users.type)}
        users = orc.read_stripe(file, number, [self._users.name]).column(0)
        return {self._users.name: users.take(pa.array(row - first_row)).cast(self._users.type)}

    def _one_batch(self, batch: Histories, answers: Answers) -> list["_Part"]:
        """The items for the users of a batch; there is one part for each stripe."""
        best = answers.lists
        there_UK, by_U = best.index_UK >= 0, answers.by_U[: batch.users]
        trained_I = self._answerer.trained_I
        untrained_UK = False if trained_I is None else ~trained_I[best.index_UK]
        counted_U = {
            "users": np.ones(batch.users, np.int64),
            "not_in_catalogue": (batch.events_U - batch.known_events())[: batch.users],
            "without_row": answers.unknown_U[: batch.users],
            "shown": batch.shown_U[: batch.users] * (by_U == 0),
            "untrained": (there_UK & untrained_UK).sum(axis=1),
            **{f"by_{name}": by_U == number for number, name in enumerate(ANSWERED_BY)},
        }
        parts = []
        begins = np.flatnonzero(np.diff(batch.stripe_U, prepend=-1))
        for begin, stop in zip(begins, [*begins[1:], batch.users], strict=True):
            of = slice(begin, stop)
            items = self._item.take(pa.array(best.index_UK[of][there_UK[of]]))
            scores = pa.array(best.score_UK[of][there_UK[of]])
            ends = np.concatenate([[0], np.cumsum(there_UK[of].sum(axis=1))]).astype(np.int32)
            columns = {
                name: pa.ListArray.from_arrays(pa.array(ends), values)
                for name, values in (("items", items), ("scores", scores))
            }
            columns["by"] = pa.array(np.take(ANSWERED_BY, by_U[of]), pa.string())
            counts = Counter({name: int(count_U[of].sum()) for name, count_U in counted_U.items()})
            parts.append(_Part(int(batch.stripe_U[begin]), batch.row_U[of], columns, counts))
        return parts


class _Part(NamedTuple):
    """The users of a batch who are in one stripe.

    Attributes:
      stripe: the number of the stripe.
      row_U: int64, the row of each user in the file.
      columns: "items" and "scores", a list for each user, and "by", what answered.
      counts: sums over the users, see `recommend.Recommended.counts`.
    """

    stripe: int
    row_U: np.ndarray
    columns: dict[str, pa.Array]
    counts: Counter[str]
