"""A sample of stripes, evenly spread over a log."""

import numpy as np

from s2s_jax.data.logs.index import FileIndex

# Enough for averages, and few enough to read in a few seconds.
STRIPES = 8


def spread(index: FileIndex, most: int = STRIPES) -> list[int]:
    """Numbers of at most `most` stripes of `index`, in ascending order, including the first and last."""
    last = len(index.stripes) - 1
    return np.unique(np.linspace(0, last, most).round().astype(int)).tolist()
