"""What Spark's tasks do with their share of the events. Everything here runs on the executors.

A piece is a source, or a part of it, that one task reads into a database of its own. Errors of a piece
are part of its report, so that the first of all pieces can be told, as one machine would.
"""

import contextlib
import dataclasses
import itertools
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from s2s_jax.data.conversion.description import Description
from s2s_jax.data.conversion.duckdb_engine import types_of
from s2s_jax.data.conversion.events import BadEvent, BadEvents, EventTable, Stored, Survey
from s2s_jax.data.conversion.grouping import Grouping, Tally
from s2s_jax.data.conversion.reading import sql
from s2s_jax.data.conversion.reading.database import Database
from s2s_jax.data.conversion.reading.scans import scan_file
from s2s_jax.data.logs.log_directory import SORTING
from s2s_jax.errors import UserError

Task = Callable[[Iterator[pa.RecordBatch]], Iterator[pa.RecordBatch]]
# The memory of DuckDB in a task; a larger piece goes to the disk.
_MEMORY = "512MB"
# Numbers of pieces of a table: its number, the number of the task, and of the piece in the task.
_TABLE, _TASK = 2**44, 2**22
PIECE_COLUMNS = {"piece": "bigint", "place": "bigint", "report": "string"}
ROW_TYPES = "rows binary, tally string"


class Place(NamedTuple):
    """Where a piece is among all pieces: the order of the events is that of these tuples.

    Attributes:
      source: the number of the source.
      file: the file of a table; empty if the source is a file.
      start: the first byte of the piece in the file.
    """

    source: int
    file: str
    start: int


class Report(NamedTuple):
    """What a task found in a piece.

    Attributes:
      place: the place of the piece.
      number: the number of the piece in its events.
      source: the name of the source.
      error: the sentence that refuses it; None if it was read. What follows is then empty.
      bad_lines: the number of lines that could not be read.
      survey: counts over its events.
      bad_events: its events without a user or a time, for each type that times can have.
    """

    place: Place
    number: int
    source: str
    error: str | None
    bad_lines: int
    survey: Survey
    bad_events: Mapping[str, BadEvents]

    def as_text(self) -> str:
        """The report as JSON."""
        return json.dumps({**self._asdict(), "survey": dataclasses.asdict(self.survey)})

    @classmethod
    def of_text(cls, text: str) -> "Report":
        """The report of which this is the JSON."""
        found = json.loads(text)
        bad = {}
        for kind, (no_user, no_time, first) in found["bad_events"].items():
            bad[kind] = BadEvents(no_user, no_time, None if first is None else BadEvent(*first))
        return cls(
            **found
            | {
                "place": Place(*found["place"]),
                "survey": Survey(**found["survey"]),
                "bad_events": bad,
            }
        )


class Described(NamedTuple):
    """The types of the columns of a source, or the sentence that refuses it."""

    types: dict[str, str]
    error: str | None


@dataclasses.dataclass(frozen=True)
class Scratch:
    """Where tasks keep temporary files.

    Attributes:
      parent: the directory; None: the usual one of the executor.
    """

    parent: str | None

    @contextlib.contextmanager
    def database(self) -> Iterator[tuple[Database, Path]]:
        """A new database, and the directory that holds it."""
        with tempfile.TemporaryDirectory(prefix=SORTING, dir=self.parent) as name:
            database = Database(Path(name), _MEMORY)
            try:
                database.run("SET threads = 1")
                yield database, Path(name)
            finally:
                database.close()


# ------------------------------------------------------------------------------------------- reading


def describe_file(description: Description, path: str, scratch: Scratch) -> Described:
    """The types of the columns of a file."""
    with scratch.database() as (database, directory):
        try:
            scan = scan_file(description, Path(path), database, directory)
            return Described(types_of(description, scan), None)
        except UserError as error:
            return Described({}, str(error))


@dataclasses.dataclass(frozen=True)
class Loading:
    """How pieces are read; the same for all.

    Attributes:
      description: what is read.
      stored: how events are stored.
      scratch: where temporary files go.
      schema: the Arrow types of events in the answer of a task.
    """

    description: Description
    stored: Stored
    scratch: Scratch
    schema: pa.Schema

    def piece(
        self,
        place: Place,
        number: int,
        source: str,
        scan: Callable[[Database, Path], sql.Scan],
    ) -> Iterator[pa.RecordBatch]:
        """The events of a piece, and then its report."""
        with self.scratch.database() as (database, directory):
            table = EventTable(database, self.description, self.stored)
            try:
                bad_lines = table.load(scan(database, directory))
            except UserError as error:
                report = Report(place, number, source, str(error), 0, Survey(0, {}, {}), {})
            else:
                bad = {kind: table.bad_events(kind) for kind in self.stored.time_kinds}
                report = Report(place, number, source, None, bad_lines, table.survey(), bad)
                query = f"SELECT *, CAST({number} AS BIGINT), rowid, CAST(NULL AS VARCHAR)"
                for batch in database.stream(f"{query} FROM events"):
                    yield pa.RecordBatch.from_arrays(
                        [a.cast(t) for a, t in zip(batch.columns, self.schema.types, strict=True)],
                        schema=self.schema,
                    )
            yield self._only(report.as_text())

    def _only(self, report: str) -> pa.RecordBatch:
        arrays = [pa.nulls(1, kind) for kind in self.schema.types[:-1]]
        return pa.RecordBatch.from_arrays([*arrays, pa.array([report])], schema=self.schema)


