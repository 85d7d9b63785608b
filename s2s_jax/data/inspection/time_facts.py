"""Facts about the times of a column: their range as dates, and whether rows are sorted by time.

Shapes: N rows of a stripe, T times.
"""

import re
import time

import numpy as np
import pyarrow as pa

from s2s_jax.config import FeatureConfig
from s2s_jax.config.times import date_text
from s2s_jax.data.inspection.assumptions import Assumptions
from s2s_jax.data.inspection.columns import share
from s2s_serve.encoding import arrow, ids

_UNITS = ("s", "ms", "us", "ns")
_SORT = "s2s convert LOG --format orc --merge --output DIR"
_TIME_OPS = ("time_gap", "hour_of_day", "day_of_week")
_NAME = re.compile(r"(^|_)(time|timestamp|ts|date|datetime)(_?(s|ms|us|ns|utc|unix))?$|_at$", re.I)
# 1990: events are rarely older, and times read in a wrong unit are rarely newer.
_PLAUSIBLE_FROM = 631_152_000
_YEAR = 31_556_952
# If more than this share of the rows is in reverse order, the log is taken to be newest first.
_NEARLY_ALL = 0.9
# A unit is plausible if this share of the times are plausible dates in it: logs have a few wrong ones.
_MOST_TIMES = 0.95


class TimeFacts:
    """Range and order of the times in a list column.

    Attributes:
      column: name of the column.
    """

    def __init__(self, column: str, unit: str | None, now: float | None = None):
        """Starts with nothing.

        Args:
          column: name of the column.
          unit: the unit of times that are numbers or texts; None: unknown, so it is guessed.
          now: the current time, in seconds since 1970; None: the time of the clock.
        """
        self.column = column
        self._unit = unit
        self._now = time.time() if now is None else now
        self._is_number = True
        self._per_second = 1
        self._times = self._not_positive = 0
        self._in_unit: dict[str, int] = dict.fromkeys(_UNITS, 0)
        self._first: int | None = None
        self._last: int | None = None
        self._rows = self._falling = self._reversed = self._rising = 0

    def add(self, lists: pa.Array) -> None:
        """Counts the rows of a list column of any type that `accepted` allows.

        Once a text is not a time, the column is no longer counted.
        """
        row_T, values = _times_by_row(lists)
        if pa.types.is_floating(values.type):
            # Floats cannot be a feature, but pandas writes times as floats.
            seconds_T = values.to_numpy(zero_copy_only=False).astype(np.float64)
            known_T = np.abs(seconds_T) < 2.0**62
            row_T, values = row_T[known_T], pa.array(seconds_T[known_T].astype(np.int64))
        # Reads the numbers as they are; the unit is applied later.
        feature = FeatureConfig(name=self.column, hash_bucket_size=1, time_unit="s")
        try:
            times_T, per_second = ids.times(values, feature)
        except ids.NotANumberError:
            return
        leaf = arrow.leaf_type(lists.type)
        self._is_number = not (pa.types.is_timestamp(leaf) or pa.types.is_date(leaf))
        self._per_second = per_second
        self._times += len(times_T)
        positive_T = times_T[times_T > 0]
        self._not_positive += len(times_T) - len(positive_T)
        if len(positive_T):
            ends = [n for n in (self._first, self._last) if n is not None]
            self._first = min([int(positive_T.min()), *ends])
            self._last = max([int(positive_T.max()), *ends])
        for unit in _UNITS:
            seconds_T = positive_T // self._per_unit(unit)
            inside_T = (seconds_T >= _PLAUSIBLE_FROM) & (seconds_T <= self._now + _YEAR)
            self._in_unit[unit] += int(inside_T.sum())
        self._count_order(row_T, times_T)

    def _count_order(self, row_T: np.ndarray, times_T: np.ndarray) -> None:
        after_T = row_T[1:][row_T[1:] == row_T[:-1]]
        falls_T = row_T[1:][(row_T[1:] == row_T[:-1]) & (times_T[1:] < times_T[:-1])]
        rises_T = row_T[1:][(row_T[1:] == row_T[:-1]) & (times_T[1:] > times_T[:-1])]
        falling = np.unique(falls_T)
        self._rows += len(np.unique(after_T))
        self._falling += len(falling)
        self._rising += len(np.unique(rises_T))
        self._reversed += len(np.setdiff1d(falling, rises_T, assume_unique=False))

    # -------------------------------------------------------------------------------- messages

    def range_text(self, every_unit: bool = False) -> str:
        """The range of the times as text, and what it would be in likelier units.

        Args:
          every_unit: whether to give the range in all other units if none is likelier.
        """
        if self._first is None:
            return f"column {self.column} has no time after 1970"
        unit = self._unit or self._likely_unit() or "s"
        if not self._is_number:
            return f"times of column {self.column} run {self._range(None)}"
        text = f"times of column {self.column} run {self._range(unit)} if time_unit is {unit}"
        if not self._plausible(unit):
            others = [u for u in _UNITS if u != unit]
            likely = [u for u in others if self._plausible(u)]
            for other in likely or (others if every_unit else ()):
                text += f", or {self._range(other)} if it is {other}"
        return text

    def sentences(self) -> list[str]:
        """All facts, for `s2s inspect`."""
        if not self._times:
            return []
        text = self.range_text()
        sentences = [text[0].upper() + text[1:]]
        if self._not_positive:
            sentences.append(
                f"{share(self._not_positive, self._times)} of the times of column {self.column} are 0 "
                f"or before 1970"
            )
        if self._last is not None and self._plausible_start() and self._in_future():
            sentences.append(f"The last time of column {self.column} is in the future")
        if self._rows and not self._falling:
            sentences.append(f"Times of column {self.column} never step back within a row")
        return sentences

    def warnings(self) -> list[str]:
        """Warnings about likely mistakes, a sentence each."""
        warnings = []
        if self._unit is not None and self._is_number and self._first is not None:
            likely = self._likely_unit()
            if likely is not None and likely != self._unit:
                warnings.append(f"warning: {self.range_text()}; it is likely {likely}")
        if not self._falling:
            return warnings
        of_rows = f"{share(self._falling, self._rows)} of the {self._rows:,} rows looked at"
        if self._reversed > _NEARLY_ALL * self._rows:
            warnings.append(
                f"warning: events are stored newest first in {of_rows} (times of column {self.column} "
                f"decrease), but are read as oldest first, so the past is predicted from the future; "
                f"reverse the lists of each row, or sort them with {_SORT}"
            )
        else:
            warnings.append(
                f"warning: times of column {self.column} step back in {of_rows}, but events are read in "
                f"the order in which they are stored, as oldest first; sort the lists of each row by "
                f"time ({_SORT} does)"
            )
        return warnings

    def why_untrue(self) -> str | None:
        """Why these cannot be the times of events, worded to follow "found"; None if they may be."""
        if not self._times:
            return "no times"
        if not self._rising:
            return "the same time for all events of each row"
        likely = self._likely_unit() if self._is_number and self._first is not None else None
        if likely not in (None, self._unit):
            return f"other numbers: {self.range_text()}"
        return None

    def _range(self, unit: str | None) -> str:
        assert self._first is not None, "there are times"
        assert self._last is not None, "there are times"
        first, last = self._seconds(self._first, unit), self._seconds(self._last, unit)
        return f"from {date_text(first)} to {date_text(last)}"

    def _seconds(self, number: int, unit: str | None) -> int:
        return number // self._per_unit(unit)

    def _per_unit(self, unit: str | None) -> int:
        return self._per_second if unit is None else 1000 ** _UNITS.index(unit)

    def _plausible(self, unit: str) -> bool:
        return self._in_unit[unit] >= _MOST_TIMES * (self._times - self._not_positive)

    def _likely_unit(self) -> str | None:
        """The unit that gives plausible dates; None if there is none."""
        if self._unit is not None and self._plausible(self._unit):
            return self._unit
        return next((unit for unit in _UNITS if self._plausible(unit)), None)

    def _in_future(self) -> bool:
        assert self._last is not None, "there are times"
        unit = (self._unit or self._likely_unit() or "s") if self._is_number else None
        return self._seconds(self._last, unit) > self._now

    def _plausible_start(self) -> bool:
        assert self._first is not None, "there are times"
        unit = (self._unit or self._likely_unit() or "s") if self._is_number else None
        return _PLAUSIBLE_FROM <= self._seconds(self._first, unit) <= self._now


