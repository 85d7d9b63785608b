"""Endless batches of a log, with a reading position from which a run can continue on any hosts."""

import shlex
from collections.abc import Callable, Iterator
from typing import Any

import grain
import numpy as np

from s2s_jax.config.settings import Reading
from s2s_jax.data.batching import stripes
from s2s_jax.data.batching.dataset import (
    BLOCKS_PER_SHARD,
    WHOLE,
    BatchDataset,
    HostBatch,
    HostSlice,
)
from s2s_jax.data.batching.places import BEGINNING, BatchPlaces, Place
from s2s_jax.data.encoding.indexing import index_files
from s2s_jax.data.logs.files import split_names
from s2s_jax.data.logs.index import FileIndex, files_not_in
from s2s_jax.errors import UserError
from s2s_serve.encoding.features import entry_kinds, id_width

# Batches that wait on the devices, so that copying overlaps with earlier steps.
_AHEAD_ON_DEVICE = 2


class Reader(Iterator[HostBatch]):
    """Endless batches with a reading position that can be saved and restored.

    Attributes:
      steps_per_epoch: batches per epoch.
      rows_per_epoch: rows per epoch.
      skipped_files: files left out because they cannot be read.
      notes: notes for the user on the files and stripes, a sentence each.
    """

    def __init__(
        self,
        reading: Reading,
        batch_rows: int,
        host_slice: HostSlice = WHOLE,
        to_device: Callable[[dict[str, np.ndarray]], Any] | None = None,
        index: FileIndex | None = None,
    ):
        """Indexes the files; reading starts when the first batch is requested.

        Args:
          reading: everything that batches depend on; `packing` must be a number or None.
          batch_rows: rows of the log in a global batch.
          host_slice: the part of each batch that is read.
          to_device: copies a batch's arrays to the devices, in a thread, ahead of their use.
          index: the index of the files, if already known.

        Raises:
          UserError: see `index_files`; or an epoch would have no batches.
        """
        self._reading = reading
        self._batch_rows = batch_rows
        self._host_slice = host_slice
        self._to_device = to_device
        self._index = index_files(reading.logs, reading.decoding) if index is None else index
        self.skipped_files = self._index.skipped
        self.notes = [*self._index.notes, *_stripe_notes(self._index, reading)]
        self._iterator: Any = None
        self._go_to(BEGINNING, None)
        self.rows_per_epoch = sum(self._index.stripe_rows)
        self.steps_per_epoch = self._places().batches(self.rows_per_epoch)
        if self.steps_per_epoch == 0:
            raise UserError(
                f"io.drop_remainder: a batch has {batch_rows} rows, but the data has only "
                f"{self.rows_per_epoch}; unset it or lower io.batch_size"
            )

    def __next__(self) -> HostBatch:
        """The next batch."""
        if self._iterator is None:
            self._iterator = self._open()
        batch = next(self._iterator)
        self._place = batch.after
        return batch

    @property
    def identity(self) -> str:
        """Identifies the files by names and contents; equal on all hosts that see the same files."""
        return str(self._index.identity())

    @property
    def packing(self) -> int | None:
        """Rows of the log in a device's batch; None: one for each row of the batch."""
        packing = self._reading.sequences.packing
        assert packing != "auto", "batch_fill replaces auto by a number"
        return packing

    @property
    def held_bytes(self) -> int:
        """Approximate maximum memory of decoded shuffle blocks on a host that reads all shards.

        Waiting batches, and one stripe per thread while it is read, take additional memory.
        """
        order = self._dataset.order
        rows = -(-self._reading.order.shuffle_rows // order.shards) + max(self._index.stripe_rows)
        held = min((BLOCKS_PER_SHARD * order.shards + 1) * rows, 2 * self.rows_per_epoch)
        positions = sum(file.positions for file in self._index.files) / self.rows_per_epoch
        width = id_width(self._reading.decoding.features)
        return round(held * min(positions, self._reading.epoch_history_len) * 4 * width)

    @property
    def epochs_done(self) -> float:
        """Number of epochs up to the reading position, including the fraction of the current one."""
        return self._place.epoch + self._place.row / sum(
            self._files_of(self._place.epoch).stripe_rows
        )

    def steps_until(self, epoch: int) -> int:
        """Number of batches from here until `epoch` epochs are done."""
        return self._places().until(epoch)

    @property
    def place(self) -> Place:
        """The reading position: the place after the last batch."""
        return self._place

    def get_state(self, place: Place | None = None) -> dict[str, Any]:
        """A reading position as JSON: a place, by default the current one, and the files it refers to.

        Args:
          place: `HostBatch.after` of a batch that was read, or `place` before any batch was read.
        """
        at = self._place if place is None else place
        return {
            "epoch": at.epoch,
            "row": at.row,
            "files": self._files_of(at.epoch).identity(),
            "kinds": entry_kinds(self._index.files[0], self._reading.decoding.features),
            "made_for": self._reading.order.fingerprint,
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to a reading position from `get_state`, of any host and any batch size.

        Raises:
          UserError: the position was saved with other files or settings, which the message names.
        """
        for name, now in self._reading.order.fingerprint.items():
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
                # Only a warning, so that a run can continue after a damaged file was repaired.
                self.notes.append(
                    f"warning: {len(rewritten)} files (such as {rewritten[0]}) have other bytes than "
                    f"when the checkpoint was made, though their footers are the same; unless they were "
                    f"damaged then, events of their rows may be in another order now"
                )
            new = files_not_in(first_index, self._index)
            if not new:
                # The same files in another order.
                self._index, first_index = first_index, None
            if new and not self._reading.take_new_files:
                raise UserError(
                    f"io.data_paths: {len(new)} files (such as {new[0]}) were added since the "
                    f"checkpoint was made; set io.new_files to next_epoch to read them from the next "
                    f"epoch on, or give another train.output_dir"
                )
            if new:
                # An epoch of which no row was read has the new files, too.
                begins = state["row"] == 0
                self.notes.append(
                    f"{len(new)} new files (such as {new[0]}) will be read from epoch "
                    f"{state['epoch'] + (not begins)} on (epochs count from 0)"
                )
                if begins:
                    first_index = None
        self._go_to(Place(state["epoch"], state["row"]), first_index)

    def close(self) -> None:
        """Stops the threads."""
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None
        self._dataset.close()

    def _files_of(self, epoch: int) -> FileIndex:
        """The files of an epoch; the epoch in which reading started may have fewer."""
        if self._first_index is None or epoch != self._start.epoch:
            return self._index
        return self._first_index

    def _places(self) -> BatchPlaces:
        """How epochs are cut into batches from the reading position on."""
        return BatchPlaces(
            self._batch_rows,
            self._reading.drop_remainder,
            self._place,
            sum(self._files_of(self._place.epoch).stripe_rows),
            sum(self._index.stripe_rows),
        )

    def _go_to(self, place: Place, first_index: FileIndex | None) -> None:
        if self._iterator is not None:
            self.close()
        self._start = self._place = place
        self._first_index = first_index
        self._dataset = BatchDataset(
            self._reading, self._batch_rows, self._index, first_index, place, self._host_slice
        )

    def _open(self) -> Any:
        # Grain's defaults (16 threads, 500 batches) would hold many gigabytes.
        threaded = self._reading.logs.threads > 0
        options = grain.ReadOptions(
            num_threads=int(threaded),
            prefetch_buffer_size=self._reading.prefetch if threaded else 0,
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


def _stripe_notes(index: FileIndex, reading: Reading) -> list[str]:
    """Warnings about the stripes of the log, as far as footers show."""
    positions = [
        file.positions * file.stripe_rows[number] / file.rows for file, number, _ in index.stripes
    ]
    if not any(positions):
        return []
    remedy = stripes.remedy(shlex.join(split_names(reading.logs.paths)))
    return [
        f"warning: {text}; {remedy}"
        for text in stripes.advice(index.stripe_rows, positions, reading.order)
    ]
