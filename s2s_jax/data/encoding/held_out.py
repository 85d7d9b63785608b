"""Splits events into those that training sees and targets.

Targets are the last events of each row, or the events from some time on.

Both splits cut rows: training and histories see the events before the cut, and the event after it may be
a target. A split by time cuts a row before its first event at or after that time. All later events stay
unseen, even with earlier times, so that nothing leaks where the times of a row step back. Events
without a time belong to the events before them.

Items that first occur after a split by time are not in the catalogue, and have no trained vectors. Users
whose target is such an item are left out and counted (`eval/unknown_targets`).

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
from s2s_jax.errors import UserError
from s2s_serve.encoding import arrow, blocks, ids
from s2s_serve.encoding.arrow import Source

SplitPart = Literal["validation", "test"]


class TimeCut(NamedTuple):
    """A cut before the first event at or after a time.

    Attributes:
      feature: the feature whose column has the times.
      at: seconds since 1970.
    """

    feature: FeatureConfig
    at: Fraction


class Cut(NamedTuple):
    """Where rows are cut; by default at their end.

    Attributes:
      last: number of events at the end of a row that come after the cut.
      time: the cut by time; None: rows are not cut by time.
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
        """The number of positions of each row before the cut.

        Args:
          batch: rows with the columns of `column_names`.
          lengths_N: int64, positions of each row.
          file: source of the rows, for messages.
          first_row: number of the first row in the file, for messages.

        Returns:
          int64 `[N]`.

        Raises:
          UserError: a text is not a time.
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
        # The first late position after the start of a row may belong to another row.
        return np.where(first_N < there_N, np.minimum(first_N, kept_N), kept_N)

    def _late(
        self, lists: pa.Array, starts_N: np.ndarray, file: Source, first_row: int
    ) -> np.ndarray:
        """Positions at or after the time, ascending."""
        assert self.time is not None, "called only for a cut by time"
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
                f"time as a whole number (eval.split.feature is {feature.name}), found "
                f"{error.text}; write times as seconds since 1970"
            ) from error
        return owner_T[times_T >= math.ceil(at * per_second)]


class Targets(NamedTuple):
    """Defines the target event of a row: the first one after a cut, if it is before another cut.

    Attributes:
      history: the cut that ends the history of the row.
      until: the target must be before this cut.
    """

    history: Cut
    until: Cut


def training_cut(split: Split | None) -> Cut:
    """The cut before which training sees a row; at its end if nothing is held out."""
    if split is None:
        return Cut()
    if split.at is None:
        return Cut(split.events)
    return _cut_at(split.at if split.validation_at is None else split.validation_at, split)


def catalogue_cut(split: Split) -> Cut:
    """The cut before which events count for the catalogue of ranked items.

    If the last events are held out, all events count. With a split by time, only those that training
    sees count, since nothing is known about later items.
    """
    return Cut() if split.at is None else training_cut(split)


def targets(split: Split, part: SplitPart) -> Targets:
    """The target events of a split.

    Raises:
      UserError: no events are held out for it.
    """
    if split.at is None:
        if split.events < 1:
            raise UserError(
                "eval.split: expected last_events or by_time, because there must be held-out events to "
                "evaluate, found none; train with eval.split last_events and evaluate that run"
            )
        return Targets(Cut(1 if part == "test" else split.events), Cut())
    if part == "test":
        return Targets(_cut_at(split.at, split), Cut())
    if split.validation_at is None:
        raise UserError(
            f"eval.split.validation_at: expected a time before eval.split.at ({split.at}) "
            f"because validation events are asked for, found None; train with one, or evaluate the "
            f"test events"
        )
    return Targets(_cut_at(split.validation_at, split), _cut_at(split.at, split))


def check_times(file: Source, split: Split | None) -> None:
    """Refuses a file whose time column does not have times, if rows are split by time.

    Args:
      file: a file with the columns of all features.
      split: the split; None: there is none.

    Raises:
      UserError: the file is refused; the message names the file and the column.
    """
    if split is None or split.feature is None:
        return
    feature = split.feature
    column_type = file.schema.field(feature.column_name).type
    if not ids.accepted(arrow.leaf_type(column_type), "time_gap"):
        raise UserError(
            f"{file.path}: column {feature.column_name}: expected list<T> or list<list<T>> of "
            f"times (eval.split.feature is {feature.name}), found {column_type}"
        )


def _cut_at(text: str, split: Split) -> Cut:
    """The cut of a split by time before a time of the configuration."""
    assert split.feature is not None, "called only for a split by time"
    return Cut(time=TimeCut(split.feature, seconds_of(text)))
