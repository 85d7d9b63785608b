"""What the rules of a first configuration need to know about a log.

Small logs are read completely, and only once; of large logs, a sample of stripes is read.

Shapes: N rows of a stripe.
"""

import dataclasses
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from s2s_jax.data.inspection import columns
from s2s_jax.data.inspection.time_facts import TimeFacts, time_columns
from s2s_jax.data.logs import files, orc, stripe_sample
from s2s_jax.data.logs.index import FileIndex
from s2s_jax.errors import UserError
from s2s_jax.planning.column_summary import ColumnSummary, ColumnTally, Entries, entries_of
from s2s_serve.encoding import arrow, ids
from s2s_serve.storage.address import StorePath, place_of

# Logs with more events are sampled. So many are read in about half a minute: 12 million took 9 s.
_MOST_EVENTS = 30_000_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lengths:
    """Events of the rows that were read.

    Attributes:
      mean: their mean number.
      median: their median number.
      most_have: 95% of the rows have at most this many.
      longest: the number of events of the longest row.
      usable: the share of rows with at least four events: two to learn from and two to hold out.
      ranked: the share of rows with at least three events, whose last ones are ranked in evaluations.
    """

    mean: float
    median: float
    most_have: int
    longest: int
    usable: float
    ranked: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogSummary:
    """What the rules need to know about a log.

    Attributes:
      paths: its files and directories, as in `io.data_paths`.
      rows: number of rows.
      events: number of events; an estimate if `sampled`.
      sampled: whether only some stripes were read.
      lengths: events of rows.
      item: the column of items.
      columns: the other columns of lists that can be features, in the order of the log.
      times: sentences about the columns of times, which are not in `columns`.
      unusable: columns of lists that cannot be features, each with the reason.
      returning: the share of rows whose last event is about an item that the row had before, among rows
        of at least two events.
    """

    paths: str
    rows: int
    events: int
    sampled: bool
    lengths: Lengths
    item: ColumnSummary
    columns: tuple[ColumnSummary, ...]
    times: tuple[str, ...] = ()
    unusable: tuple[tuple[str, str], ...] = ()
    returning: float = 0.0


def read_index(names: Sequence[str]) -> FileIndex:
    """Reads the footers of all files of a log; files without rows are left out.

    Args:
      names: files and directories.

    Raises:
      UserError: a file does not exist or cannot be read, or there are no rows.
    """
    try:
        found = files.find(names)
    except UserError as error:
        raise UserError(str(error).removeprefix("io.data_paths: ")) from error
    read = [file for file in map(orc.read_footer, found.files) if file.rows]
    if not read:
        raise UserError(f"{', '.join(names)}: expected ORC files with rows, found none")
    return FileIndex(tuple(read), notes=tuple(found.notes()))


def summarize(
    index: FileIndex, paths: str, item: str, most_events: int = _MOST_EVENTS
) -> LogSummary:
    """Summarizes a log.

    Args:
      index: the index of its files.
      paths: its files and directories, as in `io.data_paths`.
      item: the name of the column of items.
      most_events: if the log has more events, a sample of its stripes with about as many is read.

    Raises:
      UserError: a stripe cannot be read, or the log has no such column, no events, or rows that are too
        short to learn from.
      MachineError: a stripe cannot be read on this machine.
    """
    reading = _Reading(index, item)
    chosen = _chosen(index, most_events)
    for stripe in chosen:
        reading.add(stripe)
    rows = sum(index.stripe_rows)
    events = reading.events * rows / sum(index.stripe_rows[stripe] for stripe in chosen)
    sampled = len(chosen) < len(index.stripes)
    lengths = _lengths(reading.lengths, paths)
    summaries = {name: tally.summary(sampled) for name, tally in reading.tallies.items()}
    return LogSummary(
        paths=paths,
        rows=rows,
        events=round(events),
        sampled=sampled,
        lengths=lengths,
        item=_checked_item(summaries.pop(item), paths),
        columns=tuple(summaries.values()),
        times=tuple(reading.time_sentences()),
        unusable=tuple(reading.unusable.items()),
        returning=reading.returning_rows / max(reading.long_rows, 1),
    )