def time_columns(schema: pa.Schema, assumptions: Assumptions | None) -> dict[str, str | None]:
    """List columns that hold the times of events, with the unit of each; None if unknown.

    These are the time columns of `assumptions`. If it has none, or is None, columns are found by type or
    name.
    """
    named: dict[str, str | None] = {}
    if assumptions is not None:
        split = assumptions.decoding.split
        for feature in assumptions.decoding.features:
            of_split = split is not None and feature == split.feature
            if feature.op in _TIME_OPS or of_split:
                named[feature.column_name] = feature.time_unit
            elif feature == assumptions.time_feature:
                named.setdefault(feature.column_name, None)
    named = {name: unit for name, unit in named.items() if _may_be_times(schema, name)}
    if named:
        return named
    return {
        n: None for n in schema.names if _may_be_times(schema, n) and _looks_like_times(schema, n)
    }


def _may_be_times(schema: pa.Schema, name: str) -> bool:
    if schema.names.count(name) != 1:
        return False
    kind = schema.field(name).type
    leaf = arrow.leaf_type(kind)
    return arrow.is_list(kind) and (ids.accepted(leaf, "time_gap") or pa.types.is_floating(leaf))


def _looks_like_times(schema: pa.Schema, name: str) -> bool:
    leaf = arrow.leaf_type(schema.field(name).type)
    of_time = pa.types.is_timestamp(leaf) or pa.types.is_date(leaf)
    return of_time or _NAME.search(name) is not None


def _times_by_row(lists: pa.Array) -> tuple[np.ndarray, pa.Array]:
    """The row of each time, and the times, without nulls."""
    row_T = np.repeat(np.arange(len(lists)), arrow.list_lengths(lists))
    values = lists.flatten()
    if arrow.is_list(values.type):
        row_T = np.repeat(row_T, arrow.list_lengths(values))
        values = values.flatten()
    if values.null_count:
        row_T = row_T[values.is_valid().to_numpy(zero_copy_only=False)]
        values = values.drop_null()
    return row_T, values