def load_files(loading: Loading, paths: list[str]) -> Task:
    """Reads the files whose numbers a task gets."""

    def task(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            for number in batch.column(0).to_pylist():
                path = Path(paths[number])

                def scan(database: Database, directory: Path, path: Path = path) -> sql.Scan:
                    return scan_file(loading.description, path, database, directory)

                yield from loading.piece(Place(number, "", 0), number, paths[number], scan)

    return task


def load_table(loading: Loading, number: int, scan: sql.Scan) -> Task:
    """Reads the rows of a table that a task gets.

    The last two columns are the file that a row is from, and the first byte of its part of the file. A
    task gets the rows of a part one after another, in their order.
    """

    def task(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        from pyspark import TaskContext

        context = TaskContext.get()
        assert context is not None
        first = number * _TABLE + context.partitionId() * _TASK
        for i, ((file, start), parts) in enumerate(
            itertools.groupby(_same_part(batches), key=lambda part: part[0])
        ):
            source = f"{scan.source} ({file})" if file else scan.source

            def rows(
                database: Database,
                directory: Path,
                source: str = source,
                parts: Iterator[tuple[tuple[str, int], pa.RecordBatch]] = parts,
            ) -> sql.Scan:
                for j, (_, batch) in enumerate(parts):
                    database.register("arrived", pa.Table.from_batches([batch]))
                    how = "INSERT INTO source" if j else "CREATE TABLE source AS"
                    database.run(f"{how} SELECT * FROM arrived", source)
                return dataclasses.replace(scan, source=source)

            yield from loading.piece(Place(number, file, start), first + i, source, rows)

    return task


def _same_part(
    batches: Iterator[pa.RecordBatch],
) -> Iterator[tuple[tuple[str, int], pa.RecordBatch]]:
    """Slices of the batches whose rows are from the same part of a file."""
    for batch in batches:
        if batch.num_rows == 0:
            continue
        file, start = batch.columns[-2].dictionary_encode(), batch.columns[-1]
        codes = np.asarray(file.indices), start.to_numpy(zero_copy_only=False)
        changes = np.flatnonzero((np.diff(codes[0]) != 0) | (np.diff(codes[1]) != 0)) + 1
        ends = [*changes.tolist(), batch.num_rows]
        for begin, end in itertools.pairwise([0, *ends]):
            part = file[begin].as_py(), start[begin].as_py()
            yield part, batch.slice(begin, end - begin).select(batch.schema.names[:-2])


# ----------------------------------------------------------------------------- the final form, rows


def finish(
    query: str,
    tables: Mapping[str, pa.Table],
    firsts: Mapping[int, int],
    scratch: Scratch,
) -> Task:
    """Brings events into their final form: see `events.final_form`.

    Args:
      query: the final form, in SQL.
      tables: further tables of the query.
      firsts: the number of the first event of each piece.
      scratch: where temporary files go.
    """
    numbers = np.array(sorted(firsts), np.int64)
    first = np.array([firsts[number] for number in sorted(firsts)], np.int64)

    def task(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        with scratch.database() as (database, _):
            for name, table in tables.items():
                database.register(name, table)
            for batch in batches:
                if batch.num_rows == 0:
                    continue
                of_piece = np.searchsorted(numbers, np.asarray(batch.column("piece")))
                place = np.asarray(batch.column("place")) + first[of_piece]
                events = batch.drop_columns(["piece", "place"])
                events = events.append_column("place", pa.array(place))
                database.register("events", pa.Table.from_batches([events]))
                yield from database.stream(query)

    return task


def group(names: list[str], min_events: int) -> Task:
    """Makes rows of sorted events; answers tables of rows as bytes, and then counts.

    Args:
      names: the names of the columns in the log, in the order of the events' columns.
      min_events: users with fewer events are left out.
    """

    def task(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        grouping = Grouping(min_events)
        named = (
            pa.RecordBatch.from_arrays(batch.columns, names) for batch in batches if batch.num_rows
        )
        for table in grouping.rows(named):
            if table.num_rows:
                sink = pa.BufferOutputStream()
                with pa.ipc.new_stream(sink, table.schema) as writer:
                    writer.write_table(table)
                yield _answer(sink.getvalue().to_pybytes(), None)
        yield _answer(None, json.dumps(dataclasses.asdict(grouping.tally)))

    return task


def _answer(rows: bytes | None, tally: str | None) -> pa.RecordBatch:
    arrays = [pa.array([rows], pa.binary()), pa.array([tally], pa.string())]
    return pa.RecordBatch.from_arrays(arrays, ["rows", "tally"])


def read_rows(rows: bytes) -> pa.Table:
    """The table of an answer of `group`."""
    return pa.ipc.open_stream(rows).read_all()


def read_tally(tally: str) -> Tally:
    """The counts of an answer of `group`."""
    return Tally(**json.loads(tally))
