"""Shuffle blocks, which are decoded ahead of their use and kept while they are in use."""

import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

from s2s_jax.config.settings import Reading
from s2s_jax.data.batching.order import BlockKey, Order, Piece
from s2s_jax.data.batching.windows import random_run
from s2s_jax.data.encoding.cache import StripeCache
from s2s_jax.data.encoding.row_decoding import decode_rows
from s2s_jax.data.logs import orc
from s2s_jax.data.logs.index import FileIndex, Skipped, may_skip
from s2s_jax.errors import UserError
from s2s_serve.encoding import blocks, features
from s2s_serve.encoding.blocks import Block


class DecodedBlock(NamedTuple):
    """A decoded shuffle block.

    Attributes:
      block: its rows, in the order of the epoch.
      skipped: its stripes that could not be read.
    """

    block: Block
    skipped: tuple[Skipped, ...]


class Decoder:
    """Reads pieces of stripes, from ORC files or from the cache."""

    def __init__(self, reading: Reading):
        """Opens the cache if `reading` has one.

        Raises:
          UserError: the cache cannot be written.
        """
        self._logs, self._sequences = reading.logs, reading.sequences
        self._decoding = reading.decoding
        self._names = features.column_names(reading.decoding.features)
        self._columns = features.id_width(reading.decoding.features)
        self._cache = None
        if reading.cache is not None:
            self._cache = StripeCache(reading.cache, reading.decoding)

    def block(self, index: FileIndex, order: Order, key: BlockKey) -> DecodedBlock:
        """Decodes a shuffle block.

        Raises:
          UserError: a stripe cannot be read, and may not be skipped.
          MachineError: a stripe cannot be read on this machine, but perhaps on others.
        """
        pieces, row_order = order.block(key)
        parts, skipped = [], []
        for piece in pieces:
            try:
                parts.append(self._piece(index, piece))
            except UserError as error:
                if not may_skip(error, self._logs):
                    raise
                file, number, _ = index.stripes[piece.stripe]
                rows = file.stripe_rows[number]
                skipped.append(Skipped(str(file.path), number, rows, str(error)))
                parts.append(blocks.skipped_block(piece.stop - piece.start, self._columns))
        block = blocks.choose(blocks.concatenate(parts), row_order)
        drawn = self._sequences.drawn_len
        if drawn is not None:
            block = random_run(block, drawn, self._sequences.keep_newest, order.draws(key))
        return DecodedBlock(blocks.pack(block), tuple(skipped))

    def _piece(self, index: FileIndex, piece: Piece) -> Block:
        file, number, first_row = index.stripes[piece.stripe]
        if self._cache is None:
            batch = orc.read_stripe(file, number, self._names)
            batch = batch.slice(piece.start, piece.stop - piece.start)
            return decode_rows(batch, file, first_row + piece.start, self._decoding)
        block = self._cache.read(file, number)
        if block is None:
            batch = orc.read_stripe(file, number, self._names)
            block = decode_rows(batch, file, first_row, self._decoding)
            block = blocks.pack(block)
            self._cache.write(file, number, block)
        return blocks.choose(block, slice(piece.start, piece.stop))


class BlockReader:
    """Returns shuffle blocks by key, and decodes the next one of each shard ahead.

    It holds the blocks in use and the next ones, 2 per shard, and those that threads are working on.
    """

    def __init__(
        self,
        decode: Callable[[BlockKey], DecodedBlock],
        after: Callable[[BlockKey], BlockKey | None],
        threads: int,
        capacity: int,
    ):
        """Makes a reader.

        Args:
          decode: decodes a block, given its key.
          after: returns the key that will be requested after a key; None: there is none.
          threads: number of threads that decode ahead; 0: blocks are decoded on request, in the caller's
            thread.
          capacity: maximum number of blocks held.
        """
        self._decode = decode
        self._after = after
        self._capacity = capacity
        self._pool = ThreadPoolExecutor(threads, "s2s-decode") if threads else None
        self._lock = threading.Lock()
        self._blocks: OrderedDict[BlockKey, Future[DecodedBlock]] = OrderedDict()

    def get(self, key: BlockKey) -> DecodedBlock:
        """Return a block, and decode it now unless this has already been done.

        Raises:
          UserError: it cannot be read.
        """
        with self._lock:
            wanted = self._entry(key)
            if self._pool is not None:
                following = self._after(key)
                if following is not None:
                    self._entry(following)
            self._blocks.move_to_end(key)
            while len(self._blocks) > self._capacity:
                self._blocks.popitem(last=False)
        return wanted.result()

    def close(self) -> None:
        """Stops the threads, after they have finished their current blocks."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def _entry(self, key: BlockKey) -> Future[DecodedBlock]:
        """Return the future of a block, which begins to be decoded if it is new."""
        if key not in self._blocks:
            if self._pool is not None:
                # If the process is ending, this raises, and leaves no entry that others would wait for.
                self._blocks[key] = self._pool.submit(self._decode, key)
            else:
                block: Future[DecodedBlock] = Future()
                block.set_result(self._decode(key))
                self._blocks[key] = block
        return self._blocks[key]
