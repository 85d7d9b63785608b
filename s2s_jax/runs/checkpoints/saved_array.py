"""Reads one array of a checkpoint part by part, so that it need not fit into memory."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts

# Chunks that were decoded last stay in memory, because a chunk may be larger than what is read at once.
_CACHE_BYTES = 2**28


class SavedArray:
    """An array of a checkpoint.

    Attributes:
      shape: its shape.
      dtype: its type.
    """

    def __init__(self, state: Path, keys: tuple[str, ...]):
        """Opens an array.

        Args:
          state: the directory `state` of a checkpoint.
          keys: the path of the array in the tree.

        Raises:
          ValueError: the array cannot be opened (TensorStore raises other types, too).
        """
        metadata = _metadata(state)
        name = ".".join(keys)
        kvstore: dict[str, Any] = {"driver": "file", "path": f"{state / name}/"}
        if metadata["use_ocdbt"]:
            # A URL would need %, ? and # of the path escaped.
            base = {"driver": "file", "path": f"{state}/"}
            kvstore = {"driver": "ocdbt", "base": base, "path": f"{name}/"}
        driver = "zarr3" if metadata["use_zarr3"] else "zarr"
        context = ts.Context({"cache_pool": {"total_bytes_limit": _CACHE_BYTES}})
        spec = {
            "driver": driver,
            "kvstore": kvstore,
            # Otherwise, a chunk that was lost is read as zeros. Orbax says whether it writes chunks of
            # zeros, too.
            "fill_missing_data_reads": not metadata["store_array_data_equal_to_fill_value"],
        }
        self._array = ts.open(spec, context=context, open=True, read=True).result()
        self.shape: tuple[int, ...] = tuple(self._array.shape)
        self.dtype: np.dtype = self._array.dtype.numpy_dtype

    def read(self, begin: int, stop: int) -> np.ndarray:
        """Return the rows `begin` to `stop - 1`.

        Raises:
          ValueError: they are damaged or missing (TensorStore raises other types, too).
        """
        return self._array[begin:stop].read().result()


def keys_of_arrays(state: Path) -> list[tuple[str, ...]]:
    """Return the paths of all arrays in the tree of a checkpoint."""
    tree = _metadata(state)["tree_metadata"].values()
    return [tuple(key["key"] for key in entry["key_metadata"]) for entry in tree]


def _metadata(state: Path) -> dict[str, Any]:
    return json.loads((state / "_METADATA").read_text())
