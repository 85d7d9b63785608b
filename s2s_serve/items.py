"""The items of an export: their ids, counts and other columns, and rules about them.

Shapes: I items, P given ids, T given ids without missing ones.
"""

# pyarrow.compute creates its functions at import, so type checkers do not see them.
# pyright: reportAttributeAccessIssue=false

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet

from s2s_serve import tensor_file
from s2s_serve.encoding import features, plain_histories
from s2s_serve.encoding.arrow import is_list, leaves
from s2s_serve.encoding.feature import NO_ID, FeatureConfig
from s2s_serve.encoding.ids import integers, is_text
from s2s_serve.encoding.item_numbers import ItemNumbers, codes_of
from s2s_serve.encoding.plain_histories import HistorySource
from s2s_serve.errors import UserError
from s2s_serve.json_values import from_json
from s2s_serve.manifest import Manifest

NAME, VECTORS = "items.parquet", "vectors.safetensors"
# The columns that every export has. `code` is the id as the tables know it.
ITEM, CODE, COUNT, TRAINED = "item", "code", "count", "trained"
OWN_COLUMNS = (ITEM, CODE, COUNT, TRAINED)


class Items:
    """The items of an export, sorted by descending count.

    Attributes:
      ids: the ids, as in the log.
      count_I: int64, number of events in training.
      trained_I: bool, whether an item was ever trained.
      vectors_IE: f32, the vectors of the items; a memory map.
      columns: columns with more about the items, such as titles, by name.
    """

    def __init__(self, directory: Path, manifest: Manifest):
        """Opens the items of a version.

        Raises:
          UserError: a file cannot be read, or has other items than the manifest says.
        """
        path = directory / NAME
        try:
            table = pyarrow.parquet.read_table(path)
        except (pa.ArrowException, OSError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{path}: the items cannot be read ({reason}); export again") from error
        missing = [name for name in OWN_COLUMNS if name not in table.column_names]
        if missing or table.num_rows != manifest.items:
            raise UserError(
                f"{path}: expected {manifest.items:,} items with columns {', '.join(OWN_COLUMNS)}, "
                f"found {table.num_rows:,} with {', '.join(table.column_names)}; export the run again"
            )
        self.vectors_IE = _vectors(directory / VECTORS, (manifest.items, manifest.width))
        self.ids: pa.Array = _array(table, ITEM)
        self.count_I = _array(table, COUNT).to_numpy()
        self.trained_I = _array(table, TRAINED).to_numpy(zero_copy_only=False)
        self.columns = {
            name: _array(table, name) for name in table.column_names if name not in OWN_COLUMNS
        }
        self._feature, self._kinds = manifest.item, manifest.kinds
        self.numbers = ItemNumbers(_words(_array(table, CODE).to_numpy(), manifest.item))

    def __len__(self) -> int:
        return len(self.ids)

    def numbers_of(self, ids: Collection[Any], called: str) -> np.ndarray:
        """Return int32 `[P]`: the number of each id, -1 for unknown items.

        With hash buckets, ids that share a row are one item, which has the first of them as its id; the
        others are unknown.

        Args:
          ids: ids as in the log.
          called: what the ids are called in messages.

        Raises:
          UserError: they are not ids of the kind that the log has.
        """
        if isinstance(ids, str | bytes | Mapping) or not isinstance(ids, Collection):
            raise UserError(f"{called}: expected a list of ids of items, found {ids!r:.60}")
        ids = ids.tolist() if isinstance(ids, np.ndarray) else list(ids)
        if not ids:
            return np.zeros(0, np.int32)
        history = [{self._feature.column_name: ids}]
        rows = plain_histories.to_rows(history, (self._feature,), self._kinds, called)
        source = HistorySource(rows.schema, called)
        block = features.decode(rows, source, 0, (self._feature,), lambda whole: whole)
        code_P = codes_of(block.values_PC)
        number_P = self.numbers.of(code_P)
        # Any id has a bucket, and so the code of some item.
        found_P = number_P >= 0
        given = leaves(rows.column(0)).filter(pa.array(found_P[code_P != NO_ID]))
        same_T = _same(given, self.ids.take(pa.array(number_P[found_P])))
        number_P[np.flatnonzero(found_P)[~same_T]] = -1
        return number_P

    def where(self, rules: Mapping[str, Collection[Any]]) -> np.ndarray:
        """Return bool `[I]`: the items whose columns have one of the given values.

        Args:
          rules: for each column, the allowed values; an item has to fulfil all of them. Times may be
            text as in ISO 8601.

        Raises:
          UserError: there is no such column, or the values have another type.
        """
        if not isinstance(rules, Mapping):
            raise UserError(
                f"where: expected allowed values by column, such as {{'genre': ['drama']}}, found "
                f"{rules!r:.60}"
            )
        allowed_I = np.ones(len(self), bool)
        for name, values in rules.items():
            if name not in self.columns:
                listed = ", ".join(self.columns) or "none"
                raise UserError(
                    f"where: expected columns of items ({listed}), found {name!r:.60}; columns come "
                    f"from the catalogue or the titles that were exported"
                )
            if isinstance(values, str | bytes | Mapping) or not isinstance(values, Collection):
                raise UserError(f"where: {name}: expected a list of values, found {values!r:.60}")
            column = self.columns[name]
            of = column.flatten() if is_list(column.type) else column
            try:
                wanted = pa.array([from_json(each, of.type) for each in values], of.type)
                found = pc.is_in(of, wanted).to_numpy(zero_copy_only=False)
            except (pa.ArrowException, OverflowError, TypeError, ValueError) as error:
                raise UserError(
                    f"where: {name}: expected values of type {of.type}, found {list(values)!r:.60}"
                ) from error
            if is_list(column.type):
                owner = pc.list_parent_indices(column).to_numpy()
                found = np.bincount(owner[found], minlength=len(self)) > 0
            allowed_I &= found
        return allowed_I


def _same(given: pa.Array, stored: pa.Array) -> np.ndarray:
    """Return bool `[T]`: whether ids are equal, and of the same kind."""
    for is_kind in (is_text, pa.types.is_temporal):
        if is_kind(given.type) != is_kind(stored.type):
            return np.zeros(len(given), bool)
    if is_text(given.type):
        binary = pa.large_binary()
        equal = pc.equal(given.cast(binary), stored.cast(binary))
        return equal.to_numpy(zero_copy_only=False)
    given_T, stored_T = integers(given), integers(stored)
    # One may be unsigned: then -1 and 2^64 - 1 have the same bits.
    equal_T = given_T.view(np.int64) == stored_T.view(np.int64)
    return equal_T & ((given_T < 0) == (stored_T < 0))


def _words(code_I: np.ndarray, feature: FeatureConfig) -> np.ndarray:
    """Return int32 `[I, W]`: the words of encoded ids."""
    if not feature.grows:
        return code_I.astype(np.int32)[:, None]
    return code_I.astype("<i8").view("<i4").astype(np.int32).reshape(-1, 2)


def _array(table: pa.Table, name: str) -> pa.Array:
    column = table[name]
    return pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)


def _vectors(path: Path, shape: tuple[int, int]) -> np.ndarray:
    arrays = tensor_file.read(path)
    if set(arrays) != {"vectors"} or arrays["vectors"].shape != shape:
        found = ", ".join(f"{name} {list(x.shape)}" for name, x in arrays.items())
        raise UserError(
            f"{path}: expected vectors {list(shape)}, found {found}; export the run again"
        )
    return arrays["vectors"]
