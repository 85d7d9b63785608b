"""Batches of ORC logs through Grain: order, window cache, prefetch, exact resume.

A batch is a pure function of (files, settings, index), so whole batches flow through Grain and the
reading position is one integer.
"""

import dataclasses
import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import grain
import numpy as np

from s2s_jax.config import Config
from s2s_jax.data import features, orc
from s2s_jax.data.order import Order, Piece
from s2s_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class FileIndex:
    """All stripes of all files, from their footers.

    Attributes:
      files: the files, in order.
      stripes: for each stripe of the whole log its file, its number there and its first row there.
    """

    files: tuple[orc.OrcFile, ...]
    stripes: tuple[tuple[orc.OrcFile, int, int], ...]

    @property
    def stripe_rows(self) -> tuple[int, ...]:
        """Rows of each stripe."""
        return tuple(file.stripe_rows[number] for file, number, _ in self.stripes)

    def fingerprint(self) -> str:
        """Changes when files are added, removed, renamed, reordered or rewritten with other sizes."""
        digest = hashlib.sha256()
        for file in self.files:
            digest.update(f"{file.path.name}\0{file.size}\0{file.stripe_rows}\n".encode())
        return digest.hexdigest()[:16]


def index_files(config: Config) -> FileIndex:
    """Reads the footers of all files that `io.data_paths` names.

    Raises:
      UserError: a file cannot be read or has not the columns that `features` names, or there are no
        rows at all.
    """
    files = []
    stripes = []
    for path in orc.find_files(config.io.data_paths):
        file = orc.read_footer(path)
        if file.rows == 0:
            continue
        features.check_schema(file, config.features)
        files.append(file)
        first_row = 0
        for number, rows in enumerate(file.stripe_rows):
            stripes.append((file, number, first_row))
            first_row += rows
    if not stripes:
        raise UserError(f"io.data_paths: {config.io.data_paths} has no rows")
    return FileIndex(tuple(files), tuple(stripes))


