"""From histories to the vectors of users.

Shapes: N histories, P events of all histories, B users that are encoded together, L positions, D
concatenated embedding width, E model width, C columns of ids.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from s2s_serve.encoding import blocks, features, plain_histories
from s2s_serve.encoding.blocks import NO_ID, Block
from s2s_serve.encoding.feature import EventTime, FeatureConfig
from s2s_serve.encoding.item_numbers import ItemNumbers, codes_of
from s2s_serve.encoding.plain_histories import Histories, HistorySource
from s2s_serve.tables import Table, embed
from s2s_serve.tower import Tower

# Maximum number of positions of users that are encoded together, padding included. More leave the caches
# of a core: on 2 cores, a user took 4.6 ms of CPU time with 512 positions, and 6.5 ms with 8,192.
_MOST_POSITIONS = 2**9


class Encoded(NamedTuple):
    """Encoded histories.

    Attributes:
      users_NE: f32, the vectors of users; zeros for histories without events.
      events_N: int64, the number of events of each history.
      item_P: int32, the number of each event's item; -1 if it is not among the items of the export.
      unknown_N: int64, the number of events, among those that the model sees, whose item it has never
        seen: one without a row in its growing table or, with a bucket table, one that is not among the
        items of the export. Events without an id do not count.
    """

    users_NE: np.ndarray
    events_N: np.ndarray
    item_P: np.ndarray
    unknown_N: np.ndarray


class Encoder:
    """Encodes histories."""

    def __init__(
        self,
        tables: Mapping[str, Table],
        tower: Tower,
        described: Sequence[FeatureConfig],
        kinds: Mapping[str, str],
        item: FeatureConfig,
        shown_len: int,
        width: int,
    ):
        """Prepares encoding.

        Args:
          tables: the embedding tables by name.
          tower: the user tower.
          described: the features of an event; for a timed tower, an `EventTime` comes last.
          kinds: the kind of the ids of each feature in the training log.
          item: the feature that says which item an event is about.
          shown_len: the number of newest events that the model sees.
          width: E.
        """
        self._tables, self._tower, self._decoded = tables, tower, tuple(described)
        self._features = tuple(f for f in described if not isinstance(f, EventTime))
        assert tower.timed == (self._features != self._decoded), "times are for timed towers"
        self._kinds, self._item = kinds, item
        self._shown_len, self._width = shown_len, width
        self._columns = features.id_columns(self._features)
        self._threads = ThreadPoolExecutor(tower.callers, "s2s-encoder")

    def encode(self, histories: Histories, numbers: ItemNumbers) -> Encoded:
        """Encodes histories.

        Args:
          histories: N histories, see `Model.recommend`.
          numbers: the numbers of the items of the export.

        Raises:
          UserError: a history cannot be read.
        """
        rows = plain_histories.to_rows(histories, self._decoded, self._kinds)
        source = HistorySource(rows.schema)
        whole = features.decode(rows, source, 0, self._decoded, lambda block: block)
        code_P = codes_of(whole.values_PC[:, self._columns[self._item.name]])
        item_P = numbers.of(code_P)
        newest = blocks.truncate(whole, self._shown_len, keep_newest=True)
        unknown_N = self._unknown(whole, code_P, item_P)
        return Encoded(self._users(newest), whole.lengths_N, item_P, unknown_N)

    def _unknown(self, whole: Block, code_P: np.ndarray, item_P: np.ndarray) -> np.ndarray:
        """Return int64 `[N]`: how many of the events that the model sees have an unknown item."""
        unknown_P = item_P < 0
        if self._item.grows:
            ids_PC = whole.values_PC[:, self._columns[self._item.name]]
            unknown_P = self._tables[self._item.table_name].rows_of(ids_PC) < 0
        row_P = np.repeat(np.arange(len(whole.lengths_N)), whole.lengths_N)
        from_end_P = whole.begins_N[row_P] + whole.lengths_N[row_P] - np.arange(len(row_P))
        unknown_P &= (code_P != NO_ID) & (from_end_P <= self._shown_len)
        return np.bincount(row_P[unknown_P], minlength=len(whole.lengths_N))

    def _users(self, newest: Block) -> np.ndarray:
        """Return f32 `[N, E]`: the vectors of users."""
        users_NE = np.zeros((len(newest.lengths_N), self._width), np.float32)
        groups = self._groups(newest.lengths_N)
        parts = [blocks.choose(newest, chosen) for chosen in groups]
        # One group needs no other thread, which takes time to wake.
        each = map if len(groups) == 1 else self._threads.map
        for chosen, users_BE in zip(groups, each(self._together, parts), strict=True):
            users_NE[chosen] = users_BE
        return users_NE

    def _groups(self, length_N: np.ndarray) -> list[np.ndarray]:
        """Return the numbers of the users that are encoded together, enough groups for all threads."""
        # Histories of similar lengths need little padding.
        order = np.argsort(length_N, kind="stable")
        order = order[length_N[order] > 0]
        # Each thread gets the same number of groups, so that none waits for another.
        positions, callers = int(length_N.sum()), self._tower.callers
        most = -(-positions // (callers * max(-(-positions // (callers * _MOST_POSITIONS)), 1)))
        groups, begin = [], 0
        while begin < len(order):
            fitting = self._fitting(length_N[order[begin:]], most)
            groups.append(order[begin : begin + fitting])
            begin += fitting
        return groups

    def _fitting(self, length_N: np.ndarray, most: int) -> int:
        """Return how many of some histories, sorted by length, have at most `most` positions."""
        positions = self._tower.positions(1)
        if positions != 1:
            return max(most // positions, 1)
        length_N = length_N[:most]
        positions_N = length_N * np.arange(1, len(length_N) + 1)
        return max(int(np.searchsorted(positions_N, most, side="right")), 1)

    def _together(self, part: Block) -> np.ndarray:
        """Return f32 `[B, E]`: the vectors of some users."""
        packed_PC = blocks.positions_of(part)
        embedded = [
            embed(self._tables[f.table_name], f, packed_PC[:, self._columns[f.name]])
            for f in self._features
        ]
        events_PD = np.concatenate(embedded, axis=1)
        length_B = part.lengths_N.astype(np.int32)
        positions = self._tower.positions(int(length_B.max()))
        events_BLD = np.zeros((len(length_B), positions, events_PD.shape[1]), np.float32)
        real_BL = np.arange(positions) < length_B[:, None]
        events_BLD[real_BL] = events_PD
        time_BL = None
        if self._tower.timed:
            time_BL = np.zeros((len(length_B), positions), np.int32)
            time_BL[real_BL] = packed_PC[:, -1]
        return self._tower.users(events_BLD, length_B, time_BL)
