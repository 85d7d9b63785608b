"""Which events training sees and which are to be found: the last of each row, or those from a time on.

Both protocols cut rows: training and histories see what comes before the cut, and the event after
it may be to be found. A split by time cuts a row before its first event at that time or later. What
follows stays unseen however early it claims to be, so that nothing leaks where the times of a row
step back. Events without a time go with those before them.

Items first seen after a split by time are not in the catalogue, and have no vectors that were
learned; users who go on with one are left out and counted (`eval/unknown_targets`).

Shapes: N rows of a record batch, P positions of the column of times, T times.
"""

import math
from fractions import Fraction
from typing import Literal, NamedTuple

import numpy as np
import pyarrow as pa

from s2s_jax.config import FeatureConfig
from s2s_jax.config.settings import Split
from s2s_jax.config.times import seconds_of
from s2s_jax.data.encoding import blocks, ids
from s2s_jax.data.logs import arrow
from s2s_jax.data.logs.arrow import Source
from s2s_jax.errors import UserError

SplitPart = Literal["validation", "test"]


class TimeCut(NamedTuple):
    """Before the first event at a time or later.

    Attributes:
      feature: whose column has the times.
      at: seconds since 1970.
    """

    feature: FeatureConfig
    at: Fraction


class Cut(NamedTuple):
    """Where each row ends; by default where it ends anyway.

    Attributes:
      last: events at the end of a row that come after the cut.
      time: cuts by time.
    """

    last: int = 0
    time: TimeCut | None = None

    @property
    def column_names(self) -> list[str]:
        """The columns that `kept` needs."""
        return [] if self.time is None else [self.time.feature.column_name]

    def kept(
        self, batch: pa.RecordBatch, lengths_N: np.ndarray, file: Source, first_row: int
    ) -> np.ndarray:
        """How many positions of each row come before the cut.

        Args:
          batch: rows with the columns of `column_names`.
          lengths_N: int64 positions of the rows.
          file: where they come from, for messages.
          first_row: number of their first row in the file, for messages.

        Returns:
          int64 `[N]`.

        Raises:
          UserError: a text is no time.
        """
        kept_N = np.maximum(lengths_N - self.last, 0)
        if self.time is None:
            return kept_N
        lists = batch.column(self.time.feature.column_name)
        there_N = arrow.list_lengths(lists)
        starts_N = blocks.starts(there_N)
        late_P = self._late(lists, starts_N, file, first_row)
        following_N = np.searchsorted(late_P, starts_N[:-1])
        first_N = np.append(late_P, starts_N[-1])[following_N] - starts_N[:-1]
        # The first late position after a row's start may be another row's.
        return np.where(first_N < there_N, np.minimum(first_N, kept_N), kept_N)

    def _late(
        self, lists: pa.Array, starts_N: np.ndarray, file: Source, first_row: int
    ) -> np.ndarray:
        """Positions at the time or later, rising."""
        assert self.time is not None, "asked for only with a time"
        feature, at = self.time
        values = lists.flatten()
        owner_T = np.arange(len(values))
        if arrow.is_list(values.type):
            owner_T = np.repeat(owner_T, arrow.list_lengths(values))
            values = values.flatten()
        if values.null_count:
            owner_T = owner_T[values.is_valid().to_numpy(zero_copy_only=False)]
            values = values.drop_null()
        try:
            times_T, per_second = ids.times(values, feature)
        except ids.NotANumberError as error:
            row = int(np.searchsorted(starts_N, owner_T[error.index], side="right")) - 1
            raise UserError(
                f"{file.path}: row {first_row + row}, column {feature.column_name}: expected a "
                f"time as a whole number (eval.time_feature is {feature.name}), found "
                f"{error.text}; write times as seconds since 1970"
            ) from error
        return owner_T[times_T >= math.ceil(at * per_second)]


class Targets(NamedTuple):
    """Which event of a row is to be found: the first after a cut, if it is before another cut.

    Attributes:
      history: ends the history of the row.
      until: nothing after it is to be found.
    """

    history: Cut
    until: Cut


def training_cut(split: Split | None) -> Cut:
    """What training sees of a row; with nothing held out, all of it."""
    if split is None:
        return Cut()
    if split.at is None:
        return Cut(split.events)
    return _at(split.at if split.validation_at is None else split.validation_at, split)


def catalogue_cut(split: Split) -> Cut:
    """Which events of a row make the items that are ranked.

    All of them where the last events are held out; in a split by time, those that training sees, since
    nothing is known of later ones.
    """
    return Cut() if split.at is None else training_cut(split)


def targets(split: Split, part: SplitPart) -> Targets:
    """The events that are to be found.

    Raises:
      UserError: none are held out.
    """
    if split.at is None:
        if split.events < 1:
            raise UserError(
                "eval.held_out: expected at least 1, the events at the end of each row that "
                "training does not see, or a time as eval.split_at, found 0; train with "
                "eval.held_out 2 and evaluate that run"
            )
        return Targets(Cut(1 if part == "test" else split.events), Cut())
    if part == "test":
        return Targets(_at(split.at, split), Cut())
    if split.validation_at is None:
        raise UserError(
            f"eval.validation_at: expected a time before eval.split_at ({split.at}) "
            f"because validation events are asked for, found None; train with one, or evaluate the "
            f"test events"
        )
    return Targets(_at(split.validation_at, split), _at(split.at, split))


def check_times(file: Source, split: Split | None) -> None:
    """Refuses a file whose column of times has none, if rows are split by time.

    Args:
      file: has the columns of all features.
      split: of its rows.

    Raises:
      UserError: naming file and column.
    """
    if split is None or split.feature is None:
        return
    feature = split.feature
    column_type = file.schema.field(feature.column_name).type
    if not ids.accepted(arrow.leaf_type(column_type), "time_gap"):
        raise UserError(
            f"{file.path}: column {feature.column_name}: expected list<T> or list<list<T>> of "
            f"times (eval.time_feature is {feature.name}), found {column_type}"
        )


def _at(text: str, split: Split) -> Cut:
    assert split.feature is not None, "asked for only where rows are split by time"
    return Cut(time=TimeCut(split.feature, seconds_of(text)))
