"""Groups events, which are sorted by user and then by time, into one row per user.

Shapes: E events, U users, T ids.
"""

# pyarrow.compute makes its functions at run time.
# pyright: reportAttributeAccessIssue=false

import dataclasses
from collections.abc import Iterable, Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from s2s_serve.encoding.arrow import is_list, list_lengths


@dataclasses.dataclass
class Tally:
    """Counts of what was grouped.

    Attributes:
      short_users: users with too few events, which are left out.
      short_events: events of these users.
      largest_bags: the largest bag of each column.
    """

    short_users: int = 0
    short_events: int = 0
    largest_bags: dict[str, int] = dataclasses.field(default_factory=dict)

    def add(self, other: "Tally") -> None:
        """Adds the counts of other users."""
        self.short_users += other.short_users
        self.short_events += other.short_events
        for name, most in other.largest_bags.items():
            self.note_bag(name, most)

    def note_bag(self, name: str, size: int) -> None:
        """Notes that a column has a bag of this size."""
        known = self.largest_bags[name] if name in self.largest_bags else 0
        self.largest_bags[name] = max(known, size)


class Grouping:
    """Groups events into rows.

    Attributes:
      tally: counts of what was grouped so far.
    """

    def __init__(self, min_events: int):
        """Starts without events; users with fewer than `min_events` events will be left out."""
        self.tally = Tally()
        self._min_events = min_events

    def rows(self, batches: Iterable[pa.RecordBatch]) -> Iterator[pa.Table]:
        """One row for each user, in the order of the events.

        Args:
          batches: events, those of a user one after another. The first column is the user; others
            are ids or lists of ids.

        Yields:
          Tables of the user, and of a list<list<T>> for each of the other columns. A missing id is an
          empty list.
        """
        # Events of the last user so far; the next batch may have more.
        waiting: list[pa.RecordBatch] = []
        for batch in batches:
            users = [waiting[-1].column(0)[-1:]] if waiting else []
            changes = np.flatnonzero(_differs(pa.chunked_array([*users, batch.column(0)])))
            if len(changes) == 0:
                waiting.append(batch)
                continue
            # First event of the user at the end of the batch.
            begin = int(changes[-1]) + (0 if waiting else 1)
            yield self._nest([*waiting, batch[:begin]])
            waiting = [batch[begin:]]
        if waiting:
            yield self._nest(waiting)

    def _nest(self, batches: list[pa.RecordBatch]) -> pa.Table:
        events = pa.Table.from_batches(batches).combine_chunks()
        user_E = _array(events.column(0))
        changes = np.flatnonzero(_differs(user_E)) + 1
        starts_U = np.concatenate([[0], changes, [events.num_rows]])
        columns = {events.column_names[0]: user_E.take(pa.array(starts_U[:-1]))}
        for name, column in zip(events.column_names[1:], events.columns[1:], strict=True):
            values, counts_E = _ids(_array(column))
            self.tally.note_bag(name, int(counts_E.max()))
            positions = pa.ListArray.from_arrays(_ends(counts_E), values)
            columns[name] = pa.ListArray.from_arrays(pa.array(starts_U, pa.int32()), positions)
        table = pa.table(columns)
        lengths_U = np.diff(starts_U)
        short_U = lengths_U < self._min_events
        if short_U.any():
            self.tally.short_users += int(short_U.sum())
            self.tally.short_events += int(lengths_U[short_U].sum())
            table = table.filter(pa.array(~short_U))
        return table


def _array(column: pa.ChunkedArray) -> pa.Array:
    """The array of a column whose chunks were combined into one."""
    (array,) = column.chunks
    return array


def _differs(user_E: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """bool `[E - 1]`: whether an event has a different user than the event before it."""
    return pc.not_equal(user_E[1:], user_E[:-1]).to_numpy(zero_copy_only=False)


def _ids(values_E: pa.Array) -> tuple[pa.Array, np.ndarray]:
    """All ids that are not missing, `[T]`, and the number of ids of each event, int64 `[E]`."""
    if is_list(values_E.type):
        return values_E.flatten(), list_lengths(values_E)
    known_E = values_E.is_valid().to_numpy(zero_copy_only=False)
    return values_E.drop_null(), known_E.astype(np.int64)


def _ends(counts: np.ndarray) -> pa.Array:
    return pa.array(np.concatenate([[0], np.cumsum(counts)]), pa.int32())
