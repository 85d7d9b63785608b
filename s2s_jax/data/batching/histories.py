"""Histories of users before their target events, for evaluation and recommendation.

Whole rows are read in the order of the files: the model sees the newest events, and the ranking gets
all of them.

Shapes: N rows of a stripe, P positions, U users of a batch, C columns of ids.
"""

import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from s2s_jax.config.settings import Decoding, Logs, ShownHistory
from s2s_jax.data.encoding.held_out import Targets
from s2s_jax.data.encoding.row_decoding import decode_rows
from s2s_jax.data.items import seen
from s2s_jax.data.items.item_counts import codes_of
from s2s_jax.data.items.seen import Seen
from s2s_jax.data.logs import orc
from s2s_jax.data.logs.index import FileIndex, may_skip
from s2s_jax.errors import UserError
from s2s_serve.encoding import blocks, features
from s2s_serve.encoding.arrow import Source
from s2s_serve.encoding.blocks import Block
from s2s_serve.encoding.item_numbers import ItemNumbers

# Maximum number of events in the histories of a batch; a longer history is a batch by itself.
_MOST_POSITIONS = 2**22


class Histories(NamedTuple):
    """A batch of users of the log; places beyond the users are padding.

    Attributes:
      newest: the newest events of each user's history, which the model sees; without padding.
      users: number of users.
      stripe_U: int32, stripe of each user.
      row_U: int64, row of each user in the file.
      target_U: int32, the target item as an index into the catalogue; -1 if it is not in the catalogue,
        or if there are no targets.
      events_U: int32, number of events of the whole history.
      item_P: int32, items of all events of the whole histories, user after user, as indices into the
        catalogue; -1 if not in the catalogue.
      seen: distinct items of the histories; users are numbered in the order of the batch.
    """

    newest: Block
    users: int
    stripe_U: np.ndarray
    row_U: np.ndarray
    target_U: np.ndarray
    events_U: np.ndarray
    item_P: np.ndarray
    seen: Seen

    def items_of(self, user: int) -> np.ndarray:
        """int32: the part of `item_P` of one user."""
        begin = int(self.events_U[:user].sum())
        return self.item_P[begin : begin + int(self.events_U[user])]

    @property
    def shown_U(self) -> np.ndarray:
        """int32 `[U]`: the number of events that the model sees of each user; 0 for padding."""
        shown_U = np.zeros(len(self.events_U), np.int32)
        shown_U[: self.users] = self.newest.lengths_N
        return shown_U

    def shown_of(self, user: int) -> np.ndarray:
        """int32 `[P, C]`: the ids of the events that the model sees of one user."""
        begin = self.newest.begins_N[user]
        return self.newest.values_PC[begin : begin + self.newest.lengths_N[user]]

    def part(self, of: slice) -> "Histories":
        """Users `of.start` to `of.stop - 1`, padding included."""
        begin, stop = of.start, of.stop
        ends = blocks.starts(self.events_U[:stop])
        seen_of = slice(*np.searchsorted(self.seen.user_T, [begin, stop]))
        return Histories(
            blocks.choose(self.newest, of),
            max(min(self.users, stop) - begin, 0),
            self.stripe_U[of],
            self.row_U[of],
            self.target_U[of],
            self.events_U[of],
            self.item_P[ends[begin] : ends[stop]],
            Seen(self.seen.user_T[seen_of] - np.int32(begin), self.seen.item_T[seen_of]),
        )

    def items_of_users(self, chosen_U: np.ndarray) -> tuple[np.ndarray, np.ndarray, Seen]:
        """The items of some users: `item_P`, `events_U` and `seen` as if there were no other users.

        Args:
          chosen_U: bool, which users.
        """
        event_P = np.repeat(chosen_U, self.events_U)
        number_U = (np.cumsum(chosen_U) - 1).astype(np.int32)
        pair_T = chosen_U[self.seen.user_T]
        chosen = Seen(number_U[self.seen.user_T[pair_T]], self.seen.item_T[pair_T])
        return self.item_P[event_P], self.events_U[chosen_U], chosen

    def known_events(self) -> np.ndarray:
        """int64 `[U]`: number of events of each history whose item is in the catalogue."""
        user_P = np.repeat(np.arange(len(self.events_U)), self.events_U)
        return np.bincount(user_P[self.item_P >= 0], minlength=len(self.events_U))


