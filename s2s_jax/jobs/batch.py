"""One batch as the model sees it, to look at.

Shapes: A microbatches, B rows of a microbatch, L positions, K ids of a bag, M = A B rows.
"""

import contextlib
import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import pyarrow as pa
from jax.sharding import Mesh

from s2s_jax.cluster.mesh import make_mesh
from s2s_jax.config import Config, FeatureConfig
from s2s_jax.config.settings import Items, Meaning, Negatives, Reading, Split
from s2s_jax.data.batching.batch_fill import with_packing
from s2s_jax.data.batching.dataset import BatchDataset
from s2s_jax.data.batching.reader import Reader
from s2s_jax.data.encoding import ids
from s2s_jax.data.encoding.indexing import index_files
from s2s_jax.data.inspection.time_facts import time_columns
from s2s_jax.data.items.catalogue import items_of_training
from s2s_jax.data.logs import arrow
from s2s_jax.data.logs.index import FileIndex
from s2s_jax.embedding.sharded import present
from s2s_jax.errors import UserError
from s2s_jax.model.loss import Events, pair_up
from s2s_jax.training.item_source import ItemSource
from s2s_jax.training.step.batches import (
    SEQUENCE,
    Batch,
    count_rows,
    ids_of,
    padded_ids,
    put_batch,
    unpack,
)

# In `ShownBatch.target`: a position that is scored against no event.
NO_TARGET = -1
_MISSING = np.datetime64("NaT", "s")
# Numbers from these on, in units since 1970, are a thousand times as fine: 5138 in seconds is 1973 in
# milliseconds.
_FINER = 10**11


class ShownBatch(NamedTuple):
    """The batch of a step.

    Attributes:
      arrays: what a step makes of it, see `batches.unpack`: `length` `[A, B]`, `ids/<name>`
        `[A, B, L, K]` (or `[A, B, L, K, 2]`) of each feature, and more.
      target: int32 `[A, B, L]`: the position whose event a position is scored against, or `NO_TARGET`.
      times: datetime64 `[A, B, L]` of the events; None: the log has no column of times.
      counts: what it holds: `examples`, rows of the log; `tokens`, real positions; and more.
      log_rows: rows of the log that it has room for.
      devices: number and platform of the devices that share it.
    """

    arrays: dict[str, np.ndarray]
    target: np.ndarray
    times: np.ndarray | None
    counts: dict[str, int]
    log_rows: int
    devices: str


def show_batch(config: Config, step: int = 1, mesh: Mesh | None = None) -> ShownBatch:
    """The batch of a step, as a run that is not interrupted gets it.

    Args:
      config: of the run.
      step: from 1 on.
      mesh: devices that share it; None: all.

    Raises:
      UserError: the log cannot be read.
    """
    mesh = make_mesh() if mesh is None else mesh
    made = Reading.of(config)
    # Nothing is written, and only this batch is read.
    logs = dataclasses.replace(made.logs, threads=0)
    made = dataclasses.replace(made, cache=None, logs=logs)
    index = index_files(made.logs, made.decoding)
    reading = with_packing(made, index)
    microbatches = config.train.gradient_accumulation_steps
    log_rows = reading.sequences.device_rows * mesh.size * microbatches
    read = _Batches(reading, index, log_rows, step - 1)
    arrays = read.arrays(reading.decoding.features)
    sent = dict(arrays)
    drawn = {}
    if config.loss.needs_catalogue:
        catalogue = items_of_training(
            Items.of(config), Split.of(config), reading.logs, index, config.loss.catalogue
        )
        items = ItemSource(Items.of(config), Negatives.of(config), catalogue, mesh)
        sent, drawn = items.with_shares(arrays), items.draw(step)
    batch = put_batch(sent, microbatches, mesh)
    unpacked = unpack(config, batch | drawn)
    times = None
    timed = _with_times(read, arrays, config)
    if timed is not None:
        of_batch, seconds = timed
        words = padded_ids(put_batch(of_batch, microbatches, mesh), config.model.seq_len)
        times = _as_times(np.asarray(words[..., -2:]), seconds)
    return ShownBatch(
        arrays={name: np.asarray(array) for name, array in unpacked.items()},
        target=_targets(config, unpacked),
        times=times,
        counts={name: int(count) for name, count in count_rows(batch).items()},
        log_rows=log_rows,
        devices=f"{mesh.size} {mesh.devices.flat[0].platform} device(s)",
    )


