"""The rows of growing tables, and sizes of such tables for tests."""

import numpy as np

from s2s_jax.embedding import id_keys
from s2s_jax.embedding.tables import NUM_SEGMENTS, SLOTS

ROWS = 16


SMALLEST = NUM_SEGMENTS * SLOTS


def rows_in_map(state, name, ids):
    """The rows of ids in a growing table, found by comparing all keys."""
    keys = np.asarray(state.maps[name].keys_R2)
    low, high = id_keys.ids_of(keys[:, 0], keys[:, 1])
    row_of = {(int(a), int(b)): r for r, (a, b) in enumerate(zip(low, high, strict=True))}
    return np.array([row_of[(int(i), 0)] for i in ids])