class Rows(NamedTuple):
    """Users of one stripe, with only the necessary parts of their events.

    Attributes:
      stripe: number of the stripe.
      row_N: int64, rows in the file.
      newest: the newest events of each history, packed.
      events_N: int64, number of events of each history.
      item_P: int32, items of all these events.
      target_N: int32, target item.
    """

    stripe: int
    row_N: np.ndarray
    newest: Block
    events_N: np.ndarray
    item_P: np.ndarray
    target_N: np.ndarray

    def part(self, begin: int, stop: int) -> "Rows":
        """Users `begin` to `stop - 1`, without copying."""
        ends = blocks.starts(self.events_N[:stop])
        return Rows(
            self.stripe,
            self.row_N[begin:stop],
            blocks.choose(self.newest, slice(begin, stop)),
            self.events_N[begin:stop],
            self.item_P[ends[begin] : ends[stop]],
            self.target_N[begin:stop],
        )


class HistoryEncoder:
    """Turns rows of a log into batches of histories."""

    def __init__(self, shown: ShownHistory, numbers: ItemNumbers | None, with_empty: bool = False):
        """Prepares encoding.

        Args:
          shown: what the model sees of a history.
          numbers: the indices of items into the catalogue; None: items are not numbered.
          with_empty: whether rows without events are users too, if there are no targets.
        """
        items = shown.items
        self._decoding = Decoding.of_whole_rows(shown.decoded)
        self._shown_len = shown.shown_len
        self._numbers, self._with_empty = numbers, with_empty
        self._item = features.id_columns(items.features)[items.item.name]

    def encode(
        self,
        batch: pa.RecordBatch,
        file: Source,
        first_row: int,
        stripe: int,
        targets: Targets | None,
    ) -> Rows:
        """Return the users that have a history (unless `with_empty`) and a target.

        Args:
          batch: rows with the columns of all features.
          file: source of the rows, for messages.
          first_row: number of the first row in the file.
          stripe: number of the stripe.
          targets: defines the targets; None: there are no targets, and histories are whole rows.

        Raises:
          UserError: see `decode_rows`.
        """
        block = decode_rows(batch, file, first_row, self._decoding)
        before_N = block.lengths_N
        wanted_N = (before_N > 0) | self._with_empty
        if targets is not None:
            before_N = targets.history.kept(batch, block.lengths_N, file, first_row)
            until_N = targets.until.kept(batch, block.lengths_N, file, first_row)
            wanted_N = (before_N > 0) & (before_N < until_N)
        (rows,) = np.nonzero(wanted_N)
        before = blocks.choose(blocks.take_first(block, before_N), rows)
        item_P = np.full(len(block.values_PC), -1, np.int32)
        if self._numbers is not None:
            item_P = self._numbers.of(codes_of(block.values_PC[:, self._item]))
        items = Block(item_P[:, None], before.begins_N, before.lengths_N)
        target_N = np.full(len(rows), -1, np.int32)
        if targets is not None:
            target_N = item_P[before.begins_N + before.lengths_N]
        return Rows(
            stripe,
            first_row + rows,
            blocks.pack(blocks.truncate(before, self._shown_len, keep_newest=True)),
            before.lengths_N,
            blocks.positions_of(items)[:, 0],
            target_N,
        )

    def batch(self, parts: Sequence[Rows], users: int) -> Histories:
        """Joins the users of some parts into one batch, one part after the other.

        Args:
          parts: at least one part.
          users: U; the parts have at most this many users.
        """

        def padded(x_N: np.ndarray, fill: int) -> np.ndarray:
            return np.concatenate([x_N, np.full(users - len(x_N), fill, x_N.dtype)])

        events = np.concatenate([part.events_N for part in parts])
        item_P = np.concatenate([part.item_P for part in parts])
        stripe = [np.full(len(part.row_N), part.stripe, np.int32) for part in parts]
        return Histories(
            blocks.concatenate([_trimmed(part.newest) for part in parts]),
            len(events),
            np.concatenate(stripe),
            np.concatenate([part.row_N for part in parts]),
            padded(np.concatenate([part.target_N for part in parts]), -1),
            padded(events.astype(np.int32), 0),
            item_P,
            seen.distinct(np.repeat(np.arange(len(events)), events), item_P),
        )


