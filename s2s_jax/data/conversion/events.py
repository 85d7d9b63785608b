"""The table of events in a DuckDB database: all events of a conversion, or those of one piece.

Events are loaded in the order of their source and numbered by rowid. Columns of texts get their final
type only when all events have been counted: see `checking`.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import pyarrow as pa

from s2s_jax.data.conversion import id_texts, times
from s2s_jax.data.conversion.description import Description
from s2s_jax.data.conversion.reading import grouped, sql
from s2s_jax.data.conversion.reading.database import Database, shorten
from s2s_jax.data.conversion.selection import Selection
from s2s_jax.errors import UserError

# Rejections that mean exactly one lost event; an unclosed quote may mean many.
_ONE_LINE = ("MISSING COLUMNS", "TOO MANY COLUMNS", "INVALID ENCODING")
_ARROW_NAMES = {"FLOAT": "float32", "DOUBLE": "float64"}


@dataclasses.dataclass(frozen=True)
class Stored:
    """How events are stored.

    Attributes:
      types: the type of each column: u, t (if there are times), and f0, f1 … for the features.
      is_json: whether the sources contain JSON objects.
      formats: the formats of times that are stored as texts; empty: those that are recognized.
    """

    types: Mapping[str, str]
    is_json: bool
    formats: tuple[str, ...]

    @property
    def time_kinds(self) -> tuple[str, ...]:
        """The types that times can have in the end, the simplest first."""
        if "t" not in self.types:
            return ("BIGINT",)
        if self.formats:
            return ("TIMESTAMP",)
        return tuple(times.text_counts("t")) if self.types["t"] == "VARCHAR" else (self.types["t"],)


class BadEvent(NamedTuple):
    """An event without a user or a time.

    Attributes:
      place: its number among all events that were read.
      no_user: whether it has no user.
      time: its time as text; None if it has none.
    """

    place: int
    no_user: bool
    time: str | None


class BadEvents(NamedTuple):
    """Counts of events without a user and of other events without a time, and the first of all."""

    no_user: int
    no_time: int
    first: BadEvent | None


@dataclasses.dataclass(frozen=True)
class Survey:
    """What is known about events before they get their final form.

    Attributes:
      rows: the number of events.
      counts: aggregates over all events, by name: see `id_texts` and `times`.
      objects: columns that have JSON objects where ids are expected, each with one of them.
    """

    rows: int
    counts: Mapping[str, int | str | None]
    objects: Mapping[str, str]


def stored(selection: Selection, types: Sequence[Mapping[str, str]]) -> Stored:
    """How events are stored, given the type of each column in each source."""

    def found(column: str) -> set[str]:
        return {of_source[column] for of_source in types}

    kept = {"u": sql.stored_user(found(selection.user))}
    if selection.time is not None:
        kept["t"] = times.stored(found(selection.time), selection.time_formats)
    for i, feature in enumerate(selection.features):
        is_bag = feature.separator is not None
        kept[f"f{i}"] = sql.stored_feature(found(feature.column), is_bag)
    formats = tuple(form for form in selection.time_formats if form != times.NUMBER)
    return Stored(kept, "JSON" in found(selection.user), formats)


def values(selection: Selection) -> dict[str, str]:
    """The column of the source that each column of the table comes from."""
    found = {"u": selection.user}
    if selection.time is not None:
        found["t"] = selection.time
    return found | {f"f{i}": feature.column for i, feature in enumerate(selection.features)}


class EventTable:
    """The table `events` of a database."""

    def __init__(self, database: Database, description: Description, stored: Stored):
        """Creates the table, without events."""
        self._database = database
        self._description = description
        self._selection = description.selection
        self._stored = stored
        columns = ", ".join(f"{column} {kept}" for column, kept in stored.types.items())
        database.run(f"CREATE TABLE events ({columns})")

    def rows(self) -> int:
        """The number of events."""
        ((rows,),) = self._database.run("SELECT count(*) FROM events")
        return rows

    # ------------------------------------------------------------------------------------ loading

    def load(self, scan: sql.Scan) -> int:
        """Adds the events of a source, in its order, and returns the number of unreadable lines.

        Raises:
          UserError: the source cannot be read.
        """
        chosen, kept = self._selection, self._stored.types
        values = [sql.user_or_time(scan.columns[chosen.user], kept["u"], chosen.missing)]
        if chosen.time is not None:
            time = scan.columns[chosen.time]
            values.append(sql.user_or_time(time, kept["t"], chosen.missing))
        for i, feature in enumerate(chosen.features):
            column = scan.columns[feature.column]
            values.append(sql.feature(column, kept[f"f{i}"], chosen.missing, feature.separator))
        grouped.check_lengths(scan, self._database)
        self._refuse_rounded(scan)
        # Rows are numbered by rowid in the order of the source.
        query = f"INSERT INTO events SELECT {', '.join(values)} FROM {scan.sql}"
        self._database.run(query, scan.source)
        return self._bad_lines(scan) if scan.sql.startswith("read_csv") else 0

    def _refuse_rounded(self, scan: sql.Scan) -> None:
        """Refuses whole numbers of a source that are kept as fractions and may have lost digits."""
        queries = {}
        for column, flag in self._selection.columns.items():
            aggregate = sql.rounded(scan.columns[column])
            # Times as float64 are exact enough in any unit.
            is_time = flag == "--time_column" and scan.columns[column].type != "FLOAT"
            if aggregate is not None and not is_time:
                queries[column] = aggregate
        for column, value in self._database.aggregate(queries, scan.sql, scan.source).items():
            if value is not None:
                kind = _ARROW_NAMES[scan.columns[column].type.removesuffix("[]")]
                raise UserError(
                    f"{scan.source}: column {column} ({self._selection.columns[column]}) has "
                    f"{value:.17g} as {kind}, which may have lost digits; write it again as whole "
                    f"numbers, times or texts"
                )

    def _bad_lines(self, scan: sql.Scan) -> int:
        """The number of lines that could not be read; refuses them unless they may be skipped."""
        ((lines,),) = self._database.run("SELECT count(DISTINCT line) FROM reject_errors")
        worst = self._database.run(
            f"SELECT error_type IN {_ONE_LINE}, line, error_message, csv_line FROM reject_errors "
            f"ORDER BY 1, 2 LIMIT 1"
        )
        self._database.run("DROP TABLE reject_errors")
        self._database.run("DROP TABLE reject_scans")
        for one_line, line, message, found in worst:
            if one_line and self._description.skip:
                return lines
            remedy = "fix it, or leave such lines out with --on_error skip"
            if "utf-8" in message.lower():
                remedy = "name its encoding with --encoding, such as latin-1; or " + remedy
            if not one_line:
                # An unclosed quote swallows an unknown number of lines after it.
                remedy = "fix it, or give --quote '' if quotation marks have no meaning"
            raise UserError(
                f"{scan.source}: line {line} cannot be read ({shorten(message)}): {shorten(found)}; "
                f"{remedy}"
            )
        return lines

    # ----------------------------------------------------------------------------------- counting

    def survey(self) -> Survey:
        """Counts over all events."""
        queries = {"rows": "count(*)"}
        features = enumerate(self._selection.features)
        as_text = {f"f{i}" for i, feature in features if feature.prefix or feature.ids is not None}
        for column, kept in self._stored.types.items():
            if column == "t":
                queries |= self._time_queries()
            elif kept.startswith("VARCHAR") and column not in as_text:
                queries |= id_texts.integers(column, kept)
            if self._stored.is_json and column not in ("u", "t"):
                queries[f"{column} known"] = f"count(*) FILTER (len({column}) > 0)"
        found = self._database.aggregate(queries, "events")
        further = {}
        for column, kept in self._stored.types.items():
            if f"{column} texts" in found and not id_texts.only_integers(column, found):
                further |= id_texts.numbers(column, kept)
        found |= self._database.aggregate(further, "events")
        return Survey(found.pop("rows"), found, self._objects() if self._stored.is_json else {})

    def _time_queries(self) -> dict[str, str]:
        """Aggregates about the column of times, by name."""
        if self._stored.formats:
            return {}
        kept = self._stored.types["t"]
        queries = times.text_counts("t") if kept == "VARCHAR" else {}
        if not self._selection.time_formats and kept != "TIMESTAMP":
            queries |= times.digit_dates("t") | {"times": "count(t)"}
        return queries

    def _objects(self) -> dict[str, str]:
        """Ids that are JSON objects, or arrays in arrays: the first of each column."""
        objects = {}
        for column, kept in self._stored.types.items():
            ids = column if kept.endswith("[]") else f"[{column}]"
            nested = "(starts_with(v, '{') OR starts_with(v, '[')) AND json_valid(v)"
            query = (
                f"SELECT v FROM (SELECT unnest([v FOR v IN {ids} IF {nested}]) AS v FROM events) "
                f"LIMIT 1"
            )
            for (value,) in self._database.run(query) if column != "t" else ():
                objects[column] = value
        return objects

    def bad_events(self, kind: str) -> BadEvents:
        """The events without a user or a time, if times have the type `kind`."""
        timed = f"(SELECT u, {', '.join(timed_values(self._stored, kind))} FROM events)"
        bad = f"u IS NULL OR {times.whole('time', kind)} IS NULL"
        ((no_user, all_bad),) = self._database.run(
            f"SELECT count(*) FILTER (u IS NULL), count(*) FILTER ({bad}) FROM {timed}"
        )
        first = None
        if all_bad:
            (found,) = self._database.run(
                f"SELECT place, u IS NULL, CAST(t AS VARCHAR) FROM {timed} WHERE {bad} "
                f"ORDER BY place LIMIT 1"
            )
            first = BadEvent(*found)
        return BadEvents(no_user, all_bad - no_user, first)


# ----------------------------------------------------------------------------------- the final form


def timed_values(stored: Stored, kind: str, place: str = "rowid") -> list[str]:
    """SQL of each event's place, of its time as it was read (t), and of its time in the type `kind`."""
    time, shown = place, "NULL"
    if "t" in stored.types:
        time = shown = "t"
        if stored.formats:
            time = times.of_format("t", stored.formats)
        elif stored.types["t"] == "VARCHAR":
            time = times.of_text("t", kind)
    return [f"{place} AS place", f"{shown} AS t", f"{time} AS time"]


