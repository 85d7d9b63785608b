"""Checks the counts over all events before they are sorted, and chooses the type of times.

The counts of several pieces are added up first, so every engine comes to the same decisions.
"""

import bisect
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from s2s_jax.data.conversion import id_texts, times
from s2s_jax.data.conversion.description import Description
from s2s_jax.data.conversion.events import BadEvents, Stored, Survey, values
from s2s_jax.data.conversion.reading.database import shorten
from s2s_jax.errors import UserError

_TIME_NAMES = {
    "BIGINT": "a time as a whole number",
    "DECIMAL": "a time as a number",
    "TIMESTAMP": "a date and time",
}
_OTHER_FORMAT = "for dates of another format, use --time_format, such as '%d/%m/%Y %H:%M'"


class Checked(NamedTuple):
    """The events that are kept.

    Attributes:
      time_kind: the type of their times.
      events: their number.
      no_user: the number of events without a user, which are left out.
      no_time: the number of other events without a time, which are left out.
    """

    time_kind: str
    events: int
    no_user: int
    no_time: int


def summed(surveys: Iterable[Survey]) -> Survey:
    """The survey of the events of several pieces."""
    rows, objects = 0, {}
    counts: dict[str, int | str | None] = {}
    for survey in surveys:
        rows += survey.rows
        objects = {**survey.objects, **objects}
        for name, value in survey.counts.items():
            counts[name] = _joined(counts[name] if name in counts else None, value)
    return Survey(rows, counts, objects)


def _joined(one: int | str | None, other: int | str | None) -> int | str | None:
    """The sum of two counts, or the smaller of two examples."""
    if one is None or other is None:
        return other if one is None else one
    if isinstance(one, int) and isinstance(other, int):
        return one + other
    return min(str(one), str(other))


class Check:
    """Refuses events that cannot be converted."""

    def __init__(
        self,
        description: Description,
        stored: Stored,
        sources: Sequence[tuple[int, str]],
        survey: Survey,
    ):
        """Prepares the check.

        Args:
          description: what is converted.
          stored: how the events are stored.
          sources: the number of the first event of each source, with its name.
          survey: counts over all events.
        """
        self._selection = description.selection
        self._skip = description.skip
        self._stored = stored
        self._sources = sources
        self._survey = survey

    def check(self, bad_events: Callable[[str], BadEvents]) -> Checked:
        """The events that are kept.

        Args:
          bad_events: the events without a user or a time, given the type of times.

        Raises:
          UserError: there are such events and they must not be skipped, or no others, or a required
            column has no values.
        """
        first = self._sources[0][1]
        rows = self._survey.rows
        if rows == 0:
            raise UserError(f"{first}: expected events, found none; give other files")
        self._refuse_rounded()
        kind = self._time_kind()
        bad = bad_events(kind)
        if bad.first is not None and not self._skip:
            self._refuse_first(bad, kind)
        good = rows - bad.no_user - bad.no_time
        if good == 0:
            raise UserError(
                f"{first}: expected events with a user (--user_column {self._selection.user}) and a "
                f"time (--time_column {self._selection.time}), found no event with both; give other "
                f"columns; {_OTHER_FORMAT}"
            )
        if self._stored.is_json:
            self._refuse_unknown_keys()
            self._refuse_objects()
        return Checked(kind, good, bad.no_user, bad.no_time)

    def _time_kind(self) -> str:
        """The type of times: the one that most of them have."""
        found = self._survey.counts
        kinds = self._stored.time_kinds
        kind = kinds[0]
        if len(kinds) > 1:
            kind = max(kinds, key=lambda kind: _count(found[kind]))
        if "times" in found:
            where = f"{self._sources[0][1]}: column {self._selection.time} (--time_column)"
            times.refuse_digit_dates(where, found)
        return kind

    def _source(self, column: str) -> tuple[str, str]:
        """The column of the sources of a column of the table, and the flag that names it."""
        return values(self._selection)[column], "--user_column" if column == "u" else "--features"

    def _refuse_rounded(self) -> None:
        """Refuses columns of texts that are numbers and may have lost digits."""
        for column in self._stored.types:
            if f"{column} rounded" not in self._survey.counts:
                continue
            number = id_texts.rounded(column, self._survey.counts)
            if number is not None:
                name, flag = self._source(column)
                raise UserError(
                    f"{self._sources[0][1]}: column {name} ({flag}) has only numbers, and {number} may "
                    f"have lost digits when it was written; write the column again as whole numbers or "
                    f"texts"
                )

    def _refuse_unknown_keys(self) -> None:
        """Refuses a key that no object has, because it is probably misspelled."""
        for i, feature in enumerate(self._selection.features):
            if not self._survey.counts[f"f{i} known"]:
                raise UserError(
                    f"{self._sources[0][1]}: expected objects with the key {feature.column} "
                    f"(--features), found no value of it in {self._survey.rows:,} events; correct the "
                    f"key, or leave it out"
                )

    def _refuse_objects(self) -> None:
        """Refuses ids that are JSON objects, or arrays in arrays."""
        for column in self._stored.types:
            if column in self._survey.objects:
                name, flag = self._source(column)
                raise UserError(
                    f"{self._sources[0][1]}: key {name} ({flag}): expected numbers, texts or arrays of "
                    f"them, found {shorten(self._survey.objects[column])}; for a key inside an object, "
                    f"give {name}.KEY"
                )

    def _refuse_first(self, bad: BadEvents, kind: str) -> None:
        """Refuses the first event without a user or a time."""
        assert bad.first is not None
        place, no_user, time = bad.first
        number = bisect.bisect_right(self._sources, place, key=lambda source: source[0]) - 1
        first, source = self._sources[number]
        column, expected, found, remedy = self._selection.user, "a user", "none", "fix it"
        if no_user and time is None and self._stored.is_json:
            expected = "a JSON object with a user"
        if not no_user:
            assert self._selection.time is not None
            column, expected = self._selection.time, _TIME_NAMES[kind.partition("(")[0]]
            if self._stored.formats:
                expected = f"a time of the format {' or '.join(self._stored.formats)}"
            if time is not None:
                found = shorten(time)
                remedy = f"fix it ({_OTHER_FORMAT})" if not time.isdigit() else remedy
        raise UserError(
            f"{source}: row {place - first + 1}, column {column}: expected {expected}, found {found}; "
            f"{remedy}, or leave such rows out with --on_error skip "
            f"({bad.no_user + bad.no_time:,} in all)"
        )


def _count(value: int | str | None) -> int:
    assert isinstance(value, int)
    return value
