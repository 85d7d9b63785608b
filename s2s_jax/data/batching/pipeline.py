"""Batches of ORC logs through Grain: order, windows, prefetch, exact and elastic resume.

A batch is a pure function of (files, settings, place), whatever the hosts, threads and earlier batch
sizes. So whole batches flow through Grain, and the reading position is a place: epoch and row.
"""

import shlex
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import grain
import numpy as np

from s2s_jax.config import Config, identity
from s2s_jax.data.batching import stripes
from s2s_jax.data.batching.memory import keep_freed_memory
from s2s_jax.data.batching.order import Order, WindowKey
from s2s_jax.data.batching.packing import to_packed
from s2s_jax.data.batching.windows import Decoder, WindowReader
from s2s_jax.data.encoding import blocks
from s2s_jax.data.encoding.features import entry_kinds, id_width
from s2s_jax.data.encoding.indexing import index_files
from s2s_jax.data.logs.files import split_names
from s2s_jax.data.logs.index import FileIndex, Skipped, files_not_in
from s2s_jax.errors import UserError

# Windows of a shard that are held at most.
_WINDOWS_PER_SHARD = 3

# Batches that wait on the devices, their copies overlapping with the steps before them.
_AHEAD_ON_DEVICE = 2


class Place(NamedTuple):
    """A row in the order of all epochs."""

    epoch: int
    row: int


class Share(NamedTuple):
    """Which rows of a global batch a host reads: the `host`-th of `hosts` equal runs."""

    host: int
    hosts: int


_BEGINNING = Place(0, 0)
WHOLE = Share(0, 1)


class Batch(NamedTuple):
    """A host's rows of a global batch.

    Attributes:
      arrays: what `blocks.to_dense`, `blocks.to_flat` or `packing.to_packed` describes, or what became
        of it on the devices.
      after: place of the next batch.
      skipped: stripes that the rows were to come from but that could not be read.
      skipped_rows: how many rows that were.
    """

    arrays: dict[str, Any]
    after: Place
    skipped: tuple[Skipped, ...]
    skipped_rows: int


