"""Whether a log holds anything to learn from, and if not, why.

Training learns from pairs: an event that has an item, and the neighbouring event in the same row. At
least one pair must remain after events are held out, and there must be a second item to tell apart.

Shapes: N rows of a stripe, P positions, W words of an item's id.
"""

from collections import Counter

import numpy as np
import pyarrow as pa

from s2s_jax.data.encoding import held_out
from s2s_jax.data.encoding.row_decoding import decode_rows
from s2s_jax.data.inspection.assumptions import Assumptions
from s2s_jax.data.inspection.columns import share
from s2s_jax.data.inspection.time_facts import TimeFacts
from s2s_jax.data.logs.orc import OrcFile
from s2s_jax.errors import UserError
from s2s_serve.encoding import arrow, blocks, features
from s2s_serve.encoding.blocks import NO_ID, Block

_EMPTY, _SINGLE, _CUT, _NO_ITEM = "are empty", "have one event", "cut", "no item"
# The user is warned if at least this share of the rows has no pair.
_MOSTLY = 0.5


class Learnable:
    """Counts the pairs in rows, and the reasons why rows have none."""

    def __init__(self, assumptions: Assumptions):
        """Starts without rows.

        Args:
          assumptions: what is held out, how rows are cut, and what an item is.
        """
        self._assumptions = assumptions
        self._features = assumptions.decoding.features
        item = assumptions.item
        begin = features.id_columns(self._features)[item.name].start
        # The first id of a bag says whether there is an item.
        self._item_words = slice(begin, begin + item.id_words)
        self._cut = held_out.training_cut(assumptions.decoding.split)
        self._times = None
        if self._cut.time is not None:
            feature = self._cut.time.feature
            self._times = TimeFacts(feature.column_name, feature.time_unit)
        self._pairs = self._held_out_rows = 0
        self._longest = self._longest_kept = 0
        self._rows: Counter[str | None] = Counter()
        self._item_W: np.ndarray | None = None
        self._many_items = False
        self._unreadable: list[str] = []

    @property
    def column_names(self) -> list[str]:
        """The columns that `add` needs."""
        return list(
            dict.fromkeys([*features.column_names(self._features), *self._cut.column_names])
        )

    @property
    def found(self) -> bool:
        """Whether a pair and a second item have been found."""
        return self._pairs > 0 and self._many_items

    def add_unreadable(self, reason: str) -> None:
        """Counts a stripe that cannot be read."""
        self._unreadable.append(reason)

    def add(self, batch: pa.RecordBatch, file: OrcFile, first_row: int) -> None:
        """Counts the rows of a stripe.

        Raises:
          UserError: see `decode_rows`.
        """
        block = decode_rows(batch, file, first_row, self._assumptions.decoding)
        of_columns = [
            arrow.list_lengths(batch.column(name)) for name in features.column_names(self._features)
        ]
        length_N = np.maximum.reduce(of_columns)
        kept_N = self._cut.kept(batch, length_N, file, first_row)
        if self._times is not None:
            self._times.add(batch.column(self._times.column))
        self._look_at_items(block)
        pairs_N = self._pairs_of(block)
        self._pairs += int(pairs_N.sum())
        self._held_out_rows += int((kept_N < length_N).sum())
        self._longest = max(self._longest, int(length_N.max(initial=0)))
        self._longest_kept = max(self._longest_kept, int(kept_N.max(initial=0)))
        for reason, rows_N in (
            (None, pairs_N > 0),
            (_EMPTY, length_N == 0),
            (_SINGLE, length_N == 1),
            (_CUT, (length_N > 1) & (kept_N < 2)),
            (_NO_ITEM, (kept_N > 1) & (pairs_N == 0)),
        ):
            self._rows[reason] += int(rows_N.sum())

    def refuse_nothing(self) -> None:
        """Refuses the log if it has nothing to learn from. Call this after all rows were counted.

        Raises:
          UserError: there is nothing to learn from; the message has the likely reason and a remedy.
        """
        reason = self.why_nothing()
        if reason is not None:
            raise UserError(reason)

    def why_nothing(self) -> str | None:
        """The likely reason why there is nothing to learn from; None if there is something."""
        return None if self.found else self._why()

    def notes(self) -> list[str]:
        """Warnings about likely mistakes, from the rows that were counted."""
        notes, rows = [], self._rows.total()
        without = rows - self._rows[None]
        if rows and without > _MOSTLY * rows:
            kinds = {
                _EMPTY: "are empty",
                _SINGLE: "have one event",
                _CUT: f"have fewer than two events left by {self._split_text()}",
                _NO_ITEM: f"lack items (column {self._item_column()})",
            }
            parts = [
                f"{self._rows[kind] / rows:.0%} {words}"
                for kind, words in kinds.items()
                if self._rows[kind]
            ]
            notes.append(
                f"warning: {share(without, rows)} of the {rows:,} rows looked at give nothing to learn "
                f"from: {', '.join(parts)}"
            )
        if self._times is not None and rows and not self._held_out_rows:
            notes.append(
                f"warning: nothing is held out of the {rows:,} rows looked at: all events are before "
                f"{self._split_text()}; {self._times.range_text()}"
            )
        return notes

    def _look_at_items(self, block: Block) -> None:
        """Notes whether there is more than one item."""
        if self._many_items:
            return
        ids_PW = blocks.positions_of(block)[:, self._item_words]
        there_PW = ids_PW[(ids_PW != NO_ID).any(axis=1)]
        if len(there_PW):
            self._item_W = there_PW[0] if self._item_W is None else self._item_W
            self._many_items = bool((there_PW != self._item_W).any())

    def _pairs_of(self, block: Block) -> np.ndarray:
        """int64 `[N]`: positions of each row that are scored and have an item."""
        there_P = (block.values_PC[:, self._item_words] != NO_ID).any(axis=1)
        before_P = blocks.starts(there_P)
        begin_N, end_N = block.begins_N, block.begins_N + block.lengths_N
        if self._assumptions.pairing == "next":
            begin_N = np.minimum(begin_N + 1, end_N)
        else:
            end_N = np.maximum(end_N - 1, begin_N)
        return before_P[end_N] - before_P[begin_N]

    # -------------------------------------------------------------------------------- messages

    def _item_column(self) -> str:
        return self._assumptions.item.column_name

    def _split_text(self) -> str:
        """The setting that cuts rows, with its value."""
        split = self._assumptions.decoding.split
        assert split is not None, "training may hold something out"
        if split.at is None:
            return f"eval.split.events {split.events}"
        if split.validation_at is None:
            return f"eval.split.at {split.at}"
        return f"eval.split.validation_at {split.validation_at}"

    def _why(self) -> str:
        """The likely reason why there is nothing to learn from, and a remedy."""
        paths = self._assumptions.paths
        if not self._rows.total() and not self._unreadable:
            return f"io.data_paths: expected rows in {paths}, found none; name other files"
        if not self._rows.total():
            return (
                f"io.data_paths: no stripe of {paths} can be read (of {len(self._unreadable):,}); the "
                f"first: {self._unreadable[0]}"
            )
        nothing = f"there is nothing to learn from in {paths}"
        if self._longest == 0:
            names = ", ".join(features.column_names(self._features))
            return (
                f"io.data_paths: {nothing}: all {self._rows.total():,} rows are empty in {names}; name "
                f"other files, or other columns in features"
            )
        if self._longest == 1:
            return (
                f"io.data_paths: {nothing}: no row has more than one event, but training predicts the "
                f"next event of a row; give each user one row with all of their events (s2s convert "
                f"makes such a log from files with one event per row)"
            )
        if self._longest_kept < 2 and self._cut.time is not None and self._times is not None:
            key, at = self._split_text().split(" ", 1)
            return (
                f"{key}: {nothing}: no row has two events before {at}; "
                f"{self._times.range_text(every_unit=True)}; give a later time, or correct the "
                f"time_unit of feature {self._cut.time.feature.name}"
            )
        if self._longest_kept < 2:
            return (
                f"eval.split.events: {nothing}: {self._cut.last} events of every row are held out, two "
                f"more are needed, and the longest row has {self._longest:,}; lower it, or train on "
                f"longer rows"
            )
        item = self._assumptions.item
        if not self._pairs:
            return (
                f"loss.item_feature: {nothing}: no event that could be predicted has an item (column "
                f"{item.column_name}); name the feature that has the items"
            )
        size = item.hash_bucket_size
        rows = "" if item.grows else f", or raise its hash_bucket_size ({size:,})"
        return (
            f"loss.item_feature: {nothing}: all events are of one item (column {item.column_name}), "
            f"so there are no negatives; name the feature that has the items{rows}"
        )