class BatchDataset(grain.MapDataset):
    """Batch number `i`, for any i: epochs follow each other, each in its own order.

    An element is the dictionary that `features.densify` describes, of `batch_rows` rows. The last
    batch of an epoch is filled with padding rows, or dropped with `io.drop_remainder`.
    """

    def __init__(self, index: FileIndex, config: Config, batch_rows: int):
        """Args: index of the files, the configuration, and the rows of a (global) batch."""
        super().__init__()
        self._index = index
        self._config = config
        self._batch_rows = batch_rows
        self._order = Order(
            stripe_rows=index.stripe_rows,
            window_rows=config.io.shuffle_rows,
            shuffle=config.io.shuffle,
            seed=config.io.seed,
        )
        # Two windows are in use where batches cross from one to the next, more where threads work
        # on batches as large as windows.
        threads = max(config.io.thread_num, 1)
        in_use = 2 + threads * batch_rows // config.io.shuffle_rows
        self._windows = _WindowCache(self._decode_window, in_use)

    def __len__(self) -> int:
        """Batches of an epoch."""
        if self._config.io.drop_remainder:
            return self._order.rows // self._batch_rows
        return -(-self._order.rows // self._batch_rows)

    def __getitem__(self, index: Any) -> Any:
        """The batch at `index`, an integer of any size."""
        if isinstance(index, slice):
            return self.slice(index)
        epoch, step = divmod(int(index), len(self))
        begin = step * self._batch_rows
        end = min(begin + self._batch_rows, self._order.rows)
        size = self._order.window_rows
        parts = []
        for number in range(begin // size, (end - 1) // size + 1):
            rows, order = self._windows.get(epoch, number)
            first = max(begin - number * size, 0)
            last = min(end - number * size, len(order))
            parts.append((rows, order[first:last]))
        if len(parts) == 1:
            rows, chosen = parts[0]
            return features.densify(rows, chosen, self._batch_rows, self._config)
        padded = [features.densify(r, chosen, len(chosen), self._config) for r, chosen in parts]
        padding = self._batch_rows - (end - begin)
        if padding:
            nothing = np.empty(0, np.int64)
            padded.append(features.densify(parts[0][0], nothing, padding, self._config))
        return {key: np.concatenate([part[key] for part in padded]) for key in padded[0]}

    def _decode_window(self, epoch: int, number: int) -> tuple[features.Rows, np.ndarray]:
        window = self._order.window(epoch, number)
        return features.concatenate([self._decode_piece(p) for p in window.pieces]), window.order

    def _decode_piece(self, piece: Piece) -> features.Rows:
        file, number, first_row = self._index.stripes[piece.stripe]
        batch = orc.read_stripe(file, number, [f.name for f in self._config.features])
        batch = batch.slice(piece.start, piece.stop - piece.start)
        return features.decode(batch, file, first_row + piece.start, self._config)


class _WindowCache:
    """Keeps the newest windows; a window is decoded by one thread while others wait for it."""

    def __init__(self, decode: Callable[[int, int], Any], capacity: int):
        self._decode = decode
        self._capacity = capacity
        self._lock = threading.Lock()
        self._entries: OrderedDict[tuple[int, int], tuple[threading.Lock, list[Any]]] = (
            OrderedDict()
        )

    def get(self, epoch: int, number: int) -> tuple[features.Rows, np.ndarray]:
        with self._lock:
            entry = self._entries.setdefault((epoch, number), (threading.Lock(), []))
            self._entries.move_to_end((epoch, number))
            while len(self._entries) > self._capacity:
                self._entries.popitem(last=False)
        lock, value = entry
        with lock:
            if not value:
                value.append(self._decode(epoch, number))
            return value[0]


class Reader(Iterator[dict[str, np.ndarray]]):
    """Endless batches with a reading position that can be saved and restored.

    Attributes:
      steps_per_epoch: batches of an epoch.
      rows_per_epoch: rows of an epoch.
    """

    def __init__(self, config: Config, batch_rows: int):
        """Indexes the files and starts reading at the first batch.

        Args:
          config: the configuration.
          batch_rows: rows of a global batch.

        Raises:
          UserError: see `index_files`; or an epoch would have no batch.
        """
        index = index_files(config)
        dataset = BatchDataset(index, config, batch_rows)
        self.steps_per_epoch = len(dataset)
        self.rows_per_epoch = sum(index.stripe_rows)
        if self.steps_per_epoch == 0:
            raise UserError(
                f"io.drop_remainder: a batch has {batch_rows} rows but the data only "
                f"{self.rows_per_epoch}; unset it or lower io.batch_size"
            )
        self._made_for = {
            "io.data_paths": index.fingerprint(),
            "io.shuffle": config.io.shuffle,
            "io.shuffle_rows": config.io.shuffle_rows,
            "io.seed": config.io.seed,
            "io.drop_remainder": config.io.drop_remainder,
            "rows of a global batch": batch_rows,
        }
        options = grain.ReadOptions(
            num_threads=config.io.thread_num, prefetch_buffer_size=config.io.prefetch
        )
        # Grain's defaults (16 threads, 500 batches) would hold many gigabytes.
        self._iterator = iter(dataset.repeat(None).to_iter_dataset(options))

    def __next__(self) -> dict[str, np.ndarray]:
        """The next batch, see `features.densify`."""
        return next(self._iterator)

    def get_state(self) -> dict[str, Any]:
        """The reading position, as JSON: index of the next batch, and what it was counted in."""
        return {"next_index": self._iterator.get_state()["next_index"], "made_for": self._made_for}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to a reading position that `get_state` returned.

        Raises:
          UserError: it was saved for other files or settings, which are named.
        """
        for name, now in self._made_for.items():
            saved = state["made_for"][name]
            if saved != now:
                what = "other files" if name == "io.data_paths" else f"{saved} (now {now})"
                raise UserError(
                    f"{name}: the checkpoint's reading position was saved with {what}; go back to "
                    f"that or give another train.output_dir"
                )
        self._iterator.set_state({"next_index": state["next_index"]})
