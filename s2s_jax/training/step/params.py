"""The tree of parameters: `{"dense": …, "tables": {name: [R, D]}, "unknown": {name: [D]}}`."""

from collections.abc import Mapping
from typing import NotRequired, TypeAlias, TypedDict

import jax

from s2s_jax.embedding.lookup import Arrays

# Nested dictionaries of arrays.
Tree: TypeAlias = "Mapping[str, jax.Array | Tree]"


class Params(TypedDict):
    """The parameters, or their gradients. Checkpoints use the same keys.

    Attributes:
      dense: the parameters of the dense part.
      tables: f32 `[R, D]` for each table. Gradients have one row for each unique row that a device used,
        `[n * U, D]` in total.
      unknown: f32 `[D]` for each table with a default row: this row. Missing if there are none.
    """

    dense: Tree
    tables: Arrays
    unknown: NotRequired[Arrays]


def default_rows(params: Params) -> Arrays:
    """Return f32 `[D]` for each table with a default row; empty if there are none."""
    return params["unknown"] if "unknown" in params else {}
