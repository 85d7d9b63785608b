"""What users did before an event that is to be found, for evaluation and for recommending.

Rows are read in the order of the files, whole: the model sees the newest events, the ranking is told of
all.

Shapes: N rows of a stripe, P positions, U users of a batch, L positions of a sequence, S items that a
user had, I items of a catalogue.
"""

import sys
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from s2s_jax.config import Config
from s2s_jax.data import blocks, features, orc
from s2s_jax.data.blocks import NO_ID, Block
from s2s_jax.data.catalogue import Catalogue
from s2s_jax.data.held_out import Targets
from s2s_jax.data.index import FileIndex, may_skip
from s2s_jax.data.item_counts import codes_of, whole_sequences
from s2s_jax.errors import UserError


class Histories(NamedTuple):
    """Some users of one stripe; places beyond the users are padding.

    Attributes:
      arrays: `length` and `ids`, see `blocks.to_dense`: the newest events before the target.
      users: how many there are.
      row_U: int64 rows of the users in their file.
      target_U: int32 item of the catalogue that comes next; -1 if not in it, or not looked for.
      seen_US: int32 items of the catalogue in the whole history, -1 is padding.
      events_U: int32 events of the whole history.
    """

    arrays: dict[str, np.ndarray]
    users: int
    row_U: np.ndarray
    target_U: np.ndarray
    seen_US: np.ndarray
    events_U: np.ndarray


class ItemNumbers:
    """From encoded ids of items to their places in a catalogue."""

    def __init__(self, catalogue: Catalogue, config: Config):
        """Sorts the items of `catalogue`."""
        ids = catalogue.ids[config.loss.item_feature]
        code_I = codes_of(ids.reshape(len(ids), -1))
        self._number_I = np.argsort(code_I, kind="stable")
        self._code_I = code_I[self._number_I]

    def of(self, code_P: np.ndarray) -> np.ndarray:
        """int32 `[P]` places of items, -1 for those that are not in the catalogue, and for `NO_ID`."""
        place_P = np.searchsorted(self._code_I, code_P)
        place_P = np.minimum(place_P, len(self._code_I) - 1)
        found_P = (self._code_I[place_P] == code_P) & (code_P != NO_ID)
        return np.where(found_P, self._number_I[place_P], -1).astype(np.int32)


class HistoryReader:
    """Reads the histories of a log, stripe by stripe."""

    def __init__(self, config: Config, index: FileIndex, numbers: ItemNumbers, users: int):
        """Prepares reading.

        Args:
          config: the configuration.
          index: of the files.
          numbers: of items.
          users: U, of a batch.
        """
        self._config = whole_sequences(config, tuple(f.name for f in config.features))
        self._seq_len, self._shown_len = config.model.seq_len, config.shown_len
        self._index = index
        self._numbers = numbers
        self._users = users
        columns = features.id_columns(config.features)
        self._item = columns[config.loss.item_feature]

    @property
    def stripes(self) -> int:
        """Stripes of the log."""
        return len(self._index.stripes)

    def read(self, stripe: int, targets: Targets | None) -> Iterator[Histories]:
        """The users of a stripe that have a history, and an event to be found.

        Args:
          stripe: its number in the index.
          targets: what is to be found; None: nothing is, and histories are whole.

        Raises:
          UserError: the stripe cannot be read and `io.on_error` is stop.
        """
        file, number, first_row = self._index.stripes[stripe]
        try:
            batch = orc.read_stripe(file, number, features.column_names(self._config.features))
            block = features.decode(batch, file, first_row, self._config)
            before_N, wanted_N = block.lengths_N, block.lengths_N > 0
            if targets is not None:
                before_N = targets.history.kept(batch, block.lengths_N, file, first_row)
                until_N = targets.until.kept(batch, block.lengths_N, file, first_row)
                wanted_N = (before_N > 0) & (before_N < until_N)
        except UserError as error:
            if not may_skip(error, self._config.io):
                raise
            print(f"skipped: {error}", file=sys.stderr, flush=True)
            return
        item_P = self._numbers.of(codes_of(block.values_PC[:, self._item]))
        before = blocks.take_first(block, before_N)
        (rows_N,) = np.nonzero(wanted_N)
        for begin in range(0, len(rows_N), self._users):
            rows = rows_N[begin : begin + self._users]
            yield self._batch(before, rows, item_P, first_row, targets is not None)

    def _batch(
        self, before: Block, rows: np.ndarray, item_P: np.ndarray, first_row: int, to_find: bool
    ) -> Histories:
        chosen = blocks.choose(before, rows)
        newest = blocks.pack(blocks.truncate(chosen, self._shown_len, keep_newest=True))
        arrays = blocks.to_dense([newest], self._users, self._seq_len)
        ends = chosen.begins_N + chosen.lengths_N
        target = item_P[ends] if to_find else np.full(len(rows), -1, np.int32)
        # Few widths, so that few programs are compiled.
        width = max(16, 2 ** int(chosen.lengths_N.max() - 1).bit_length())
        place = chosen.begins_N[:, None] + np.arange(width)
        inside = place < ends[:, None]
        seen = np.where(inside, item_P[np.minimum(place, len(item_P) - 1)], -1)
        return Histories(
            arrays,
            len(rows),
            first_row + rows,
            self._padded(target, -1),
            self._padded(seen, -1),
            self._padded(chosen.lengths_N.astype(np.int32), 0),
        )

    def _padded(self, x: np.ndarray, fill: int) -> np.ndarray:
        padding = np.full((self._users - len(x), *x.shape[1:]), fill, x.dtype)
        return np.concatenate([x, padding])
