"""Shuffle blocks, decoded ahead of their use and kept while they are used."""

import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

from s2s_jax.config.settings import Reading
from s2s_jax.data.batching.order import BlockKey, Order, Piece
from s2s_jax.data.batching.windows import random_run
from s2s_jax.data.encoding import blocks, features
from s2s_jax.data.encoding.blocks import Block
from s2s_jax.data.encoding.cache import StripeCache
from s2s_jax.data.logs import orc
from s2s_jax.data.logs.index import FileIndex, Skipped, may_skip
from s2s_jax.errors import UserError


class DecodedBlock(NamedTuple):
    """A shuffle block, decoded.

    Attributes:
      block: its rows, in the order of the epoch.
      skipped: the stripes of it that could not be read.
    """

    block: Block
    skipped: tuple[Skipped, ...]


class Decoder:
    """Reads pieces of stripes, from ORC files or from the cache."""

    def __init__(self, reading: Reading):
        """Opens the cache if one is asked for.

        Raises:
          UserError: it cannot be written.
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
          MachineError: a stripe cannot be read on this machine, so that others could read it.
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
            return features.decode(batch, file, first_row + piece.start, self._decoding)
        block = self._cache.read(file, number)
        if block is None:
            batch = orc.read_stripe(file, number, self._names)
            block = features.decode(batch, file, first_row, self._decoding)
            block = blocks.pack(block)
            self._cache.write(file, number, block)
        return blocks.choose(block, slice(piece.start, piece.stop))


class BlockReader:
    """Gives shuffle blocks by key, the next one of each shard decoded ahead.

    It holds the blocks in use and the one after each: 2 a shard, and what several threads work on.
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
          decode: a block from its key.
          after: the key that will be asked for after a key.
          threads: that decode ahead; 0 decodes when asked, in the thread that asks.
          capacity: blocks held.
        """
        self._decode = decode
        self._after = after
        self._capacity = capacity
        self._pool = ThreadPoolExecutor(threads, "s2s-decode") if threads else None
        self._lock = threading.Lock()
        self._blocks: OrderedDict[BlockKey, Future[DecodedBlock]] = OrderedDict()

    def get(self, key: BlockKey) -> DecodedBlock:
        """The block, decoded now unless it already is.

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
        """Ends the threads; what they have begun is finished."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def _entry(self, key: BlockKey) -> Future[DecodedBlock]:
        """The block, in the making if it is new."""
        if key not in self._blocks:
            if self._pool is not None:
                # Fails once the process is ending, and so leaves nothing that others would wait for.
                self._blocks[key] = self._pool.submit(self._decode, key)
            else:
                block: Future[DecodedBlock] = Future()
                block.set_result(self._decode(key))
                self._blocks[key] = block
        return self._blocks[key]
