"""Writes the items of an export: their ids, counts, other columns and vectors.

Shapes: I items, B items that are encoded together, D concatenated embedding width, E model width, C
columns of ids.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from s2s_jax.config import FeatureConfig
from s2s_jax.config.settings import Items
from s2s_jax.data.items.catalogue import Catalogue
from s2s_serve import items as served
from s2s_serve import tensor_file
from s2s_serve.encoding.blocks import NO_ID
from s2s_serve.encoding.item_numbers import codes_of
from s2s_serve.tables import Table, embed
from s2s_serve.tensor_file import Layout

_ITEMS_AT_ONCE = 2**14


def write_vectors(
    path: Path,
    catalogue: Catalogue,
    items: Items,
    tables: Mapping[str, Table],
    item_vectors: Callable[[np.ndarray], np.ndarray],
    width: int,
) -> None:
    """Writes the vector of each item, with the items of one part in memory.

    Args:
      path: the file.
      catalogue: the items.
      items: what items show of themselves.
      tables: the tables that were exported.
      item_vectors: f32 `[B, D]`, embedded events with these items → f32 `[B, E]`.
      width: E.

    Raises:
      OSError: the file cannot be written.
    """
    total = len(catalogue.item)

    def parts() -> Iterator[np.ndarray]:
        for begin in range(0, total, _ITEMS_AT_ONCE):
            stop = min(begin + _ITEMS_AT_ONCE, total)
            embedded = [_embedded(f, items, catalogue, tables, begin, stop) for f in items.features]
            events_BD = np.concatenate(embedded, axis=1)
            # All parts have one shape, so that one program is compiled.
            padded_BD = np.zeros((_ITEMS_AT_ONCE, events_BD.shape[1]), np.float32)
            padded_BD[: len(events_BD)] = events_BD
            yield np.asarray(item_vectors(padded_BD), np.float32)[: len(events_BD)]

    layout = Layout(np.dtype(np.float32), (total, width))
    tensor_file.write(path, {"vectors": layout}, {"vectors": parts()})


def items_trained(
    catalogue: Catalogue,
    items: Items,
    tables: Mapping[str, Table],
    touched: Mapping[str, np.ndarray],
) -> np.ndarray:
    """Return bool `[I]`: whether an item was ever trained; see `Inference.items_trained`.

    Args:
      catalogue: the items.
      items: what items show of themselves.
      tables: the tables that were exported.
      touched: for each table of `own_features`, bool `[R]`: whether a row was ever trained.
    """
    trained_I = np.zeros(len(catalogue.item), bool)
    for feature in own_features(items):
        ids_UW = _columns(feature, catalogue.ids[feature.name]).reshape(-1, feature.id_words)
        row_U = tables[feature.table_name].rows_of(ids_UW)
        rows_R = touched[feature.table_name]
        touched_U = (row_U >= 0) & np.append(rows_R, False)[row_U]
        trained_I |= touched_U.reshape(len(trained_I), -1).any(axis=1)
    return trained_I


def own_features(items: Items) -> Sequence[FeatureConfig]:
    """Return the features that say whether an item was trained: its own, if items show it."""
    if items.item.name in items.shown:
        return (items.item,)
    return tuple(f for f in items.features if f.name in items.shown)


def write_items(
    path: Path,
    catalogue: Catalogue,
    item: FeatureConfig,
    count_I: np.ndarray,
    trained_I: np.ndarray,
    columns: Mapping[str, pa.Array],
) -> None:
    """Writes the ids of the items and what is known about them.

    Args:
      path: the file.
      catalogue: the items, sorted by descending count.
      item: the item feature.
      count_I: int64, number of events of each item in training.
      trained_I: bool, whether an item was ever trained.
      columns: other columns, with an entry for each item.

    Raises:
      OSError: the file cannot be written.
    """
    code_I = codes_of(_columns(item, catalogue.ids[item.name]))
    own = (catalogue.item, pa.array(code_I), pa.array(count_I), pa.array(trained_I))
    table = pa.table(dict(zip(served.OWN_COLUMNS, own, strict=True)) | dict(columns))
    pyarrow.parquet.write_table(table, str(path), compression="zstd")


def _embedded(
    feature: FeatureConfig,
    items: Items,
    catalogue: Catalogue,
    tables: Mapping[str, Table],
    begin: int,
    stop: int,
) -> np.ndarray:
    """Return f32 `[B, D]`: the embeddings of a feature, zeros if items do not show it."""
    if feature.name not in items.shown:
        return np.zeros((stop - begin, feature.emb_dim), np.float32)
    ids_BC = _columns(feature, catalogue.ids[feature.name][begin:stop])
    return embed(tables[feature.table_name], feature, ids_BC)


def _columns(feature: FeatureConfig, ids: np.ndarray) -> np.ndarray:
    """Return int32 `[B, C]` from `[B, K]` or `[B, K, 2]` ids of a catalogue."""
    found = np.ascontiguousarray(ids).reshape(len(ids), feature.bag_size * feature.id_words)
    assert found.dtype == np.int32, f"ids are int32, and missing ones {NO_ID}"
    return found
