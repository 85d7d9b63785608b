"""Writes the embedding tables of a checkpoint in shards, with a part of a table in memory at a time.

The rows of a growing table are sorted by the key of their id, and rows without an id are left out: the
first bits of a key are its segment, so each segment is sorted by itself, and has to fit into memory:
1/256 of the table. See `docs/reference/export_format.md`.

Shapes: R rows of a part, D width, S segments.
"""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from s2s_jax.embedding.tables import TableSpec
from s2s_jax.runs.checkpoints.saved_tables import SavedTables, TablePart, TableParts
from s2s_serve import tensor_file
from s2s_serve.encoding.id_keys import EMPTY
from s2s_serve.manifest import TableEntry
from s2s_serve.tensor_file import Layout

# Approximate size of a part in memory, and of a file.
_PART_BYTES = 2**26
_SHARD_BYTES = 2**30


class Written(NamedTuple):
    """A table that was written.

    Attributes:
      entry: its entry in the manifest.
      touched_R: bool, whether a row (in the order of the shards) was ever trained; None if unknown.
    """

    entry: TableEntry
    touched_R: np.ndarray | None


def write_table(
    saved: SavedTables,
    spec: TableSpec,
    directory: Path,
    with_touched: bool,
    shard_bytes: int = _SHARD_BYTES,
) -> Written:
    """Writes a table.

    Args:
      saved: the checkpoint.
      spec: the table.
      directory: the directory of the version, with a directory `tables`.
      with_touched: whether to find out which rows were ever trained.
      shard_bytes: the approximate size of a file; a segment is never divided.

    Raises:
      UserError: the checkpoint cannot be read.
      OSError: a file cannot be written.
    """
    reader = saved.in_parts(spec, moments=with_touched)
    row_bytes = 4 * spec.emb_dim
    bounds = _bounds(reader.rows_S * row_bytes, shard_bytes)
    part_rows = max(_PART_BYTES // row_bytes, 1)
    names, touched = [], []
    for number, (begin, stop) in enumerate(itertools.pairwise(bounds)):
        name = f"tables/{spec.name}-{number:05}-of-{len(bounds) - 1:05}.safetensors"
        names.append(name)
        touched += _write_shard(directory / name, reader, begin, stop, part_rows)
    default = saved.default_row(spec) if spec.default_row else None
    entry = TableEntry(
        emb_dim=spec.emb_dim,
        grows=spec.grows,
        segment_rows=0 if spec.grows else spec.segment_rows,
        shards=tuple(names),
        default_row=None if default is None else tuple(map(float, default)),
    )
    return Written(entry, np.concatenate(touched) if with_touched else None)


def _bounds(bytes_S: np.ndarray, shard_bytes: int) -> list[int]:
    """Return the first segment of each shard, and the number of segments."""
    bounds, held = [0], 0
    for segment, of_segment in enumerate(bytes_S):
        if held and held + of_segment > shard_bytes:
            bounds.append(segment)
            held = 0
        held += int(of_segment)
    return [*bounds, len(bytes_S)]


def _write_shard(
    path: Path, reader: TableParts, begin: int, stop: int, part_rows: int
) -> list[np.ndarray]:
    """Writes segments `begin` to `stop - 1`, and returns which of their rows were ever trained."""
    rows = int(reader.rows_S[begin:stop].sum())
    layouts = {"rows": Layout(np.dtype(np.float32), (rows, reader.values.shape[1]))}
    keys: list[np.ndarray] = []
    touched: list[np.ndarray] = []

    def values() -> Iterator[np.ndarray]:
        for part in reader.read(begin, stop, part_rows):
            packed, key_R = (part, None) if part.keys_R2 is None else _sorted(part)
            keys.extend([] if key_R is None else [key_R])
            touched.extend([] if packed.touched_R is None else [packed.touched_R])
            yield packed.values_RD

    parts: dict[str, Iterator[np.ndarray]] = {"rows": values()}
    if reader.keys is not None:
        layouts["keys"] = Layout(np.dtype(np.uint64), (rows,))
        # The list is filled while the rows are written.
        parts["keys"] = (key_R for key_R in keys)
    tensor_file.write(path, layouts, parts)
    return touched


def _sorted(part: TablePart) -> tuple[TablePart, np.ndarray]:
    """Return the rows that have an id, sorted by their key, and uint64 `[R]` keys."""
    assert part.keys_R2 is not None, "only growing tables are sorted"
    (used,) = np.nonzero((part.keys_R2 != EMPTY).any(axis=1))
    first_R, second_R = part.keys_R2[used].astype(np.uint64).T
    key_R = first_R << np.uint64(32) | second_R
    order = np.argsort(key_R)
    rows = used[order]
    touched_R = None if part.touched_R is None else part.touched_R[rows]
    return TablePart(part.values_RD[rows], part.keys_R2[rows], touched_R), key_R[order]
