"""The tree of parameters: `{"dense": …, "tables": {name: [R, D]}, "unknown": {name: [D]}}`."""

from collections.abc import Mapping
from typing import NotRequired, TypeAlias, TypedDict

import jax

from s2s_jax.embedding.lookup import Arrays

# Nested dictionaries of arrays.
Tree: TypeAlias = "Mapping[str, jax.Array | Tree]"


class Params(TypedDict):
    """Parameters, or gradients of them. The keys are also names in checkpoints.

    Attributes:
      dense: parameters of the model.
      tables: f32 `[R, D]` of each table. In gradients: one row for each unique row that a device needed,
        `[n * U, D]` in total.
      unknown: f32 `[D]` of each table with a default row; missing if there are none.
    """

    dense: Tree
    tables: Arrays
    unknown: NotRequired[Arrays]


def default_rows(params: Params) -> Arrays:
    """f32 `[D]` of each table with a default row, or arrays that go with it."""
    return params["unknown"] if "unknown" in params else {}
