"""Reads one batch of training, to show what the model sees.

Shapes: A microbatches, B rows of a microbatch, L positions, K ids of a bag, M = A B L positions of the
batch.
"""

import contextlib
import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import pyarrow as pa
from jax.sharding import Mesh

from s2s_jax.cluster.mesh import make_mesh
from s2s_jax.config import Config, FeatureConfig, LossConfig
from s2s_jax.config.settings import Reading
from s2s_jax.data.batching.batch_fill import with_packing
from s2s_jax.data.batching.dataset import BatchDataset
from s2s_jax.data.batching.reader import Reader
from s2s_jax.data.encoding.indexing import index_files
from s2s_jax.data.inspection.assumptions import Assumptions
from s2s_jax.data.inspection.time_facts import time_columns
from s2s_jax.data.logs.index import FileIndex
from s2s_jax.embedding.sharded import present
from s2s_jax.errors import UserError
from s2s_jax.jobs.item_source import make_item_source
from s2s_jax.model.loss import Events, pair_up
from s2s_jax.training.step.batches import (
    SEQUENCE,
    Batch,
    count_rows,
    ids_of,
    padded_ids,
    put_batch,
    unpack,
)
from s2s_jax.training.step.settings import StepSettings
from s2s_serve.encoding import arrow, ids

# In `ShownBatch.target`: the position is not scored.
NO_TARGET = -1
_MISSING = np.datetime64("NaT", "s")
# A time from this number on is taken to be in the next finer unit: it would be the year 5138 in seconds,
# but is 1973 in milliseconds.
_FINER = 10**11


class ShownBatch(NamedTuple):
    """The batch of a step.

    Attributes:
      arrays: the arrays that the model gets, see `batches.unpack`: `length` `[A, B]`, `ids/<name>`
        `[A, B, L, K]` (or `[A, B, L, K, 2]`) of each feature, and more.
      target: int32 `[A, B, L]`, the position of the target of each position, or `NO_TARGET`.
      times: datetime64 `[A, B, L]`, the time of each event; None: the log has no readable times.
      counts: numbers of rows of the log (`examples`), of real positions (`tokens`), and more, see
        `batches.count_rows`.
      log_rows: the maximum of `examples`.
      devices: number and platform of the devices that share the batch.
    """

    arrays: dict[str, np.ndarray]
    target: np.ndarray
    times: np.ndarray | None
    counts: dict[str, int]
    log_rows: int
    devices: str


def show_batch(config: Config, step: int = 1, mesh: Mesh | None = None) -> ShownBatch:
    """Reads the batch of a step of an uninterrupted run.

    Args:
      config: the configuration of the run.
      step: number of the step, from 1.
      mesh: the devices that share the batch; None: all.

    Raises:
      UserError: the log cannot be read.
    """
    mesh = make_mesh() if mesh is None else mesh
    reading = Reading.of(config)
    # For a single batch, a cache and threads are not worthwhile.
    logs = dataclasses.replace(reading.logs, threads=0)
    reading = dataclasses.replace(reading, cache=None, logs=logs)
    index = index_files(logs, reading.decoding)
    reading = with_packing(reading, index)
    microbatches = config.train.gradient_accumulation_steps
    log_rows = reading.sequences.device_rows * mesh.size * microbatches
    reader = _BatchReader(reading, index, log_rows, step - 1)
    arrays = reader.read(reading.decoding.features)
    items = make_item_source(config, logs, index, mesh)
    sent = arrays if items is None else items.with_shares(arrays)
    drawn = {} if items is None else items.draw(step)
    batch = put_batch(sent, microbatches, mesh)
    unpacked = unpack(StepSettings.of(config), batch | drawn)
    timed = _with_times(reader, arrays, Assumptions.of(config))
    times = None
    if timed is not None:
        words = padded_ids(put_batch(timed.arrays, microbatches, mesh), config.model.seq_len)
        times = _as_times(np.asarray(words[..., -2:]), timed.kind, timed.unit)
    return ShownBatch(
        arrays={name: np.asarray(array) for name, array in unpacked.items()},
        target=_targets(config.loss, config.feature(config.loss.item_feature), unpacked),
        times=times,
        counts={name: int(count) for name, count in count_rows(batch).items()},
        log_rows=log_rows,
        devices=f"{mesh.size} {mesh.devices.flat[0].platform} device(s)",
    )