class _Reading:
    """Counts the columns of stripes."""

    def __init__(self, index: FileIndex, item: str):
        self._index, self._item = index, item
        self.lengths: Counter[int] = Counter()
        # Rows of at least two events, and those of them that end with an item that they had before.
        self.long_rows = self.returning_rows = 0
        self.unusable: dict[str, str] = {}
        schema = index.files[0].schema
        # Times are only talked about, so a file without them is no mistake.
        everywhere = set.intersection(*(set(time_columns(f.schema, None)) for f in index.files))
        self._times = {
            name: TimeFacts(name, None)
            for name in time_columns(schema, None)
            if name in everywhere and not any(name in file.encrypted for file in index.files)
        }
        # Rows that end with two events at different times, and all rows of two or more events.
        self._ends: dict[str, list[int]] = {name: [0, 0] for name in self._times}
        self.tallies = {name: ColumnTally(name, schema.field(name).type) for name in self._usable()}

    def _usable(self) -> list[str]:
        """The item column and other columns that can be features."""
        schema = self._index.files[0].schema
        if schema.names.count(self._item) != 1:
            raise UserError(
                f"{self._index.files[0].path}: expected a column {self._item} with the items, found "
                f"{', '.join(schema.names)}; name the column of the items with --item_feature"
            )
        names = [self._item]
        for field in schema:
            reason = self._reason_against(field)
            if field.name == self._item:
                if reason is not None:
                    raise UserError(
                        f"{self._index.files[0].path}: expected a column {self._item} of lists of ids, "
                        f"with one list for each user, found {field.type} ({reason}); name another "
                        f"column with --item_feature, or convert the log with s2s convert"
                    )
            elif reason is not None:
                self.unusable[field.name] = reason
            elif arrow.is_list(field.type) and field.name not in self._times:
                names.append(field.name)
        return names

    def _reason_against(self, field: pa.Field) -> str | None:
        """Why a column cannot be a feature; None if it can, or if it is not about events."""
        if field.name != self._item and not arrow.is_list(field.type):
            return None
        if any(file.schema.names.count(field.name) != 1 for file in self._index.files):
            return "not exactly once in every file"
        if any(field.name in file.encrypted for file in self._index.files):
            return "encrypted"
        for file in self._index.files:
            other = file.schema.field(field.name).type
            if not _alike(field.type, other):
                return f"{field.type} in {self._index.files[0].path}, but {other} in {file.path}"
        if pa.types.is_floating(arrow.leaf_type(field.type)):
            return "numbers with fractions, which only op bucketize can read"
        if not columns.can_be_feature(field.type):
            return f"its type {field.type}"
        return None

    @property
    def events(self) -> int:
        return sum(length * count for length, count in self.lengths.items())

    def add(self, stripe: int) -> None:
        """Counts the columns of a stripe."""
        file, number, first_row = self._index.stripes[stripe]
        arrays = _read(file, number, [*self.tallies, *self._times])
        items = entries_of(arrays[self._item])
        self.lengths.update(
            dict(
                zip(
                    *(x.tolist() for x in np.unique(items.lengths_N, return_counts=True)),
                    strict=True,
                )
            )
        )
        self._count_returning(items)
        for name in list(self.tallies):
            entries = items if name == self._item else entries_of(arrays[name])
            if not _agree(entries, items):
                del self.tallies[name]
                self.unusable[name] = (
                    f"its rows and those of {self._item} differ in length, for the first time in "
                    f"{file.path} after row {first_row:,}"
                )
                continue
            self.tallies[name].add(entries, items)
        for name, facts in self._times.items():
            facts.add(arrays[name])
            self._count_ends(name, entries_of(arrays[name]))

    def _count_returning(self, items: Entries) -> None:
        lengths_N, hash_P = items.lengths_N, items.hash_P
        row_P = np.repeat(np.arange(len(lengths_N)), lengths_N)
        last_P = hash_P[np.cumsum(lengths_N)[row_P] - 1]
        # Padding and events without an item have hash 0.
        same_P = (hash_P == last_P) & (last_P != 0)
        same_N = np.bincount(row_P, same_P, minlength=len(lengths_N))
        self.returning_rows += int((same_N > 1).sum())
        self.long_rows += int((lengths_N > 1).sum())

    def _count_ends(self, name: str, times: Entries) -> None:
        last_N = np.cumsum(times.lengths_N)[times.lengths_N > 1] - 1
        self._ends[name][0] += int((times.hash_P[last_N] != times.hash_P[last_N - 1]).sum())
        self._ends[name][1] += len(last_N)

    def time_sentences(self) -> list[str]:
        """Sentences about the times, and how many rows end with two different times."""
        sentences = []
        for name, facts in self._times.items():
            sentences += [sentence + "." for sentence in facts.sentences()]
            distinct, rows = self._ends[name]
            if rows:
                sentences.append(
                    f"In {distinct / rows:.0%} of the rows the last two times of column {name} differ."
                )
        return sentences