def _targets(config: Config, batch: Batch) -> np.ndarray:
    """`ShownBatch.target`, found by pairing positions in the place of their vectors."""
    feature = config.feature(config.loss.item_feature)
    there = present(feature, ids_of(batch))[..., 0]
    *outer, seq_len = there.shape
    rows = int(np.prod(outer))
    position_M1 = jnp.tile(jnp.arange(seq_len, dtype=jnp.float32), rows)[:, None]
    events = Events(
        length_B=batch["length"].reshape(rows),
        item_BLK=ids_of(batch)[feature.name].reshape(rows, seq_len, -1),
        present_BL=there.reshape(rows, seq_len),
        sequence_BL=batch[SEQUENCE].reshape(rows, seq_len) if SEQUENCE in batch else None,
    )
    pairs = pair_up(config.loss, position_M1, position_M1, events)
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
class _Batches:
    """One batch of a log, with any features.

    Attributes:
      reading: how it is read.
      index: of the files.
      log_rows: rows of the log in it.
      number: of the batch, from 0 on.
    """

    reading: Reading
    index: FileIndex
    log_rows: int
    number: int

    def arrays(self, features: tuple[FeatureConfig, ...]) -> dict[str, np.ndarray]:
        """See `HostBatch.arrays`."""
        decoding = dataclasses.replace(self.reading.decoding, features=features)
        reading = dataclasses.replace(self.reading, decoding=decoding)
        # Refuses a log that has no batch.
        Reader(reading, self.log_rows, index=self.index).close()
        with contextlib.closing(BatchDataset(reading, self.log_rows, self.index)) as dataset:
            return dataset[self.number].arrays


def _with_times(
    read: _Batches, arrays: dict[str, np.ndarray], config: Config
) -> tuple[dict[str, np.ndarray], "_Unit"] | None:
    """The batch with two more columns, the words of the events' times; None where there are none.

    Args:
      read: reads it.
      arrays: the batch without them.
      config: says which columns hold times.
    """
    schemas = [file.schema for file in read.index.files]
    for name, unit in time_columns(schemas[0], Meaning.of(config)).items():
        kinds = {schema.field(name).type for schema in schemas if name in schema.names}
        leaf = arrow.leaf_type(next(iter(kinds)))
        if len(kinds) != 1 or not ids.accepted(leaf, "time_gap"):
            continue
        times = FeatureConfig(name=f"times of {name}", column=name, hash_bucket_size=0)
        try:
            timed = read.arrays((*read.reading.decoding.features, times))
        except UserError:
            # They are only shown: whatever is wrong with them, training does without.
            continue
        ids_of_both = [found["ids" if "ids" in found else "values"] for found in (timed, arrays)]
        same = np.array_equal(timed["length"], arrays["length"])
        if same and np.array_equal(ids_of_both[0][..., :-2], ids_of_both[1]):
            return timed, _Unit(leaf, unit)
    return None


class _Unit(NamedTuple):
    """What a number of a column of times counts.

    Attributes:
      kind: type of the column's entries.
      unit: of numbers and text; None: it is guessed.
    """

    kind: pa.DataType
    unit: str | None


def _as_times(words: np.ndarray, unit: _Unit) -> np.ndarray:
    """datetime64 `[…]` of int32 `[…, 2]` low and high words."""
    missing = (words == ids.NO_ID).all(axis=-1)
    numbers = np.ascontiguousarray(words).view("<i8")[..., 0]
    if pa.types.is_date32(unit.kind):
        found = numbers.astype("datetime64[D]").astype("datetime64[s]")
    elif pa.types.is_date64(unit.kind):
        found = numbers.astype("datetime64[ms]").astype("datetime64[s]")
    else:
        of_type = unit.kind.unit if pa.types.is_timestamp(unit.kind) else unit.unit
        found = numbers.astype(f"datetime64[{of_type or _likely_unit(numbers[~missing])}]")
        found = found.astype("datetime64[s]")
    return np.where(missing, _MISSING, found)


def _likely_unit(numbers: np.ndarray) -> str:
    """The unit in which numbers are times of now, more or less."""
    largest = np.abs(numbers).max(initial=0)
    finer = [
        unit for power, unit in enumerate(("ms", "us", "ns")) if largest >= _FINER * 1000**power
    ]
    return finer[-1] if finer else "s"
