"""Carries out a conversion with Spark, which reads pieces in parallel and sorts on many disks.

DuckDB reads each piece with the same SQL as on one machine, so both engines write the same log.
"""

import contextlib
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import pyarrow as pa
from pyspark import StorageLevel
from pyspark.sql import DataFrame

from s2s_jax.data.conversion import events
from s2s_jax.data.conversion.checking import Check, Checked, summed
from s2s_jax.data.conversion.description import Description
from s2s_jax.data.conversion.duckdb_engine import check_formats, types_of
from s2s_jax.data.conversion.events import BadEvents, Stored
from s2s_jax.data.conversion.grouping import Tally
from s2s_jax.data.conversion.reading.database import Database
from s2s_jax.data.conversion.spark import tables, tasks
from s2s_jax.data.conversion.spark.start import as_user_error, open_spark, unpersist
from s2s_jax.data.conversion.spark.tasks import Loading, Report, Scratch
from s2s_jax.errors import UserError

# The driver holds the rows of one or two windows of users at a time; each has about this many events.
_WINDOW = 1_000_000
_SPARK_TYPES = {
    "BIGINT": "bigint",
    "VARCHAR": "string",
    "TIMESTAMP": "timestamp_ntz",
    "DECIMAL(38,9)": "decimal(38,9)",
}
_ARROW_TYPES = {
    "bigint": pa.int64(),
    "string": pa.string(),
    "timestamp_ntz": pa.timestamp("us"),
    "decimal(38,9)": pa.decimal128(38, 9),
}