class HistoryReader:
    """Reads the histories of a log.

    Attributes:
      skipped: the stripes so far that were left out because they cannot be read.
    """

    def __init__(
        self,
        shown: ShownHistory,
        logs: Logs,
        index: FileIndex,
        numbers: ItemNumbers,
        users: int,
        with_empty: bool = False,
    ):
        """Prepares reading.

        Args:
          shown: what the model sees of a history.
          logs: how files are read.
          index: the index of the files.
          numbers: the indices of items into the catalogue.
          users: U, users per batch.
          with_empty: whether rows without events are users too, if there are no targets.
        """
        self._encoder = HistoryEncoder(shown, numbers, with_empty)
        self._columns = features.column_names(shown.decoded)
        self._logs = logs
        self._index = index
        self._users = users
        self.skipped: set[int] = set()

    @property
    def stripes(self) -> int:
        """Number of stripes of the log."""
        return len(self._index.stripes)

    def read(self, stripe: int, targets: Targets | None) -> Iterator[Histories]:
        """Yields the users of one stripe; see `read_all`."""
        return self.read_all([stripe], targets)

    def read_all(
        self, stripes: Iterable[int], targets: Targets | None, most_users: int | None = None
    ) -> Iterator[Histories]:
        """Yields the users of some stripes that have a history and a target, in the order of the log.

        A batch may have users of several stripes. It has fewer than U users only at the end, or if the
        histories are so long that together they would take too much memory.

        Args:
          stripes: numbers of the stripes in the index, ascending.
          targets: defines the targets; None: there are no targets, and histories are whole rows.
          most_users: ends after so many users; None: yields all.

        Raises:
          UserError: a stripe cannot be read, and may not be skipped.
        """
        waiting: list[Rows] = []
        users = positions = 0
        left = sys.maxsize if most_users is None else most_users
        for stripe in stripes:
            if not left:
                break
            rows = self._read(stripe, targets)
            if rows is None:
                continue
            ends = blocks.starts(rows.events_N)
            begin, total = 0, min(len(rows.row_N), left)
            left -= total
            while begin < total:
                room = ends[begin] + _MOST_POSITIONS - positions
                fitting = int(np.searchsorted(ends, room, side="right")) - 1
                # A single user always fits, however long the history is.
                stop = min(max(fitting, begin if users else begin + 1), begin + self._users - users)
                stop = min(stop, total)
                waiting.append(rows.part(begin, stop))
                users += stop - begin
                positions += int(ends[stop] - ends[begin])
                begin = stop
                if users == self._users or begin < total:
                    yield self._encoder.batch(waiting, self._users)
                    waiting, users, positions = [], 0, 0
        if users:
            yield self._encoder.batch(waiting, self._users)

    def _read(self, stripe: int, targets: Targets | None) -> Rows | None:
        file, number, first_row = self._index.stripes[stripe]
        try:
            batch = orc.read_stripe(file, number, self._columns)
            return self._encoder.encode(batch, file, first_row, stripe, targets)
        except UserError as error:
            if not self.skip(stripe, error):
                raise
            return None

    def skip(self, stripe: int, error: UserError) -> bool:
        """Whether a stripe is left out because it cannot be read; if so, prints why."""
        if not may_skip(error, self._logs):
            return False
        print(f"skipped: {error}", file=sys.stderr, flush=True)
        self.skipped.add(stripe)
        return True


def _trimmed(block: Block) -> Block:
    """Part of a packed block, without the positions of the other rows."""
    if not len(block.begins_N):
        return Block(block.values_PC[:0], block.begins_N, block.lengths_N)
    begin = block.begins_N[0]
    end = block.begins_N[-1] + block.lengths_N[-1]
    return Block(block.values_PC[begin:end], block.begins_N - begin, block.lengths_N)
