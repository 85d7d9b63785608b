"""Builds the index of an export for approximate search, and measures its recall.

Shapes: I items, U users, E width.
"""

from pathlib import Path
from typing import Literal

import numpy as np

from s2s_serve import items as served
from s2s_serve import tensor_file
from s2s_serve.manifest import IndexEntry
from s2s_serve.search import index as indexes
from s2s_serve.search.index import Index
from s2s_serve.search.recall import recall, tune, users_like_items

NAME = "index/items.faiss"
_USERS = 256
_RECALL_AT = (10, 100)

Wanted = Literal["auto", "yes", "no"]


def is_wanted(wanted: Wanted, items: int) -> bool:
    """Return whether an index is built for this number of items."""
    return wanted == "yes" or (wanted == "auto" and items > indexes.FEW_ITEMS)


def write_index(path: Path, users_UE: np.ndarray, wanted: Wanted) -> IndexEntry | None:
    """Builds the index over `vectors.safetensors`, and measures how much it finds.

    Args:
      path: the directory of the version, with the vectors of the items.
      users_UE: f32, the vectors of some users; if there are few, vectors like those of items are used.
      wanted: auto drops an index that does not find enough of the best items with any effort.

    Returns:
      The entry in the manifest; None if the index was dropped.

    Raises:
      UserError: the index cannot be built or written.
    """
    vectors_IE = tensor_file.read(path / served.VECTORS)["vectors"]
    if len(users_UE) < _USERS // 4:
        users_UE = users_like_items(vectors_IE, _USERS)
    file = path / NAME
    file.parent.mkdir()
    indexes.build(vectors_IE, file)
    index = Index.open(file, *vectors_IE.shape)
    # A list of nearly all items is found with any effort.
    longest = max(min(_RECALL_AT[-1], len(vectors_IE) // 4), 1)
    tuned = tune(index, vectors_IE, users_UE, longest)
    if wanted == "auto" and not tuned.reached:
        del index
        file.unlink()
        file.parent.rmdir()
        return None
    recalls = {
        f"recall@{k}": recall(index, vectors_IE, users_UE, k, tuned.effort) for k in _RECALL_AT
    }
    return IndexEntry(file=NAME, library="faiss", effort=tuned.effort, recall=recalls)


def few_rows(total: int) -> int:
    """Return how many of `total` rows of a log are enough to measure the recall."""
    return min(total, 2 * _USERS)
