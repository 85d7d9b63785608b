"""A Grain dataset of batches: which rows a batch has, from which shuffle blocks, in which shape.

A batch is a pure function of (files, settings, place), regardless of hosts, threads and earlier batch
sizes. So whole batches flow through Grain, and the reading position is a place: an epoch and a row.
"""

import sys
from typing import Any, NamedTuple

import grain
import numpy as np

from s2s_jax.config.settings import Reading, ReadingOrder
from s2s_jax.data.batching.order import BlockKey, Order
from s2s_jax.data.batching.packing import to_packed
from s2s_jax.data.batching.places import BEGINNING, BatchPlaces, Place
from s2s_jax.data.batching.shuffle_blocks import BlockReader, Decoder
from s2s_jax.data.logs.index import FileIndex, Skipped
from s2s_serve.encoding import blocks
from s2s_serve.encoding.features import id_width

# Maximum number of shuffle blocks held per shard.
BLOCKS_PER_SHARD = 3


class HostSlice(NamedTuple):
    """The rows of a global batch that a host reads: the `host`-th of `hosts` equal runs of rows."""

    host: int
    hosts: int


WHOLE = HostSlice(0, 1)


class HostBatch(NamedTuple):
    """A host's rows of a global batch.

    Attributes:
      arrays: arrays of `blocks.to_dense`, `blocks.to_flat` or `packing.to_packed`, or their copies on
        the devices.
      after: place of the next batch.
      skipped: stripes of these rows that could not be read.
      skipped_rows: number of rows lost with these stripes.
    """

    arrays: dict[str, Any]
    after: Place
    skipped: tuple[Skipped, ...]
    skipped_rows: int


class BatchDataset(grain.MapDataset):
    """The batches from a place on, by number; each epoch has its own order.

    The last batch of an epoch is filled with padding rows, or dropped.

    Attributes:
      order: the order of rows.
    """

    def __init__(
        self,
        reading: Reading,
        batch_rows: int,
        index: FileIndex,
        first_index: FileIndex | None = None,
        start: Place = BEGINNING,
        host_slice: HostSlice = WHOLE,
    ):
        """Makes the dataset.

        Args:
          reading: everything that batches depend on; `packing` must be a number or None.
          batch_rows: rows of the log in a global batch.
          index: the index of the files.
          first_index: the index of the files in the epoch of `start`, if they differ.
          start: place of batch 0.
          host_slice: this host's part of each batch; the number of hosts must divide the batch evenly.
        """
        super().__init__()
        assert batch_rows % host_slice.hosts == 0, "hosts read equal runs of rows"
        self._sequences = reading.sequences
        self._columns = id_width(reading.decoding.features)
        self._rows = batch_rows // host_slice.hosts
        self._first_row = self._rows * host_slice.host
        self._index = index
        self._first_index = index if first_index is None else first_index
        self.order = _make_order(reading.order, index)
        self._first_order = self.order
        if first_index is not None:
            self._first_order = _make_order(reading.order, first_index)
        self._places = BatchPlaces(
            batch_rows, reading.drop_remainder, start, self._first_order.rows, self.order.rows
        )
        decoder = Decoder(reading)
        self._blocks = BlockReader(
            lambda key: decoder.block(*self._source(key.epoch), key),
            self._block_after,
            threads=reading.logs.threads,
            # The block in use and the next one of each shard; a batch may end one block and begin
            # another.
            capacity=BLOCKS_PER_SHARD * max(self.order.shards, self._first_order.shards) + 1,
        )

    def __len__(self) -> int:
        """The number of batches, which is unlimited."""
        return sys.maxsize

    def __getitem__(self, index: Any) -> Any:
        """Batch number `index`."""
        if isinstance(index, slice):
            return self.slice(index)
        place = self._places.of(int(index))
        order = self._source(place.epoch)[1]
        end = min(place.row + self._places.batch_rows, order.rows)
        parts, skipped = [], {}
        for part in order.parts(
            place.epoch, place.row, end, self._first_row, self._first_row + self._rows
        ):
            decoded = self._blocks.get(part.key)
            parts.append(blocks.choose(decoded.block, slice(part.start, part.stop)))
            skipped |= dict.fromkeys(decoded.skipped)
        lost = sum(int((part.lengths_N == blocks.SKIPPED).sum()) for part in parts)
        after = self._places.of(int(index) + 1)
        return HostBatch(self._pack(parts), after, tuple(skipped) if lost else (), lost)

    def close(self) -> None:
        """Stops the threads."""
        self._blocks.close()

    def _source(self, epoch: int) -> tuple[FileIndex, Order]:
        if epoch == self._places.start.epoch:
            return self._first_index, self._first_order
        return self._index, self.order

    def _block_after(self, key: BlockKey) -> BlockKey | None:
        following = self._source(key.epoch)[1].after(key)
        known = following.shard < self._source(following.epoch)[1].shards
        return following if known else None

    def _pack(self, parts: list[blocks.Block]) -> dict[str, np.ndarray]:
        sequences = self._sequences
        assert sequences.packing != "auto", "batch_fill replaces auto by a number"
        if not parts:
            parts = [blocks.skipped_block(0, self._columns)]
        rows, seq_len = sequences.rows, sequences.seq_len
        if sequences.packing is not None:
            groups, newest = self._rows // sequences.packing, sequences.keep_newest
            return to_packed(parts, groups, sequences.packing, rows, seq_len, newest)
        if sequences.layout == "dense":
            return blocks.to_dense(parts, self._rows, seq_len)
        return blocks.to_flat(parts, self._rows, seq_len, rows)


def _make_order(settings: ReadingOrder, index: FileIndex) -> Order:
    return Order(
        index.stripe_rows,
        shards=settings.shards,
        block_rows=settings.shuffle_rows,
        shuffle=settings.shuffle,
        seed=settings.seed,
    )
