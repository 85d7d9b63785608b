"""Builds the index of an export for approximate search, and measures its recall."""

from pathlib import Path
from typing import Literal

from s2s_jax.errors import UserError
from s2s_serve.manifest import IndexEntry


def write_index(
    path: Path, items: int, width: int, wanted: Literal["auto", "yes", "no"]
) -> IndexEntry | None:
    """Builds the index, if it is wanted.

    Args:
      path: the directory of the version, with the vectors of the items.
      items: the number of items.
      width: the width of a vector.
      wanted: auto builds it if there are many items.
    """
    if wanted != "yes":
        return None
    raise UserError("--index: expected auto or no, because no index can be built yet, found yes")
