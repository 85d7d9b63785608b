"""Carries out a conversion with DuckDB, which sorts on disk what does not fit in memory."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import pyarrow as pa

from s2s_jax.data.conversion import events
from s2s_jax.data.conversion.checking import Check, Checked
from s2s_jax.data.conversion.description import Description
from s2s_jax.data.conversion.events import BadEvents, EventTable
from s2s_jax.data.conversion.grouping import Grouping, Tally
from s2s_jax.data.conversion.reading import sql
from s2s_jax.data.conversion.reading.database import Database
from s2s_jax.data.conversion.reading.scans import scan_file


class DuckDBEngine:
    """The events of a conversion, in a database on disk.

    Attributes:
      bad_lines: the number of lines that could not be read; set by `load`.
      tally: counts of what was grouped; complete after `rows`.
    """

    def __init__(
        self,
        description: Description,
        files: Sequence[Path],
        directory: Path,
        memory_limit: str | None,
    ):
        """Creates an empty database.

        Args:
          description: what is converted.
          files: the sources, in order.
          directory: the directory of the database and of temporary files of the sort.
          memory_limit: the memory limit of DuckDB, such as "4GB"; None: 80% of the memory.

        Raises:
          UserError: memory_limit is not a valid size.
        """
        self.bad_lines = 0
        self.tally = Tally()
        self._description = description
        self._files = files
        self._directory = directory
        self._query = ""
        # The share of the files that is read, before the running query and by it.
        self._done, self._running = 0.0, 1.0
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
        """The share of `load` or `rows` that is done. May be called from another thread."""
        return self._done + self._running * self._database.progress() / 100

    def load(self) -> Checked:
        """Reads all events and checks them.

        Raises:
          UserError: a source cannot be read or lacks a column, or there are events that are refused.
        """
        description, database = self._description, self._database
        scans = [scan_file(description, f, database, self._directory) for f in self._files]
        stored = events.stored(description.selection, [types_of(description, s) for s in scans])
        check_formats(stored.formats, database)
        table = EventTable(database, description, stored)
        sizes = [path.stat().st_size for path in self._files]
        sources = []
        for scan, size in zip(scans, sizes, strict=True):
            self._running = size / max(sum(sizes), 1)
            sources.append((table.rows(), scan.source))
            self.bad_lines += table.load(scan)
            self._done += self._running
        survey = table.survey()

        def bad_events(kind: str) -> BadEvents:
            return table.bad_events(kind)

        checked = Check(description, stored, sources, survey).check(bad_events)
        self._query = events.final_form(description.selection, stored, survey, checked.time_kind)
        self._done, self._running = 0.0, 1.0
        return checked

    def rows(self) -> Iterator[pa.Table]:
        """The rows of the log, one for each user, after `load`.

        Rows are sorted by user, and their events by time; events with equal times keep the order of the
        sources. Columns: `user_id`, the features, and `timestamp`.

        Raises:
          UserError: the disk is too full to sort the events.
        """
        selection = self._description.selection
        for name, table in events.id_tables(selection).items():
            self._database.register(name, table)
        features = [f"e.f{i} AS {sql.name(f.name)}" for i, f in enumerate(selection.features)]
        values = ", ".join(("e.u AS user_id", *features, "e.seconds AS timestamp"))
        # A feature may be named like a column of the query, and ORDER BY prefers the new names.
        batches = self._database.stream(
            f"SELECT {values} FROM ({self._query}) AS e ORDER BY e.u, e.time, e.place"
        )
        grouping = Grouping(self._description.min_events)
        self.tally = grouping.tally
        yield from grouping.rows(batches)


def types_of(description: Description, scan: sql.Scan) -> dict[str, str]:
    """The type of each column that is taken from a source."""
    return {column: scan.columns[column].type for column in description.selection.columns}


def check_formats(formats: Sequence[str], database: Database) -> None:
    """Refuses formats of times that DuckDB does not know.

    Raises:
      UserError: names the format.
    """
    for form in formats:
        database.run(f"SELECT try_strptime('', {sql.text(form)})", f"--time_format {form}")