def final_form(
    selection: Selection, stored: Stored, survey: Survey, kind: str, place: str = "rowid"
) -> str:
    """SQL of the table `events` in its final form: u, time, place, a value for each feature, seconds.

    Events without a user or a time are left out. The tables of `id_tables` have to be registered.
    """
    typed = timed_values(stored, kind, place)
    for column, kept in stored.types.items():
        if f"{column} texts" in survey.counts:
            typed.append(f"{id_texts.typed(column, kept, survey.counts)} AS {column}")
        elif column != "t":
            typed.append(column)
    values, joins = ["u", "time", "place"], ""
    for i, feature in enumerate(selection.features):
        value = f"typed.f{i}"
        if feature.ids is not None:
            # pandas may have written 12 as 12.0.
            key = f"regexp_replace(typed.f{i}, '\\.0+$', '')"
            joins += f" LEFT JOIN ids{i} ON ids{i}.source = {key}"
            value = f"ids{i}.ids"
        if feature.prefix:
            value = f"{sql.text(feature.prefix)} || {value}"
        values.append(f"{value} AS f{i}")
    return (
        f"SELECT {', '.join(values)}, {times.whole('time', kind)} AS seconds "
        f"FROM (SELECT {', '.join(typed)} FROM events) AS typed{joins} "
        f"WHERE u IS NOT NULL AND seconds IS NOT NULL"
    )


def id_tables(selection: Selection) -> dict[str, pa.Table]:
    """The tables that `final_form` takes the ids of features from, by name."""
    tables = {}
    for i, feature in enumerate(selection.features):
        if feature.ids is not None:
            keys, texts = pa.array(feature.ids), list(map(list, feature.ids.values()))
            lists = pa.array(texts, pa.list_(pa.string()))
            tables[f"ids{i}"] = pa.table({"source": keys, "ids": lists})
    return tables