def _alike(one: pa.DataType, other: pa.DataType) -> bool:
    """Whether columns of two files may be one feature: integers of another size are the same ids."""
    if one == other:
        return True
    leaves = arrow.leaf_type(one), arrow.leaf_type(other)
    same_kind = all(map(pa.types.is_integer, leaves)) or all(map(ids.is_text, leaves))
    return arrow.is_list(one) and arrow.is_list(other) and same_kind


def _read(file: orc.OrcFile, stripe: int, names: Sequence[str]) -> dict[str, pa.Array]:
    """The columns of a stripe."""
    batch = orc.read_stripe(file, stripe, names)
    return {name: batch.column(name) for name in names}


def _agree(entries: Entries, items: Entries) -> bool:
    """Whether training can read a column together with the items: empty rows are allowed."""
    there_N = (entries.lengths_N > 0) & (items.lengths_N > 0)
    return bool((entries.lengths_N[there_N] == items.lengths_N[there_N]).all())


def _chosen(index: FileIndex, most_events: int) -> list[int]:
    """The stripes to read: all of them, or at least the number of a usual sample."""
    events = sum(file.positions for file in index.files)
    stripes = len(index.stripes)
    if events <= most_events:
        return list(range(stripes))
    return stripe_sample.spread(index, max(stripes * most_events // events, stripe_sample.STRIPES))


def _lengths(counts: Counter[int], paths: str) -> Lengths:
    rows = counts.total()
    longest = max(counts)
    if longest == 0:
        raise UserError(f"{paths}: expected rows with events, found only empty ones")
    usable = sum(count for length, count in counts.items() if length >= 4)
    if not usable:
        raise UserError(
            f"{paths}: expected rows with at least 4 events (2 to learn from, 2 to hold out), found "
            f"at most {longest:,}; give each user one row with all of their events (s2s convert does)"
        )
    return Lengths(
        mean=sum(length * count for length, count in counts.items()) / rows,
        median=columns.median(counts),
        most_have=columns.percentile(counts, 95),
        longest=longest,
        usable=usable / rows,
        ranked=sum(count for length, count in counts.items() if length >= 3) / rows,
    )


def _checked_item(item: ColumnSummary, paths: str) -> ColumnSummary:
    if item.largest_bag > 1:
        raise UserError(
            f"{paths}: expected one item for each event, found up to {item.largest_bag:,} in column "
            f"{item.name}; name another column with --item_feature"
        )
    if item.distinct < 2:
        raise UserError(
            f"{paths}: expected several items in column {item.name}, found {item.distinct}; name "
            f"another column with --item_feature"
        )
    return item


def absolute(names: Sequence[str]) -> list[str]:
    """Paths that stay right in any working directory."""
    places = [place_of(name) for name in names]
    return [str(place if isinstance(place, StorePath) else place.absolute()) for place in places]
