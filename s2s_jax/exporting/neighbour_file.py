"""Writes counted neighbours as a sparse matrix.

Shapes: I items, T pairs of items.
"""

from pathlib import Path

import numpy as np
import scipy.sparse

from s2s_serve import tensor_file
from s2s_serve.tensor_file import Layout

_PAIRS_AT_ONCE = 2**22


def write_neighbours(path: Path, matrix_II: scipy.sparse.csr_matrix) -> None:
    """Writes the weights of pairs, whole numbers in units of `PAIR_UNIT`.

    Args:
      path: the file.
      matrix_II: the weight of the second item as a neighbour of the first.

    Raises:
      OSError: the file cannot be written.
    """
    pairs = len(matrix_II.data)
    begins = range(0, pairs, _PAIRS_AT_ONCE)
    layouts = {
        "begin": Layout(np.dtype(np.int64), (len(matrix_II.indptr),)),
        "item": Layout(np.dtype(np.int32), (pairs,)),
        "weight": Layout(np.dtype(np.int64), (pairs,)),
    }
    parts = {
        "begin": [matrix_II.indptr.astype(np.int64)],
        "item": (matrix_II.indices[b : b + _PAIRS_AT_ONCE].astype(np.int32) for b in begins),
        "weight": (matrix_II.data[b : b + _PAIRS_AT_ONCE].astype(np.int64) for b in begins),
    }
    tensor_file.write(path, layouts, parts)
