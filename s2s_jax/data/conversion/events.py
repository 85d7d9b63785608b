"""Events in a DuckDB database on disk: loaded in the order of the files, read by user and time.

DuckDB sorts what memory does not hold. The extra `convert` installs it.
"""

import bisect
import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

import duckdb
import pyarrow as pa
import pyarrow.parquet

from s2s_jax.data.conversion import id_texts, sql
from s2s_jax.data.conversion.selection import Selection
from s2s_jax.errors import UserError

# Rejected lines that are surely one event each; what follows an unclosed quote is not.
_ONE_LINE = ("MISSING COLUMNS", "TOO MANY COLUMNS", "INVALID ENCODING")
_SHOWN = 80
_TIME_NAMES = {
    "BIGINT": "a time as a whole number",
    "DECIMAL": "a time as a number",
    "TIMESTAMP": "a date and time",
}


class Skipped(NamedTuple):
    """Events that were left out, by what is wrong with them."""

    lines: int
    users: int
    times: int


class EventStore:
    """The events of a log.

    Attributes:
      events: how many there are, without those left out; known after `check`.
    """

    def __init__(self, selection: Selection, directory: Path, memory_limit: str | None):
        """Makes the database.

        Args:
          selection: what events consist of.
          directory: for the database, and for what does not fit in memory while sorting.
          memory_limit: of DuckDB, as "4GB"; None: its own, 80% of the memory.

        Raises:
          UserError: the limit is none.
        """
        self.events = 0
        self._selection = selection
        # Columns of the table: u, t, and f0, f1 … for the features; and their types.
        self._kept: dict[str, str] = {}
        # The first row of each file.
        self._firsts: list[tuple[int, Path]] = []
        self._bad_lines = 0
        self._is_json = False
        try:
            self._database = duckdb.connect(str(directory / "events.duckdb"))
        except duckdb.Error as error:
            raise UserError(f"--temp_dir: {directory} cannot be used ({_reason(error)})") from error
        settings = {"temp_directory": str(directory), "TimeZone": "UTC"}
        # A progress bar of ours asks how far DuckDB is; it must not print its own.
        settings |= {"enable_progress_bar": "true", "enable_progress_bar_print": "false"}
        # Nothing is fetched from anywhere.
        settings |= {"autoinstall_known_extensions": "false"}
        for key, value in settings.items():
            self._run(f"SET {key} = {sql.text(value)}")
        if memory_limit is not None:
            try:
                self._database.execute(f"SET memory_limit = {sql.text(memory_limit)}")
            except duckdb.Error as error:
                self._database.close()
                raise UserError(
                    f"--memory_limit: expected a size such as 4GB, found {memory_limit}"
                ) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._database.close()

    def progress(self) -> float:
        """Percent of the running query that is done. May be asked by another thread."""
        return max(self._database.query_progress(), 0.0)

    # ------------------------------------------------------------------------------------ loading

    def parquet(self, path: Path) -> sql.Scan:
        """How a Parquet file is read.

        Raises:
          UserError: it is none.
        """
        scan = sql.scan_parquet(path)
        found = self._run(f"DESCRIBE SELECT * FROM {scan}", str(path))
        try:
            # As they are in the file: DuckDB gives others to those that differ only in case.
            names = pyarrow.parquet.read_schema(path).names
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{path}: expected a Parquet file ({_reason(error)})") from error
        assert len(names) == len(found)
        pairs = zip(names, found, strict=True)
        columns = {name: sql.Column(sql.name(row[0]), row[1]) for name, row in pairs}
        return sql.Scan(path, scan, columns, sql.repeated(names))

    def prepare(self, scans: Sequence[sql.Scan]) -> None:
        """Makes the table for the events of `scans`.

        Raises:
          UserError: a file lacks a column, or has it in a type that cannot be used.
        """
        chosen = self._selection
        for scan in scans:
            for column, flag in chosen.columns.items():
                if column not in scan.columns:
                    raise UserError(
                        f"{scan.path}: no column {column} ({flag}); it has "
                        f"{', '.join(scan.columns) or 'no columns'}"
                    )
                if column in scan.twice:
                    raise UserError(
                        f"{scan.path}: {column} ({flag}) is the name of several columns; rename them"
                    )
                found = scan.columns[column].type
                if not sql.supported(found, lists=flag == "--features"):
                    raise UserError(
                        f"{scan.path}: column {column} ({flag}): expected integers, texts or times, "
                        f"found {found}"
                    )

        def types(column: str) -> set[str]:
            return {scan.columns[column].type for scan in scans}

        self._kept["u"] = sql.stored_user(types(chosen.user))
        self._kept["t"] = sql.stored_time(types(chosen.time))
        for i, feature in enumerate(chosen.features):
            is_bag = feature.separator is not None
            self._kept[f"f{i}"] = sql.stored_feature(types(feature.column), is_bag)
        self._is_json = "JSON" in types(chosen.user)
        columns = ", ".join(f"{column} {kept}" for column, kept in self._kept.items())
        self._run(f"CREATE TABLE events ({columns})")

    def load(self, scan: sql.Scan, skip: bool) -> None:
        """Adds the events of a file, in its order.

        Args:
          scan: one of those that `prepare` was called with.
          skip: whether lines that cannot be read are counted and left out, or an error.

        Raises:
          UserError: the file cannot be read.
        """
        chosen = self._selection
        values = [
            sql.user_or_time(scan.columns[chosen.user], self._kept["u"], chosen.missing),
            sql.user_or_time(scan.columns[chosen.time], self._kept["t"], chosen.missing),
        ]
        for i, feature in enumerate(chosen.features):
            column, kept = scan.columns[feature.column], self._kept[f"f{i}"]
            values.append(sql.feature(column, kept, chosen.missing, feature.separator))
        self._refuse_rounded(scan)
        ((rows,),) = self._run("SELECT count(*) FROM events")
        self._firsts.append((rows, scan.path))
        # Rows are numbered by rowid in the order of the file.
        query = f"INSERT INTO events SELECT {', '.join(values)} FROM {scan.sql}"
        self._run(query, str(scan.path))
        if scan.sql.startswith("read_csv"):
            self._count_bad_lines(scan, skip)

    def _refuse_rounded(self, scan: sql.Scan) -> None:
        """Refuses whole numbers of a file that are kept as fractions and may have lost digits."""
        asked = {}
        for column, flag in self._selection.columns.items():
            aggregate = sql.rounded(scan.columns[column])
            # Times as float64 are exact enough at any unit.
            is_time = flag == "--time" and scan.columns[column].type != "FLOAT"
            if aggregate is not None and not is_time:
                asked[column] = aggregate
        if not asked:
            return
        query = f"SELECT {', '.join(asked.values())} FROM {scan.sql}"
        (found,) = self._run(query, str(scan.path))
        for column, value in zip(asked, found, strict=True):
            if value is not None:
                kind = {"FLOAT": "float32", "DOUBLE": "float64"}[
                    scan.columns[column].type.removesuffix("[]")
                ]
                raise UserError(
                    f"{scan.path}: column {column} ({self._selection.columns[column]}) has {value:.17g} "
                    f"as {kind}, which may have lost digits; write it anew as whole numbers, times or "
                    f"texts"
                )

    def _count_bad_lines(self, scan: sql.Scan, skip: bool) -> None:
        ((lines,),) = self._run("SELECT count(DISTINCT line) FROM reject_errors")
        worst = self._run(
            f"SELECT error_type IN {_ONE_LINE}, line, error_message, csv_line FROM reject_errors "
            f"ORDER BY 1, 2 LIMIT 1"
        )
        self._run("DROP TABLE reject_errors")
        self._run("DROP TABLE reject_scans")
        self._bad_lines += lines
        for one_line, line, message, found in worst:
            if one_line and skip:
                return
            remedy = "mend it, or leave such lines out with --on_error skip"
            if not one_line:
                # It takes with it what follows, of which nobody knows how much it is.
                remedy = "mend it, or say with --quote '' that quotation marks mean nothing"
            raise UserError(
                f"{scan.path}: line {line} cannot be read ({_shorten(message)}): {_shorten(found)}; "
                f"{remedy}"
            )

    # ----------------------------------------------------------------------------------- checking

    def check(self, skip: bool) -> Skipped:
        """Decides on types, and looks for events without a user or a time.

        Columns of texts become integers if every text is what its int64 is written as.

        Args:
          skip: whether such events are counted and left out, or an error.

        Raises:
          UserError: there are such events or no others, or a column has no values that should.
        """
        found = self._survey()
        self._refuse_rounded_texts(found)
        if found["rows"] == 0:
            raise UserError(f"{self._firsts[0][1]}: expected events, found none; name other files")
        time, kind = "t", self._kept["t"]
        if kind == "VARCHAR":
            kinds = sql.text_time_counts("t")
            kind = max(kinds, key=lambda kind: found[kind])
            time = sql.time_of_text("t", kind)
        values = ["rowid AS place", "t", f"{time} AS time"]
        for column, kept in self._kept.items():
            if f"{column} texts" in found:
                values.append(f"{id_texts.typed(column, kept, found)} AS {column}")
            elif column != "t":
                values.append(column)
        self._run(
            f"CREATE VIEW typed AS SELECT *, {sql.whole_time('time', kind)} AS seconds "
            f"FROM (SELECT {', '.join(values)} FROM events)"
        )
        ((users, times),) = self._run(
            "SELECT count(*) FILTER (u IS NULL), "
            "count(*) FILTER (u IS NOT NULL AND seconds IS NULL) FROM typed"
        )
        if users + times and not skip:
            self._refuse_first(users + times, kind)
        self.events = found["rows"] - users - times
        if self.events == 0:
            raise UserError(
                f"{self._firsts[0][1]}: none of its events has both a user (--user "
                f"{self._selection.user}) and a time (--time {self._selection.time}); name other columns"
            )
        if self._is_json:
            self._check_keys(found)
            self._refuse_objects()
        return Skipped(self._bad_lines, users, times)

    def _survey(self) -> dict[str, int]:
        """Counts over all events."""
        asked = {"rows": "count(*)"}
        as_text = {
            f"f{i}"
            for i, feature in enumerate(self._selection.features)
            if feature.prefix or feature.ids is not None
        }
        for column, kept in self._kept.items():
            if kept.startswith("VARCHAR") and column not in as_text | {"t"}:
                asked |= id_texts.integers(column, kept)
        if self._kept["t"] == "VARCHAR":
            asked |= sql.text_time_counts("t")
        if self._is_json:
            for column in self._kept.keys() - {"u", "t"}:
                asked[f"{column} known"] = f"count(*) FILTER (len({column}) > 0)"
        found = self._ask(asked)
        further = {}
        for column, kept in self._kept.items():
            if f"{column} texts" in found and not id_texts.only_integers(column, found):
                further |= id_texts.numbers(column, kept)
        return found | (self._ask(further) if further else {})

    def _ask(self, aggregates: dict[str, str]) -> dict[str, int]:
        (values,) = self._run(f"SELECT {', '.join(aggregates.values())} FROM events")
        return dict(zip(aggregates, values, strict=True))

    def _refuse_rounded_texts(self, found: dict[str, int]) -> None:
        names = {"u": f"{self._selection.user} (--user)"}
        names |= {
            f"f{i}": f"{f.column} (--features)" for i, f in enumerate(self._selection.features)
        }
        for column, name in names.items():
            number = id_texts.rounded(column, found) if f"{column} rounded" in found else None
            if number is not None:
                raise UserError(
                    f"{self._firsts[0][1]}: column {name} has only numbers, and {number} may have lost "
                    f"digits when it was written; write the column anew as whole numbers or texts"
                )

    def _check_keys(self, found: dict[str, int]) -> None:
        """Refuses a key that no object has, which might be any misspelt word."""
        for i, feature in enumerate(self._selection.features):
            if not found[f"f{i} known"]:
                raise UserError(
                    f"{self._firsts[0][1]}: expected objects with the key {feature.column} "
                    f"(--features), found no value of it in {found['rows']:,} events; correct its name, "
                    f"or leave it out"
                )

    def _refuse_objects(self) -> None:
        """Refuses ids that are JSON objects, or arrays in arrays."""
        names = {"u": (self._selection.user, "--user")}
        names |= {f"f{i}": (f.column, "--features") for i, f in enumerate(self._selection.features)}
        for column, (name, flag) in names.items():
            ids = column if self._kept[column].endswith("[]") else f"[{column}]"
            nested = "(starts_with(v, '{') OR starts_with(v, '[')) AND json_valid(v)"
            found = self._run(
                f"SELECT v FROM (SELECT unnest([v FOR v IN {ids} IF {nested}]) AS v FROM events) LIMIT 1"
            )
            for (value,) in found:
                raise UserError(
                    f"{self._firsts[0][1]}: key {name} ({flag}): expected numbers, texts or arrays of "
                    f"them, found {_shorten(value)}; name a key inside objects as {name}.KEY"
                )

    def _refuse_first(self, bad: int, time_kind: str) -> None:
        ((place, no_user, time),) = self._run(
            "SELECT place, u IS NULL, CAST(t AS VARCHAR) FROM typed "
            "WHERE u IS NULL OR seconds IS NULL ORDER BY place LIMIT 1"
        )
        first, path = self._firsts[bisect.bisect_right(self._firsts, place, key=lambda x: x[0]) - 1]
        column, expected, found = self._selection.user, "a user", "none"
        if no_user and time is None and self._is_json:
            expected = "a JSON object with a user"
        if not no_user:
            column, expected = self._selection.time, _TIME_NAMES[time_kind.partition("(")[0]]
            found = "none" if time is None else _shorten(time)
        raise UserError(
            f"{path}: row {place - first + 1}, column {column}: expected {expected}, found {found}; "
            f"mend it, or leave such rows out with --on_error skip ({bad:,} in all)"
        )

    # ------------------------------------------------------------------------------------ reading

    def read(self) -> Iterator[pa.RecordBatch]:
        """The events by user and time, equal ones in the order of the sources.

        Columns: `user_id`, the features, whose missing ids are null, and `timestamp`.

        Raises:
          UserError: there is no room to sort them.
        """
        values, joins = ["u AS user_id"], ""
        for i, feature in enumerate(self._selection.features):
            value = f"f{i}"
            if feature.ids is not None:
                keys, texts = pa.array(feature.ids), list(map(list, feature.ids.values()))
                lists = pa.array(texts, pa.list_(pa.string()))
                self._database.register(f"ids{i}", pa.table({"source": keys, "ids": lists}))
                joins += f" LEFT JOIN ids{i} ON ids{i}.source = f{i}"
                value = f"ids{i}.ids"
            if feature.prefix:
                value = f"{sql.text(feature.prefix)} || {value}"
            values.append(f"{value} AS {sql.name(feature.name)}")
        query = (
            f"SELECT {', '.join(values)}, seconds AS timestamp FROM typed{joins} "
            f"WHERE u IS NOT NULL AND seconds IS NOT NULL ORDER BY u, time, place"
        )
        with _explained("the events"):
            yield from pa.RecordBatchReader.from_stream(self._database.sql(query))

    def _run(self, query: str, what: str = "the events") -> list[tuple]:
        with _explained(what):
            return self._database.execute(query).fetchall()


@contextlib.contextmanager
def _explained(what: str) -> Iterator[None]:
    try:
        yield
    except duckdb.OutOfMemoryException as error:
        raise UserError(
            f"{what}: more memory or room on disk is needed ({_reason(error)}); raise --memory_limit, "
            f"or name a larger disk with --temp_dir"
        ) from error
    except (duckdb.Error, pa.ArrowException, OSError) as error:
        raise UserError(f"{what}: DuckDB failed: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """The first line of a message: others quote the query."""
    lines = str(error).split("\n")
    return " ".join(lines[0].split()) or type(error).__name__


def _shorten(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…"
