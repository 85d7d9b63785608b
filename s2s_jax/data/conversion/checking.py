"""Checks all events before they are sorted: the types of ids and times, and bad events."""

import bisect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from s2s_jax.data.conversion import id_texts, times
from s2s_jax.data.conversion.reading.database import Database, shorten
from s2s_jax.data.conversion.selection import Selection
from s2s_jax.errors import UserError

_TIME_NAMES = {
    "BIGINT": "a time as a whole number",
    "DECIMAL": "a time as a number",
    "TIMESTAMP": "a date and time",
}
_OTHER_FORMAT = "for dates of another format, use --time_format, such as '%d/%m/%Y %H:%M'"


class Events(NamedTuple):
    """The table of all events.

    Attributes:
      database: the database with the table `events`.
      selection: the columns of an event.
      kept: the types of the table's columns: u, t (unless there are no times), f0, f1 …
      firsts: the number of the first row of each file, with the file.
      is_json: whether the files contain JSON objects.
    """

    database: Database
    selection: Selection
    kept: Mapping[str, str]
    firsts: Sequence[tuple[int, Path]]
    is_json: bool

    def run(self, query: str) -> list[tuple]:
        """The rows of a query's result."""
        return self.database.run(query)

    def source(self, column: str) -> tuple[str, str]:
        """The column of the files that a column of the table comes from, and the flag that names it."""
        if column == "u":
            return self.selection.user, "--user_column"
        return self.selection.features[int(column[1:])].column, "--features"


class Checked(NamedTuple):
    """Counts of events: those that were kept, and those that were left out, by reason."""

    events: int
    no_user: int
    no_time: int


def check(events: Events, skip: bool) -> Checked:
    """Creates the view `typed`, with ids and times in their final form; refuses bad events.

    Args:
      events: the events of the log.
      skip: whether events without a user or a time are left out and counted; otherwise they are refused.

    Raises:
      UserError: there are such events, or no other events, or a required column has no values.
    """
    first = events.firsts[0][1]
    found = _survey(events)
    if found["rows"] == 0:
        raise UserError(f"{first}: expected events, found none; give other files")
    _refuse_rounded(events, found)
    kind = _make_view(events, found)
    ((no_user, no_time),) = events.run(
        "SELECT count(*) FILTER (u IS NULL), "
        "count(*) FILTER (u IS NOT NULL AND seconds IS NULL) FROM typed"
    )
    if no_user + no_time and not skip:
        _refuse_first(events, no_user + no_time, kind)
    good = found["rows"] - no_user - no_time
    if good == 0:
        raise UserError(
            f"{first}: expected events with a user (--user_column {events.selection.user}) and a time "
            f"(--time_column {events.selection.time}), found no event with both; give other columns; "
            f"{_OTHER_FORMAT}"
        )
    if events.is_json:
        _refuse_unknown_keys(events, found)
        _refuse_objects(events)
    return Checked(good, no_user, no_time)


def _survey(events: Events) -> dict:
    """Counts over all events."""
    queries = {"rows": "count(*)"}
    features = enumerate(events.selection.features)
    as_text = {f"f{i}" for i, feature in features if feature.prefix or feature.ids is not None}
    for column, kept in events.kept.items():
        if column == "t":
            queries |= _time_queries(events)
        elif kept.startswith("VARCHAR") and column not in as_text:
            queries |= id_texts.integers(column, kept)
        if events.is_json and column not in ("u", "t"):
            queries[f"{column} known"] = f"count(*) FILTER (len({column}) > 0)"
    found = events.database.aggregate(queries, "events")
    further = {}
    for column, kept in events.kept.items():
        if f"{column} texts" in found and not id_texts.only_integers(column, found):
            further |= id_texts.numbers(column, kept)
    return found | events.database.aggregate(further, "events")


def _time_queries(events: Events) -> dict[str, str]:
    """Aggregates about the column of times, by name."""
    if _is_formatted(events):
        return {}
    queries = times.text_counts("t") if events.kept["t"] == "VARCHAR" else {}
    if not events.selection.time_formats and events.kept["t"] != "TIMESTAMP":
        queries |= times.digit_dates("t") | {"times": "count(t)"}
    return queries