class SparkEngine:
    """The events of a conversion, in Spark.

    Attributes:
      bad_lines: the number of lines that could not be read; set by `load`.
      tally: counts of what was grouped; complete after `rows`.
    """

    def __init__(
        self,
        description: Description,
        sources: Sequence[str],
        directory: Path,
        memory_limit: str | None,
        temp_dir: Path | None,
    ):
        """Starts nothing yet.

        Args:
          description: what is converted.
          sources: the files or, if that is the layout, the tables, in order.
          directory: the directory for temporary files of this machine.
          memory_limit: the memory of a local Spark, such as "4GB"; None: as configured.
          temp_dir: the directory for temporary files of the executors; None: their own choice.

        Raises:
          UserError: memory_limit is not a valid size.
        """
        self.bad_lines = 0
        self.tally = Tally()
        self._description = description
        self._sources = list(sources)
        self._directory = directory
        self._memory_limit = memory_limit
        self._temp_dir = temp_dir
        self._opened = contextlib.ExitStack()
        self._final: DataFrame | None = None
        self._events = 0
        self._by_values = False

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as opened:
            # Plans and checks on this machine; it also refuses a wrong size.
            self._database = Database(self._directory, self._memory_limit)
            opened.callback(self._database.close)
            is_table = self._description.layout == "table"
            spark = open_spark(self._directory, self._memory_limit, hive=is_table)
            self._spark = opened.enter_context(spark)
            self._opened = opened.pop_all()
        local = str(self._spark.sparkContext.master).startswith("local")
        parent = self._directory if local else self._temp_dir
        self._scratch = Scratch(None if parent is None else str(parent.absolute()))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._opened.close()

    def progress(self) -> float:
        """The share of the running stage that is done. May be called from another thread."""
        tracker = self._spark.sparkContext.statusTracker()
        stages = [tracker.getStageInfo(stage) for stage in tracker.getActiveStageIds()]
        shares = [s.numCompletedTasks / s.numTasks for s in stages if s is not None and s.numTasks]
        return min(shares, default=0.0)

    # ------------------------------------------------------------------------------------- reading

    def load(self) -> Checked:
        """Reads all events and checks them.

        Raises:
          UserError: a source cannot be read or lacks a column, or there are events that are refused.
        """
        description = self._description
        with as_user_error("the events"):
            if description.layout == "table":
                stored, pieces = self._read_tables()
            else:
                stored, pieces = self._read_files()
            pieces = self._kept(pieces)
            texts = pieces.where("report IS NOT NULL").select("report").collect()
        reports = sorted(Report.of_text(text) for (text,) in texts)
        for report in reports:
            if report.error is not None:
                raise UserError(report.error)
        return self._checked(stored, pieces, reports)

    def _checked(self, stored: Stored, pieces: DataFrame, reports: list[Report]) -> Checked:
        description = self._description
        rows, firsts = 0, {}
        sources: list[tuple[int, str]] = []
        for report in reports:
            firsts[report.number] = rows
            if not sources or sources[-1][1] != report.source:
                sources.append((rows, report.source))
            rows += report.survey.rows
        sources = sources or [(0, self._sources[0])]
        self.bad_lines = sum(report.bad_lines for report in reports)
        survey = summed(report.survey for report in reports)

        def bad_events(kind: str) -> BadEvents:
            found = [(firsts[report.number], report.bad_events[kind]) for report in reports]
            known = [
                bad.first._replace(place=first + bad.first.place)
                for first, bad in found
                if bad.first is not None
            ]
            return BadEvents(
                sum(bad.no_user for _, bad in found),
                sum(bad.no_time for _, bad in found),
                min(known, default=None),
            )

        checked = Check(description, stored, sources, survey).check(bad_events)
        query = events.final_form(
            description.selection, stored, survey, checked.time_kind, place="place"
        )
        ids = events.id_tables(description.selection)
        for name, table in ids.items():
            self._database.register(name, table)
        columns = self._columns_of(stored, query)
        task = tasks.finish(query, ids, firsts, self._scratch)
        self._final = pieces.where("report IS NULL").drop("report").mapInArrow(task, columns)
        self._events = checked.events
        return checked

    def _read_files(self) -> tuple[Stored, DataFrame]:
        """How events are stored, and the events of the files."""
        description, scratch, paths = self._description, self._scratch, self._sources
        numbered = self._spark.sparkContext.parallelize(paths, len(paths))
        described = numbered.map(
            lambda path: tasks.describe_file(description, path, scratch)
        ).collect()
        for found in described:
            if found.error is not None:
                raise UserError(found.error)
        stored = events.stored(description.selection, [found.types for found in described])
        loading, columns = self._loading(stored)
        numbers = self._spark.range(0, len(paths), 1, len(paths))
        return stored, numbers.mapInArrow(tasks.load_files(loading, paths), columns)

    def _read_tables(self) -> tuple[Stored, DataFrame]:
        """How events are stored, and the events of the tables."""
        description = self._description
        found = [
            tables.open_table(self._spark, name, description, self._database)
            for name in self._sources
        ]
        self._by_values = not all(table.has_order for table in found)
        stored = events.stored(
            description.selection, [types_of(description, table.scan) for table in found]
        )
        loading, columns = self._loading(stored)
        frames = [
            table.frame.mapInArrow(tasks.load_table(loading, number, table.scan), columns)
            for number, table in enumerate(found)
        ]
        return stored, functools.reduce(DataFrame.union, frames)

    def _loading(self, stored: Stored) -> tuple[Loading, str]:
        """How pieces are read, and the columns that tasks answer with."""
        check_formats(stored.formats, self._database)
        types = {name: _spark_type(kept) for name, kept in stored.types.items()}
        types |= tasks.PIECE_COLUMNS
        schema = pa.schema([(name, _arrow_type(kind)) for name, kind in types.items()])
        return Loading(self._description, stored, self._scratch, schema), _columns(types)

    def _columns_of(self, stored: Stored, query: str) -> str:
        """The columns of the final form of events."""
        kept = ", ".join(f"{name} {kind}" for name, kind in stored.types.items())
        self._database.run(f"CREATE TABLE events ({kept}, place BIGINT)")
        found = self._database.run(f"DESCRIBE {query}")
        return _columns({name: _spark_type(kind) for name, kind, *_ in found})

    def _kept(self, frame: DataFrame) -> DataFrame:
        """The same rows, which are computed once and kept on the disks of the executors."""
        kept = frame.persist(StorageLevel.DISK_ONLY)
        self._opened.callback(unpersist, kept)
        return kept

    # -------------------------------------------------------------------------------- sorted rows

    def rows(self) -> Iterator[pa.Table]:
        """The rows of the log, one for each user, after `load`.

        Rows are sorted by user, and their events by time; events with equal times keep the order of the
        sources. Columns: `user_id`, the features, and `timestamp`.

        Raises:
          UserError: Spark cannot sort the events, for example because a disk is full.
        """
        assert self._final is not None
        selection = self._description.selection
        features = [f"f{i}" for i in range(len(selection.features))]
        windows = -(-self._events // _WINDOW)
        final = self._final
        final = final.repartitionByRange(windows, "u") if windows > 1 else final.repartition(1)
        ties = features if self._by_values else []
        ordered = final.sortWithinPartitions("u", "time", *ties, "place")
        names = ["user_id", *(feature.name for feature in selection.features), "timestamp"]
        with as_user_error("the events"):
            events_in_order = ordered.select("u", *features, "seconds")
            grouped = self._kept(
                events_in_order.mapInArrow(
                    tasks.group(names, self._description.min_events), tasks.ROW_TYPES
                )
            )
            for (tally,) in grouped.where("tally IS NOT NULL").select("tally").collect():
                self.tally.add(tasks.read_tally(tally))
            answers = grouped.where("rows IS NOT NULL").select("rows")
            for (rows,) in answers.toLocalIterator(prefetchPartitions=True):
                yield tasks.read_rows(rows)


def _spark_type(kind: str) -> str:
    """Spark's name of a type of DuckDB."""
    element = kind.removesuffix("[]")
    found = _SPARK_TYPES[element]
    return found if element == kind else f"array<{found}>"


def _arrow_type(kind: str) -> pa.DataType:
    """The Arrow type of a type of Spark."""
    element = kind.removeprefix("array<").removesuffix(">")
    found = _ARROW_TYPES[element]
    return found if element == kind else pa.list_(found)


def _columns(types: dict[str, str]) -> str:
    """Columns, as Spark wants them described."""
    return ", ".join(f"{name} {kind}" for name, kind in types.items())
