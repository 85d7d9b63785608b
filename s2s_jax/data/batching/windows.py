"""Windows of rows, decoded ahead of their use and kept while they are used."""

import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from s2s_jax.config import Config
from s2s_jax.data.batching.order import Order, Piece, WindowKey
from s2s_jax.data.encoding import blocks, features
from s2s_jax.data.encoding.blocks import Block
from s2s_jax.data.encoding.cache import StripeCache
from s2s_jax.data.logs import orc
from s2s_jax.data.logs.index import FileIndex, Skipped, may_skip
from s2s_jax.errors import UserError


class Window(NamedTuple):
    """A decoded window.

    Attributes:
      block: its rows, in the order of the epoch.
      skipped: the stripes of it that could not be read.
    """

    block: Block
    skipped: tuple[Skipped, ...]


class Decoder:
    """Reads pieces of stripes, from ORC files or from the cache."""

    def __init__(self, config: Config):
        """Opens the cache if `io.cache` asks for one.

        Raises:
          UserError: it cannot be written.
        """
        self._config = config
        self._names = features.column_names(config.features)
        self._columns = features.id_width(config.features)
        self._cache = None if config.io.cache is None else StripeCache(config)

    def window(self, index: FileIndex, order: Order, key: WindowKey) -> Window:
        """Decodes a window.

        Raises:
          UserError: a stripe cannot be read and `io.on_error` is stop.
          MachineError: a stripe cannot be read on this machine, whatever `io.on_error` says.
        """
        pieces, row_order = order.window(key)
        parts, skipped = [], []
        for piece in pieces:
            try:
                parts.append(self._piece(index, piece))
            except UserError as error:
                if not may_skip(error, self._config.io):
                    raise
                file, number, _ = index.stripes[piece.stripe]
                rows = file.stripe_rows[number]
                skipped.append(Skipped(str(file.path), number, rows, str(error)))
                parts.append(blocks.skipped_block(piece.stop - piece.start, self._columns))
        block = blocks.choose(blocks.concatenate(parts), row_order)
        if self._config.io.windows_per_epoch is not None:
            newest = self._config.io.truncate_side == "left"
            block = random_run(block, self._config.epoch_history_len, newest, order.draws(key))
        return Window(blocks.pack(block), tuple(skipped))

    def _piece(self, index: FileIndex, piece: Piece) -> Block:
        file, number, first_row = index.stripes[piece.stripe]
        if self._cache is None:
            batch = orc.read_stripe(file, number, self._names)
            batch = batch.slice(piece.start, piece.stop - piece.start)
            return features.decode(batch, file, first_row + piece.start, self._config)
        block = self._cache.read(file, number)
        if block is None:
            batch = orc.read_stripe(file, number, self._names)
            block = features.decode(batch, file, first_row, self._config)
            block = blocks.pack(block)
            self._cache.write(file, number, block)
        return blocks.choose(block, slice(piece.start, piece.stop))


def random_run(block: Block, most: int, newest: bool, draws_N: np.ndarray) -> Block:
    """Keeps a run of at most `most` positions of each row, without copying.

    Half of the runs are at the end of their row, so that what is recommended from, the newest events,
    is trained on in every other epoch however long the row is; the others begin anywhere.

    Args:
      block: the rows.
      most: positions.
      newest: runs that are not drawn are at the end, otherwise at the beginning.
      draws_N: uint64 random numbers.
    """
    kept_N = np.minimum(block.lengths_N, most)
    spare_N = block.lengths_N - kept_N
    at_end = draws_N >> np.uint64(63) == 0
    drawn_N = ((draws_N & np.uint64(2**63 - 1)) % (spare_N + 1).astype(np.uint64)).astype(np.int64)
    dropped_N = np.where(at_end, spare_N if newest else 0, drawn_N)
    return Block(block.values_PC, block.begins_N + dropped_N, kept_N)


class WindowReader:
    """Gives windows by key, the next one of each shard decoded ahead.

    It holds the windows in use and the one after each: 2 a shard, and what several threads work on.
    """

    def __init__(
        self,
        decode: Callable[[WindowKey], Window],
        after: Callable[[WindowKey], WindowKey | None],
        threads: int,
        capacity: int,
    ):
        """Makes a reader.

        Args:
          decode: a window from its key.
          after: the key that will be asked for after a key.
          threads: that decode ahead; 0 decodes when asked, in the thread that asks.
          capacity: windows held.
        """
        self._decode = decode
        self._after = after
        self._capacity = capacity
        self._pool = ThreadPoolExecutor(threads, "s2s-decode") if threads else None
        self._lock = threading.Lock()
        self._windows: OrderedDict[WindowKey, Future[Window]] = OrderedDict()

    def get(self, key: WindowKey) -> Window:
        """The window, decoded now unless it already is.

        Raises:
          UserError: it cannot be read.
        """
        with self._lock:
            wanted = self._entry(key)
            if self._pool is not None:
                following = self._after(key)
                if following is not None:
                    self._entry(following)
            self._windows.move_to_end(key)
            while len(self._windows) > self._capacity:
                self._windows.popitem(last=False)
        return wanted.result()

    def close(self) -> None:
        """Ends the threads; what they have begun is finished."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def _entry(self, key: WindowKey) -> Future[Window]:
        """The window, in the making if it is new."""
        if key not in self._windows:
            if self._pool is not None:
                # Fails once the process is ending, and so leaves nothing that others would wait for.
                self._windows[key] = self._pool.submit(self._decode, key)
            else:
                window: Future[Window] = Future()
                window.set_result(self._decode(key))
                self._windows[key] = window
        return self._windows[key]