def _targets(loss: LossConfig, item: FeatureConfig, batch: Batch) -> np.ndarray:
    """`ShownBatch.target`: lets the loss pair the numbers of positions instead of their vectors.

    Args:
      loss: the settings of the loss.
      item: the feature of items.
      batch: the arrays of `batches.unpack`.
    """
    there = present(item, ids_of(batch))[..., 0]
    *outer, seq_len = there.shape
    rows = int(np.prod(outer))
    position_M1 = jnp.tile(jnp.arange(seq_len, dtype=jnp.float32), rows)[:, None]
    events = Events(
        length_B=batch["length"].reshape(rows),
        item_BLK=ids_of(batch)[item.name].reshape(rows, seq_len, -1),
        present_BL=there.reshape(rows, seq_len),
        sequence_BL=batch[SEQUENCE].reshape(rows, seq_len) if SEQUENCE in batch else None,
    )
    pairs = pair_up(loss, position_M1, position_M1, events)
    by_row = [
        np.asarray(x).reshape(rows, seq_len - 1)
        for x in (pairs.queries_NE, pairs.positives_NE, pairs.valid_N)
    ]
    target = np.full((rows, seq_len), NO_TARGET, np.int32)
    for row, (query, positive, valid) in enumerate(zip(*by_row, strict=True)):
        target[row, query[valid].astype(int)] = positive[valid].astype(int)
    return target.reshape(*outer, seq_len)


# --------------------------------------------------------------------------------------- reading


@dataclasses.dataclass(frozen=True)
class _BatchReader:
    """Reads one batch of a log, with any features.

    Attributes:
      reading: how the log is read.
      index: the index of the log's files.
      log_rows: the number of rows of the log in a batch.
      number: the number of the batch, from 0.
    """

    reading: Reading
    index: FileIndex
    log_rows: int
    number: int

    def read(self, features: tuple[FeatureConfig, ...]) -> dict[str, np.ndarray]:
        """The arrays of the batch, see `HostBatch.arrays`.

        Raises:
          UserError: the log has no such columns, or no batch.
        """
        decoding = dataclasses.replace(self.reading.decoding, features=features)
        reading = dataclasses.replace(self.reading, decoding=decoding)
        # Raises the errors of training, for example if the log has less than one batch.
        Reader(reading, self.log_rows, index=self.index).close()
        with contextlib.closing(BatchDataset(reading, self.log_rows, self.index)) as dataset:
            return dataset[self.number].arrays


class _Timed(NamedTuple):
    """A batch with the times of its events.

    Attributes:
      arrays: the arrays of the batch; ids have two more columns, the low and the high word of the time.
      kind: the type of the times in the log.
      unit: the unit of times that are numbers or text; None: unknown.
    """

    arrays: dict[str, np.ndarray]
    kind: pa.DataType
    unit: str | None


def _with_times(
    reader: _BatchReader, arrays: dict[str, np.ndarray], assumptions: Assumptions
) -> _Timed | None:
    """The batch with times; None if the log has no readable times.

    Args:
      reader: the reader of the batch.
      arrays: the batch without times.
      assumptions: the assumptions about the log; they name its columns of times.
    """
    schemas = [file.schema for file in reader.index.files]
    for name, unit in time_columns(schemas[0], assumptions).items():
        kinds = {schema.field(name).type for schema in schemas if name in schema.names}
        leaf = arrow.leaf_type(next(iter(kinds)))
        if len(kinds) != 1 or not ids.accepted(leaf, "time_gap"):
            continue
        times = FeatureConfig(name=f"times of {name}", column=name, hash_bucket_size=0)
        try:
            timed = reader.read((*reader.reading.decoding.features, times))
        except UserError:
            # Times are only shown here. Training may not need this column, so errors in it are ignored.
            continue
        timed_ids, plain_ids = (x["ids" if "ids" in x else "values"] for x in (timed, arrays))
        same_lengths = np.array_equal(timed["length"], arrays["length"])
        if same_lengths and np.array_equal(timed_ids[..., :-2], plain_ids):
            return _Timed(timed, leaf, unit)
    return None


def _as_times(words: np.ndarray, kind: pa.DataType, unit: str | None) -> np.ndarray:
    """Converts the words of times to datetime64 `[…]`.

    Args:
      words: int32 `[…, 2]`, low and high words.
      kind: see `_Timed`.
      unit: see `_Timed`.
    """
    missing = (words == ids.NO_ID).all(axis=-1)
    numbers = np.ascontiguousarray(words).view("<i8")[..., 0]
    if pa.types.is_date32(kind):
        numpy_unit = "D"
    elif pa.types.is_date64(kind):
        numpy_unit = "ms"
    elif pa.types.is_timestamp(kind):
        numpy_unit = kind.unit
    else:
        numpy_unit = unit or _likely_unit(numbers[~missing])
    times = numbers.astype(f"datetime64[{numpy_unit}]").astype("datetime64[s]")
    return np.where(missing, _MISSING, times)


def _likely_unit(numbers: np.ndarray) -> str:
    """The unit in which the numbers are recent times."""
    largest = np.abs(numbers).max(initial=0)
    finer = [
        unit for power, unit in enumerate(("ms", "us", "ns")) if largest >= _FINER * 1000**power
    ]
    return finer[-1] if finer else "s"
