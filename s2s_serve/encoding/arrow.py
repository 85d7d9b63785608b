"""Arrow arrays of lists, such as the columns of logs, and a protocol for their sources."""

# pyarrow.compute makes its functions at run time.
# pyright: reportAttributeAccessIssue=false

from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc


class Source(Protocol):
    """A source of rows: an `orc.OrcFile`, or rows in memory."""

    @property
    def path(self) -> object:
        """The file, or another name for the source; its text appears in messages."""
        ...

    @property
    def schema(self) -> pa.Schema:
        """Names and types of the columns."""
        ...

    @property
    def encrypted(self) -> frozenset[str]:
        """Encrypted columns, whose original values cannot be read."""
        ...


def is_list(data_type: pa.DataType) -> bool:
    """Whether the type is a list, with offsets of either size."""
    return pa.types.is_list(data_type) or pa.types.is_large_list(data_type)


def leaf_type(data_type: pa.DataType) -> pa.DataType:
    """The type T of T, list<T> or list<list<T>>."""
    for _ in range(2):
        data_type = data_type.value_type if is_list(data_type) else data_type
    return data_type


def leaves(array: pa.Array) -> pa.Array:
    """The values of an array of T, list<T> or list<list<T>>, flattened, without nulls."""
    while is_list(array.type):
        array = array.flatten()
    return array.drop_null() if array.null_count else array


def list_lengths(lists: pa.Array) -> np.ndarray:
    """The length of each list, int64; 0 for null."""
    lengths = pc.fill_null(pc.list_value_length(lists), 0)
    return lengths.to_numpy(zero_copy_only=False).astype(np.int64)
