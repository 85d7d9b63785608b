"""Events in a DuckDB database on disk: loaded in file order, read sorted by user, then time.

DuckDB sorts on disk what does not fit in memory.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

import pyarrow as pa
import pyarrow.parquet

from s2s_jax.data.conversion import grouped, times
from s2s_jax.data.conversion.checking import Events, check
from s2s_jax.data.conversion.reading import sql
from s2s_jax.data.conversion.reading.database import Database, reason, shorten
from s2s_jax.data.conversion.selection import Selection
from s2s_jax.errors import UserError

# Rejections that mean exactly one lost event; an unclosed quote may mean many.
_ONE_LINE = ("MISSING COLUMNS", "TOO MANY COLUMNS", "INVALID ENCODING")
_ARROW_NAMES = {"FLOAT": "float32", "DOUBLE": "float64"}


class Skipped(NamedTuple):
    """Counts of events that were left out, by reason."""

    lines: int
    users: int
    times: int


class EventStore:
    """The events of a log.

    Attributes:
      events: the number of events that are kept; set by `check`.
    """

    def __init__(self, selection: Selection, directory: Path, memory_limit: str | None):
        """Creates an empty database.

        Args:
          selection: the columns of an event.
          directory: the directory of the database and of temporary files of the sort.
          memory_limit: the memory limit of DuckDB, such as "4GB"; None: 80% of the memory.

        Raises:
          UserError: memory_limit is not a valid size.
        """
        self.events = 0
        self._selection = selection
        # Columns of the table: u, t (if there are times), and f0, f1 … for the features; their types.
        self._kept: dict[str, str] = {}
        # The first row of each file.
        self._firsts: list[tuple[int, Path]] = []
        self._bad_lines = 0
        self._is_json = False
        self._database = Database(directory, memory_limit)

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
        """Percent done of the running query. May be called from another thread."""
        return self._database.progress()

    # ------------------------------------------------------------------------------------ loading

    def parquet(self, path: Path) -> sql.Scan:
        """The scan of a Parquet file.

        Raises:
          UserError: it is not a Parquet file.
        """
        scan = sql.scan_parquet(path)
        found = self._database.run(f"DESCRIBE SELECT * FROM {scan}", str(path))
        try:
            # From the file itself: DuckDB renames columns whose names differ only in case.
            names = pyarrow.parquet.read_schema(path).names
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{path}: expected a Parquet file ({reason(error)})") from error
        assert len(names) == len(found)
        pairs = zip(names, found, strict=True)
        columns = {name: sql.Column(sql.name(row[0]), row[1]) for name, row in pairs}
        return sql.Scan(path, scan, columns, sql.repeated(names))

    def prepare(self, scans: Sequence[sql.Scan]) -> list[sql.Scan]:
        """Creates the table for the events of `scans`, and returns the scans to load.

        Raises:
          UserError: a file lacks a column, or has it in a type that cannot be used.
        """
        chosen = self._selection
        for scan in scans:
            self._check_columns(scan)
        scans = [grouped.unrolled(scan, chosen, self._database) for scan in scans]
        for scan in scans:
            for column, flag in chosen.columns.items():
                found = scan.columns[column].type
                if not sql.supported(found, lists=flag == "--features"):
                    raise UserError(
                        f"{scan.path}: column {column} ({flag}): expected integers, texts or times, "
                        f"found {found}"
                    )

        def types(column: str) -> set[str]:
            return {scan.columns[column].type for scan in scans}

        self._kept["u"] = sql.stored_user(types(chosen.user))
        for form in set(chosen.time_formats) - {times.NUMBER}:
            self._database.run(
                f"SELECT try_strptime('', {sql.text(form)})", f"--time_format {form}"
            )
        if chosen.time is not None:
            self._kept["t"] = times.stored(types(chosen.time), chosen.time_formats)
        for i, feature in enumerate(chosen.features):
            is_bag = feature.separator is not None
            self._kept[f"f{i}"] = sql.stored_feature(types(feature.column), is_bag)
        self._is_json = "JSON" in types(chosen.user)
        columns = ", ".join(f"{column} {kept}" for column, kept in self._kept.items())
        self._database.run(f"CREATE TABLE events ({columns})")
        return scans

    def _check_columns(self, scan: sql.Scan) -> None:
        for column, flag in self._selection.columns.items():
            if column not in scan.columns:
                remedy = ""
                if flag == "--time_column":
                    remedy = (
                        f"; if the order of lines is the order of events: "
                        f"--time_column {times.NO_COLUMN}"
                    )
                elif len(scan.columns) == 1 and any(
                    sign in next(iter(scan.columns)) for sign in ",;|\t"
                ):
                    remedy = "; give the delimiter with --delimiter"
                elif any(known.isdigit() for known in scan.columns):
                    remedy = "; if the first line is an event, give names of columns with --columns"
                raise UserError(
                    f"{scan.path}: no column {column} ({flag}); it has "
                    f"{', '.join(scan.columns) or 'no columns'}{remedy}"
                )
            if column in scan.twice:
                raise UserError(
                    f"{scan.path}: {column} ({flag}) is the name of several columns; rename them"
                )

    def load(self, scan: sql.Scan, skip: bool) -> None:
        """Adds the events of a file, in its order.

        Args:
          scan: one of the scans that `prepare` returned.
          skip: whether lines that cannot be read are left out and counted; otherwise they are errors.

        Raises:
          UserError: the file cannot be read.
        """
        chosen = self._selection
        values = [sql.user_or_time(scan.columns[chosen.user], self._kept["u"], chosen.missing)]
        if chosen.time is not None:
            time = scan.columns[chosen.time]
            values.append(sql.user_or_time(time, self._kept["t"], chosen.missing))
        for i, feature in enumerate(chosen.features):
            column, kept = scan.columns[feature.column], self._kept[f"f{i}"]
            values.append(sql.feature(column, kept, chosen.missing, feature.separator))
        self._refuse_rounded(scan)
        ((rows,),) = self._database.run("SELECT count(*) FROM events")
        self._firsts.append((rows, scan.path))
        # Rows are numbered by rowid in the order of the file.
        query = f"INSERT INTO events SELECT {', '.join(values)} FROM {scan.sql}"
        self._database.run(query, str(scan.path))
        if scan.sql.startswith("read_csv"):
            self._count_bad_lines(scan, skip)

    def _refuse_rounded(self, scan: sql.Scan) -> None:
        """Refuses whole numbers of a file that are kept as fractions and may have lost digits."""
        queries = {}
        for column, flag in self._selection.columns.items():
            aggregate = sql.rounded(scan.columns[column])
            # Times as float64 are exact enough in any unit.
            is_time = flag == "--time_column" and scan.columns[column].type != "FLOAT"
            if aggregate is not None and not is_time:
                queries[column] = aggregate
        for column, value in self._database.aggregate(queries, scan.sql, str(scan.path)).items():
            if value is not None:
                kind = _ARROW_NAMES[scan.columns[column].type.removesuffix("[]")]
                raise UserError(
                    f"{scan.path}: column {column} ({self._selection.columns[column]}) has "
                    f"{value:.17g} as {kind}, which may have lost digits; write it again as whole "
                    f"numbers, times or texts"
                )

    def _count_bad_lines(self, scan: sql.Scan, skip: bool) -> None:
        ((lines,),) = self._database.run("SELECT count(DISTINCT line) FROM reject_errors")
        worst = self._database.run(
            f"SELECT error_type IN {_ONE_LINE}, line, error_message, csv_line FROM reject_errors "
            f"ORDER BY 1, 2 LIMIT 1"
        )
        self._database.run("DROP TABLE reject_errors")
        self._database.run("DROP TABLE reject_scans")
        self._bad_lines += lines
        for one_line, line, message, found in worst:
            if one_line and skip:
                return
            remedy = "fix it, or leave such lines out with --on_error skip"
            if "utf-8" in message.lower():
                remedy = "name its encoding with --encoding, such as latin-1; or " + remedy
            if not one_line:
                # An unclosed quote swallows an unknown number of lines after it.
                remedy = "fix it, or give --quote '' if quotation marks have no meaning"
            raise UserError(
                f"{scan.path}: line {line} cannot be read ({shorten(message)}): {shorten(found)}; "
                f"{remedy}"
            )

    # ------------------------------------------------------------------------ checking and reading

    def check(self, skip: bool) -> Skipped:
        """Chooses the types of ids and times, and finds events without a user or a time.

        Columns of texts become integers if every text is a whole number.

        Args:
          skip: whether such events are left out and counted; otherwise they are errors.

        Raises:
          UserError: there are such events, or no other events, or a required column has no values.
        """
        events = Events(self._database, self._selection, self._kept, self._firsts, self._is_json)
        self.events, no_user, no_time = check(events, skip)
        return Skipped(self._bad_lines, no_user, no_time)

    def read(self) -> Iterator[pa.RecordBatch]:
        """The events sorted by user, then time; events with equal times keep the order of the sources.

        Columns: `user_id`, the features, whose missing ids are null, and `timestamp`.

        Raises:
          UserError: the disk is too full to sort them.
        """
        values, joins = ["u AS user_id"], ""
        for i, feature in enumerate(self._selection.features):
            value = f"f{i}"
            if feature.ids is not None:
                keys, texts = pa.array(feature.ids), list(map(list, feature.ids.values()))
                lists = pa.array(texts, pa.list_(pa.string()))
                self._database.register(f"ids{i}", pa.table({"source": keys, "ids": lists}))
                # pandas may have written 12 as 12.0.
                key = f"regexp_replace(f{i}, '\\.0+$', '')"
                joins += f" LEFT JOIN ids{i} ON ids{i}.source = {key}"
                value = f"ids{i}.ids"
            if feature.prefix:
                value = f"{sql.text(feature.prefix)} || {value}"
            values.append(f"{value} AS {sql.name(feature.name)}")
        yield from self._database.stream(
            f"SELECT {', '.join(values)}, seconds AS timestamp FROM typed{joins} "
            f"WHERE u IS NOT NULL AND seconds IS NOT NULL ORDER BY u, time, place"
        )