def _is_formatted(events: Events) -> bool:
    return bool(events.selection.time_formats) and times.NUMBER not in events.selection.time_formats


def _make_view(events: Events, found: Mapping) -> str:
    """Creates the view `typed`, and returns the type of times."""
    kind, time, shown = "BIGINT", "rowid", "NULL"
    if "t" in events.kept:
        kind, time, shown = events.kept["t"], "t", "t"
        if _is_formatted(events):
            kind, time = "TIMESTAMP", times.of_format("t", events.selection.time_formats)
        elif kind == "VARCHAR":
            kind = max(times.text_counts("t"), key=lambda kind: found[kind])
            time = times.of_text("t", kind)
        if "times" in found:
            where = f"{events.firsts[0][1]}: column {events.selection.time} (--time_column)"
            times.refuse_digit_dates(where, found)
    values = ["rowid AS place", f"{shown} AS t", f"{time} AS time"]
    for column, kept in events.kept.items():
        if f"{column} texts" in found:
            values.append(f"{id_texts.typed(column, kept, found)} AS {column}")
        elif column != "t":
            values.append(column)
    events.run(
        f"CREATE VIEW typed AS SELECT *, {times.whole('time', kind)} AS seconds "
        f"FROM (SELECT {', '.join(values)} FROM events)"
    )
    return kind


def _refuse_rounded(events: Events, found: Mapping) -> None:
    """Refuses columns of texts that are numbers and may have lost digits."""
    for column in events.kept:
        number = id_texts.rounded(column, found) if f"{column} rounded" in found else None
        if number is not None:
            name, flag = events.source(column)
            raise UserError(
                f"{events.firsts[0][1]}: column {name} ({flag}) has only numbers, and {number} may have "
                f"lost digits when it was written; write the column again as whole numbers or texts"
            )


def _refuse_unknown_keys(events: Events, found: Mapping) -> None:
    """Refuses a key that no object has, because it is probably misspelled."""
    for i, feature in enumerate(events.selection.features):
        if not found[f"f{i} known"]:
            raise UserError(
                f"{events.firsts[0][1]}: expected objects with the key {feature.column} (--features), "
                f"found no value of it in {found['rows']:,} events; correct the key, or leave it out"
            )


def _refuse_objects(events: Events) -> None:
    """Refuses ids that are JSON objects, or arrays in arrays."""
    for column in events.kept.keys() - {"t"}:
        ids = column if events.kept[column].endswith("[]") else f"[{column}]"
        nested = "(starts_with(v, '{') OR starts_with(v, '[')) AND json_valid(v)"
        found = events.run(
            f"SELECT v FROM (SELECT unnest([v FOR v IN {ids} IF {nested}]) AS v FROM events) LIMIT 1"
        )
        for (value,) in found:
            name, flag = events.source(column)
            raise UserError(
                f"{events.firsts[0][1]}: key {name} ({flag}): expected numbers, texts or arrays of "
                f"them, found {shorten(value)}; for a key inside an object, give {name}.KEY"
            )


def _refuse_first(events: Events, bad: int, time_kind: str) -> None:
    """Refuses the first event without a user or a time; there are `bad` such events."""
    ((place, no_user, time),) = events.run(
        "SELECT place, u IS NULL, CAST(t AS VARCHAR) FROM typed "
        "WHERE u IS NULL OR seconds IS NULL ORDER BY place LIMIT 1"
    )
    number = bisect.bisect_right(events.firsts, place, key=lambda first: first[0]) - 1
    first, path = events.firsts[number]
    column, expected, found, remedy = events.selection.user, "a user", "none", "fix it"
    if no_user and time is None and events.is_json:
        expected = "a JSON object with a user"
    if not no_user:
        column, expected = events.selection.time, _TIME_NAMES[time_kind.partition("(")[0]]
        if _is_formatted(events):
            expected = f"a time of the format {' or '.join(events.selection.time_formats)}"
        if time is not None:
            found = shorten(time)
            remedy = f"fix it ({_OTHER_FORMAT})" if not time.isdigit() else remedy
    raise UserError(
        f"{path}: row {place - first + 1}, column {column}: expected {expected}, found {found}; "
        f"{remedy}, or leave such rows out with --on_error skip ({bad:,} in all)"
    )
