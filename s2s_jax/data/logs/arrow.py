"""Arrow arrays of lists, as the columns of logs are, and where such columns may come from."""

# pyarrow.compute makes its functions at run time.
# pyright: reportAttributeAccessIssue=false

from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc


class Source(Protocol):
    """What rows come from: an `orc.OrcFile`, or rows that were given in memory."""

    @property
    def path(self) -> Path | str:
        """The file, or what else messages shall call it."""
        ...

    @property
    def schema(self) -> pa.Schema:
        """Names and types of its columns."""
        ...

    @property
    def encrypted(self) -> frozenset[str]:
        """Columns that cannot be read as what was written."""
        ...


def is_list(data_type: pa.DataType) -> bool:
    """Lists of either offset size."""
    return pa.types.is_list(data_type) or pa.types.is_large_list(data_type)


def leaf_type(data_type: pa.DataType) -> pa.DataType:
    """T of T, list<T> and list<list<T>>."""
    for _ in range(2):
        data_type = data_type.value_type if is_list(data_type) else data_type
    return data_type


def leaves(array: pa.Array) -> pa.Array:
    """The values of T, list<T> and list<list<T>>, one after the other, without nulls."""
    while is_list(array.type):
        array = array.flatten()
    return array.drop_null() if array.null_count else array


def list_lengths(lists: pa.Array) -> np.ndarray:
    """int64 length of each list, 0 for null."""
    lengths = pc.fill_null(pc.list_value_length(lists), 0)
    return lengths.to_numpy(zero_copy_only=False).astype(np.int64)