class BatchDataset(grain.MapDataset):
    """The batches from some place on, by number; epochs follow each other, each in its own order.

    The last batch of an epoch is filled with padding rows, or dropped with `io.drop_remainder`.

    Attributes:
      order: of rows.
    """

    def __init__(
        self,
        config: Config,
        batch_rows: int,
        index: FileIndex,
        first_index: FileIndex | None = None,
        start: Place = _BEGINNING,
        share: Share = WHOLE,
    ):
        """Makes the dataset.

        Args:
          config: the configuration.
          batch_rows: rows of the log in a global batch.
          index: of the files.
          first_index: of the files of the epoch that `start` is in, where those are others.
          start: place of batch 0.
          share: of each batch, which must divide it evenly.
        """
        super().__init__()
        assert batch_rows % share.hosts == 0, "hosts read equal runs of rows"
        self._config = config
        self._batch_rows = batch_rows
        self._start = start
        self._rows = batch_rows // share.hosts
        self._first_row = self._rows * share.host
        self._index = index
        self._first_index = index if first_index is None else first_index
        self.order = _make_order(config, index)
        self._first_order = self.order if first_index is None else _make_order(config, first_index)
        decoder = Decoder(config)
        self._windows = WindowReader(
            lambda key: decoder.window(*self._source(key.epoch), key),
            self._window_after,
            threads=config.io.thread_num,
            # Those in use and the next of each shard; a batch may also end one window and begin another.
            capacity=_WINDOWS_PER_SHARD * max(self.order.shards, self._first_order.shards) + 1,
        )

    def __len__(self) -> int:
        """Batches without end."""
        return sys.maxsize

    def __getitem__(self, index: Any) -> Any:
        """Batch number `index`."""
        if isinstance(index, slice):
            return self.slice(index)
        place = self._place(int(index))
        order = self._source(place.epoch)[1]
        end = min(place.row + self._batch_rows, order.rows)
        parts, skipped = [], {}
        for part in order.parts(
            place.epoch, place.row, end, self._first_row, self._first_row + self._rows
        ):
            window = self._windows.get(part.key)
            parts.append(blocks.choose(window.block, slice(part.start, part.stop)))
            skipped |= dict.fromkeys(window.skipped)
        lost = sum(int((part.lengths_N == blocks.SKIPPED).sum()) for part in parts)
        return Batch(
            self._pack(parts), self._place(int(index) + 1), tuple(skipped) if lost else (), lost
        )

    def close(self) -> None:
        """Ends the threads."""
        self._windows.close()

    def batches(self, rows: int) -> int:
        """Batches that `rows` rows to the end of an epoch make."""
        return (
            rows // self._batch_rows
            if self._config.io.drop_remainder
            else -(-rows // self._batch_rows)
        )

    def batches_until(self, epoch: int) -> int:
        """Batches before the first one of `epoch`, counted from `start`."""
        if epoch <= self._start.epoch:
            return 0
        first = self.batches(self._first_order.rows - self._start.row)
        return first + (epoch - self._start.epoch - 1) * self.batches(self.order.rows)

    def _place(self, index: int) -> Place:
        first = self.batches(self._first_order.rows - self._start.row)
        if index < first:
            return self._start._replace(row=self._start.row + index * self._batch_rows)
        epochs, step = divmod(index - first, self.batches(self.order.rows))
        return Place(self._start.epoch + 1 + epochs, step * self._batch_rows)

    def _source(self, epoch: int) -> tuple[FileIndex, Order]:
        if epoch == self._start.epoch:
            return self._first_index, self._first_order
        return self._index, self.order

    def _window_after(self, key: WindowKey) -> WindowKey | None:
        following = self._source(key.epoch)[1].after(key)
        known = following.shard < self._source(following.epoch)[1].shards
        return following if known else None

    def _pack(self, parts: list[blocks.Block]) -> dict[str, np.ndarray]:
        config = self._config
        assert config.io.packing != "auto", "resolve it with batch_fill.with_packing"
        if not parts:
            parts = [blocks.skipped_block(0, id_width(config.features))]
        rows, seq_len = config.io.batch_size, config.model.seq_len
        if config.io.packing is not None:
            groups = self._rows // config.io.packing
            newest = config.io.truncate_side == "left"
            return to_packed(parts, groups, config.io.packing, rows, seq_len, newest)
        if config.io.layout == "dense":
            return blocks.to_dense(parts, self._rows, seq_len)
        return blocks.to_flat(parts, self._rows, seq_len, rows)


def _make_order(config: Config, index: FileIndex) -> Order:
    return Order(
        index.stripe_rows,
        shards=config.io.shards,
        window_rows=config.io.shuffle_rows,
        shuffle=config.io.shuffle,
        seed=config.io.seed,
    )


def _stripe_notes(index: FileIndex, config: Config) -> list[str]:
    """What is wrong with the stripes of the log, as far as footers tell."""
    positions = [
        file.positions * file.stripe_rows[number] / file.rows for file, number, _ in index.stripes
    ]
    if not any(positions):
        return []
    remedy = stripes.remedy(shlex.join(split_names(config.io.data_paths)))
    return [
        f"warning: {text}; {remedy}"
        for text in stripes.advice(index.stripe_rows, positions, config.io)
    ]


class Reader(Iterator[Batch]):
    """Endless batches with a reading position that can be saved and restored.

    Attributes:
      steps_per_epoch: batches of an epoch.
      rows_per_epoch: rows of an epoch.
      skipped_files: files that are left out because they cannot be read.
      notes: sentences that the user should see.
    """

    def __init__(
        self,
        config: Config,
        batch_rows: int,
        share: Share = WHOLE,
        to_device: Callable[[dict[str, np.ndarray]], Any] | None = None,
        index: FileIndex | None = None,
    ):
        """Indexes the files; reading starts, at the first batch, when the first one is asked for.

        Args:
          config: the configuration; `io.packing` is a number or None.
          batch_rows: rows of the log in a global batch.
          share: which of its rows are read.
          to_device: copies a batch's arrays to the devices, in a thread ahead of their use.
          index: of the files, where it is known already.

        Raises:
          UserError: see `index_files`; or an epoch would have no batch.
        """
        self._config = config
        self._batch_rows = batch_rows
        self._share = share
        self._to_device = to_device
        keep_freed_memory()
        self._index = index_files(config) if index is None else index
        self.skipped_files = self._index.skipped
        self.notes = [*self._index.notes, *_stripe_notes(self._index, config)]
        self._iterator: Any = None
        self._go_to(Place(0, 0), None)
        self.rows_per_epoch = sum(self._index.stripe_rows)
        self.steps_per_epoch = self._dataset.batches(self.rows_per_epoch)
        if self.steps_per_epoch == 0:
            raise UserError(
                f"io.drop_remainder: a batch has {batch_rows} rows but the data only "
                f"{self.rows_per_epoch}; unset it or lower io.batch_size"
            )
        self._made_for = identity.of_order(config)

    def __next__(self) -> Batch:
        """The next batch."""
        if self._iterator is None:
            self._iterator = self._open()
        batch = next(self._iterator)
        self._place = batch.after
        return batch

    @property
    def identity(self) -> str:
        """Names and contents of the files, the same on all hosts that see the same files."""
        return str(self._index.identity())

    @property
    def held_bytes(self) -> int:
        """Most memory that decoded windows take on a host that reads all shards, about.

        Batches that wait, and one stripe a thread as it is read, come on top.
        """
        order = self._dataset.order
        rows = -(-self._config.io.shuffle_rows // order.shards) + max(self._index.stripe_rows)
        held = min((_WINDOWS_PER_SHARD * order.shards + 1) * rows, 2 * self.rows_per_epoch)
        positions = sum(file.positions for file in self._index.files) / self.rows_per_epoch
        width = id_width(self._config.features)
        return round(held * min(positions, self._config.epoch_history_len) * 4 * width)

    @property
    def epochs_done(self) -> float:
        """Passes over the data up to the reading position, with the part of the one that was begun."""
        return self._place.epoch + self._place.row / sum(
            self._files_of(self._place.epoch).stripe_rows
        )

    def steps_until(self, epoch: int) -> int:
        """Batches from here until `epoch` epochs are done."""
        dataset = BatchDataset(
            self._config,
            self._batch_rows,
            self._index,
            self._files_of(self._place.epoch),
            self._place,
            self._share,
        )
        return dataset.batches_until(epoch)

    @property
    def place(self) -> Place:
        """The reading position: the place after the last batch."""
        return self._place

    def get_state(self, place: Place | None = None) -> dict[str, Any]:
        """A reading position as JSON: a place, by default the present one, and what it is counted in.

        Args:
          place: `Batch.after` of a batch that was read, or `place` before any was.
        """
        at = self._place if place is None else place
        return {
            "epoch": at.epoch,
            "row": at.row,
            "files": self._files_of(at.epoch).identity(),
            "kinds": entry_kinds(self._index.files[0], self._config.features),
            "made_for": self._made_for,
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to a reading position that `get_state` returned, on any host, for any batch size.

        Raises:
          UserError: it was saved for other files or settings, which are named.
        """
        for name, now in self._made_for.items():
            saved = state["made_for"][name]
            if saved != now:
                raise UserError(
                    f"{name}: the checkpoint's reading position was saved with {saved} (now {now}); "
                    f"go back to that or give another train.output_dir"
                )
        first_index = None
        if state["files"] != self._index.identity():
            first_index = self._index.restrict(state["files"])
            rewritten = first_index.rewritten(state["files"])
            if rewritten:
                # Not refused: whoever mended a damaged file is to go on with it.
                self.notes.append(
                    f"warning: {len(rewritten)} files have other bytes than when the checkpoint was "
                    f"made, {rewritten[0]} among them, though their footers are the same; if they were "
                    f"not damaged then, events of their rows may stand in another order now"
                )
            new = files_not_in(first_index, self._index)
            if not new:
                # The same files, listed in another order.
                self._index, first_index = first_index, None
            if new and self._config.io.new_files == "refuse":
                raise UserError(
                    f"io.data_paths: {len(new)} files were added since the checkpoint was made, "
                    f"{new[0]} among them; set io.new_files to next_epoch to take them in from the next "
                    f"epoch on, or give another train.output_dir"
                )
            if new:
                self.notes.append(
                    f"{len(new)} new files, {new[0]} among them, are taken in from epoch "
                    f"{state['epoch'] + 1} on (epochs count from 0)"
                )
        self._go_to(Place(state["epoch"], state["row"]), first_index)

    def close(self) -> None:
        """Ends the threads."""
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None
        self._dataset.close()

    def _files_of(self, epoch: int) -> FileIndex:
        """The files of an epoch: that in which reading started may have fewer."""
        if self._first_index is None or epoch != self._start.epoch:
            return self._index
        return self._first_index

    def _go_to(self, place: Place, first_index: FileIndex | None) -> None:
        if self._iterator is not None:
            self.close()
        self._start = self._place = place
        self._first_index = first_index
        self._dataset = BatchDataset(
            self._config, self._batch_rows, self._index, first_index, place, self._share
        )

    def _open(self) -> Any:
        # Grain's defaults (16 threads, 500 batches) would hold many gigabytes.
        threaded = self._config.io.thread_num > 0
        options = grain.ReadOptions(
            num_threads=int(threaded),
            prefetch_buffer_size=self._config.io.prefetch if threaded else 0,
        )
        batches = self._dataset.to_iter_dataset(options)
        to_device = self._to_device
        if to_device is not None:
            batches = batches.map(lambda batch: batch._replace(arrays=to_device(batch.arrays)))
            if threaded:
                batches = grain.experimental.ThreadPrefetchIterDataset(
                    batches, prefetch_buffer_size=_AHEAD_ON_DEVICE
                )
        return iter(batches)
