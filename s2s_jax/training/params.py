"""The tree of what is learned: `{"dense": …, "tables": {name: [R, D]}, "unknown": {name: [D]}}`."""

from collections.abc import Mapping
from typing import NotRequired, TypeAlias, TypedDict

import jax

from s2s_jax.embedding.lookup import Arrays

# Arrays in dictionaries in dictionaries.
Tree: TypeAlias = "Mapping[str, jax.Array | Tree]"


class Params(TypedDict):
    """Parameters, or gradients of them. The keys are names in checkpoints.

    Attributes:
      dense: of the model.
      tables: f32 `[R, D]` of each table. Of gradients: a row for each of the unique rows that a device
        needed, `[n * U, D]` in all.
      unknown: f32 `[D]` of each table with a default row; left out where there is none.
    """

    dense: Tree
    tables: Arrays
    unknown: NotRequired[Arrays]


def default_rows(params: Params) -> Arrays:
    """f32 `[D]` of each table that has a default row, or what is beside it."""
    return params["unknown"] if "unknown" in params else {}
