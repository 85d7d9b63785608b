"""Rows of the embedding tables of an export, read through memory maps.

Shapes: U ids, W words of an id, D width, K ids of a bag, R rows of a shard.
"""

from pathlib import Path

import numpy as np

from s2s_serve import tensor_file
from s2s_serve.encoding.feature import NO_ID, FeatureConfig
from s2s_serve.encoding.id_keys import keys_of
from s2s_serve.encoding.table_layout import NUM_SEGMENTS, row_of_bucket
from s2s_serve.errors import UserError
from s2s_serve.manifest import TableEntry

# The row of an id that has none.
NO_ROW = -1


class Table:
    """An embedding table."""

    def __init__(self, directory: Path, entry: TableEntry):
        """Opens the shards of a table.

        Args:
          directory: the directory of the version.
          entry: the table's entry in the manifest.

        Raises:
          UserError: a shard does not have the arrays of the table.
        """
        self._entry = entry
        self._rows: list[np.ndarray] = []
        self._keys: list[np.ndarray] = []
        for name in entry.shards:
            arrays = tensor_file.read(directory / name)
            wanted = {"rows", "keys"} if entry.grows else {"rows"}
            if set(arrays) != wanted or arrays["rows"].shape[1:] != (entry.emb_dim,):
                found = ", ".join(f"{key} {list(x.shape)}" for key, x in arrays.items())
                raise UserError(
                    f"{directory / name}: expected {' and '.join(sorted(wanted))} with rows of "
                    f"{entry.emb_dim} numbers, found {found}; export the run again"
                )
            self._rows.append(arrays["rows"])
            if entry.grows:
                self._keys.append(arrays["keys"])
        self._ends = np.cumsum([len(rows) for rows in self._rows])
        rows = int(self._ends[-1]) if len(self._ends) else 0
        if not entry.grows and rows != NUM_SEGMENTS * entry.segment_rows:
            raise UserError(
                f"{directory}: expected {NUM_SEGMENTS * entry.segment_rows:,} rows in "
                f"{', '.join(entry.shards)}, found {rows:,}; export the run again"
            )
        # An empty shard begins where the next one does, which is never searched in it.
        last, first_keys = np.uint64(2**64 - 1), []
        for keys in reversed(self._keys):
            last = keys[0] if len(keys) else last
            first_keys.append(last)
        self._first_keys = np.array(first_keys[::-1], np.uint64)
        default = entry.default_row
        self._default_D = np.zeros(entry.emb_dim, np.float32)
        if default is not None:
            self._default_D = np.asarray(default, np.float32)

    def rows_of(self, ids_UW: np.ndarray) -> np.ndarray:
        """Return int64 `[U]`: the row of each id, `NO_ROW` for ids without a row and for no id.

        Args:
          ids_UW: int32 buckets, `[U, 1]`, or both words of ids, `[U, 2]`.
        """
        if not self._entry.grows:
            bucket_U = ids_UW[:, 0].astype(np.int64)
            row_U = row_of_bucket(bucket_U, self._entry.segment_rows)
            return np.where(bucket_U >= 0, row_U, NO_ROW)
        low_U, high_U = np.ascontiguousarray(ids_UW).view(np.uint32).T
        first_U, second_U = keys_of(low_U, high_U)
        key_U = first_U.astype(np.uint64) << np.uint64(32) | second_U.astype(np.uint64)
        if len(self._keys) == 1:
            return _places(self._keys[0], key_U)
        row_U = np.full(len(key_U), NO_ROW, np.int64)
        shard_U = np.searchsorted(self._first_keys, key_U, side="right") - 1
        for shard in np.unique(shard_U[shard_U >= 0]):
            (asked,) = np.nonzero(shard_U == shard)
            place = _places(self._keys[shard], key_U[asked])
            first_row = 0 if shard == 0 else int(self._ends[shard - 1])
            row_U[asked] = np.where(place >= 0, first_row + place, NO_ROW)
        return row_U

    def read(self, row_U: np.ndarray, present_U: np.ndarray) -> np.ndarray:
        """Return f32 `[U, D]`: the rows; the default row (or zeros) for ids without one.

        Args:
          row_U: int64, the result of `rows_of`.
          present_U: bool, whether there is an id; otherwise the result is zeros.
        """
        if len(self._rows) == 1 and len(self._rows[0]):
            out_UD = self._rows[0][np.maximum(row_U, 0)]
            none_U = row_U == NO_ROW
            if none_U.any():
                out_UD[none_U] = np.where(present_U[none_U, None], self._default_D, 0)
            return out_UD
        out_UD = np.zeros((len(row_U), self._entry.emb_dim), np.float32)
        shard_U = np.searchsorted(self._ends, row_U, side="right")
        for shard in np.unique(shard_U[row_U >= 0]):
            (asked,) = np.nonzero((shard_U == shard) & (row_U >= 0))
            first_row = 0 if shard == 0 else int(self._ends[shard - 1])
            out_UD[asked] = self._rows[shard][row_U[asked] - first_row]
        out_UD[(row_U == NO_ROW) & present_U] = self._default_D
        return out_UD


def embed(table: Table, feature: FeatureConfig, ids_PC: np.ndarray) -> np.ndarray:
    """Return f32 `[P, D]`: the embeddings of a feature at some positions, zeros for an empty bag.

    Args:
      table: the table of the feature.
      feature: the feature.
      ids_PC: int32, the ids of the feature: `bag_size * id_words` columns, see `Block.values_PC`.
    """
    ids_UW = np.ascontiguousarray(ids_PC).reshape(-1, feature.id_words)
    present_U = (ids_UW != NO_ID).any(axis=1) if feature.grows else ids_UW[:, 0] >= 0
    rows_UD = table.read(table.rows_of(ids_UW), present_U)
    if feature.bag_size == 1:
        return rows_UD
    shape = (len(ids_PC), feature.bag_size)
    sum_PD = rows_UD.reshape(*shape, -1).sum(axis=1)
    if feature.combiner == "mean":
        sum_PD /= np.maximum(present_U.reshape(shape).sum(axis=1), 1)[:, None].astype(np.float32)
    return sum_PD


def _places(keys_R: np.ndarray, key_U: np.ndarray) -> np.ndarray:
    """Return int64 `[U]`: the place of each key among ascending keys, `NO_ROW` if it is not there.

    The key of no id is not there, because it is the key of no row.
    """
    if not len(keys_R):
        return np.full(len(key_U), NO_ROW, np.int64)
    place_U = np.minimum(np.searchsorted(keys_R, key_U), len(keys_R) - 1)
    return np.where(keys_R[place_U] == key_U, place_U, NO_ROW)
