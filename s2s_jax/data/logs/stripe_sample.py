"""Some stripes, evenly spread over a log, that stand for all of it."""

import numpy as np

from s2s_jax.data.logs.index import FileIndex

# Enough for means, few enough that looking at them takes no more than some seconds.
STRIPES = 8


def spread(index: FileIndex, most: int = STRIPES) -> list[int]:
    """Numbers of at most `most` stripes of `index`, rising, the first and the last among them."""
    last = len(index.stripes) - 1
    return np.unique(np.linspace(0, last, most).round().astype(int)).tolist()
