"""From bucket ids to embeddings, by way of the unique rows of a batch, and back for gradients.

Shapes: M places for ids (all features of a table, all positions, all bags), U = M the static number of
unique rows, R rows and D width of a table, K ids of a bag.

The model is differentiated with respect to the gathered unique rows, so the gradient of a table is
`[U, D]` and a table-sized gradient never exists.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from s2s_jax.embedding.tables import TableSpec, rows_of_buckets

# Arrays by the name of a table or a feature.
Arrays = dict[str, jax.Array]


class UniqueRows(NamedTuple):
    """The distinct rows of one table that a batch uses.

    Attributes:
      rows_U: int32, ascending and without repeats. Unused places continue with R, R + 1, …, which are
        outside the table.
      places: for each feature of the table, int32 with the shape of its ids: indices of its rows in
        `rows_U`.
    """

    rows_U: jax.Array
    places: dict[str, jax.Array]


def deduplicate(spec: TableSpec, ids: Mapping[str, jax.Array]) -> UniqueRows:
    """Finds the unique rows that the features of a table need.

    Args:
      spec: the table.
      ids: int32 buckets of (at least) its features, of any shapes; negative for no id.
    """
    asked_M = jnp.concatenate([ids[name].reshape(-1) for name in spec.features])
    rows_U, place_M = jnp.unique(
        rows_of_buckets(spec, asked_M),
        size=asked_M.size,
        fill_value=spec.rows,
        return_inverse=True,
    )
    # All rows stay distinct, so reading and writing need not handle repeats.
    past_end_U = spec.rows + jnp.arange(rows_U.size, dtype=rows_U.dtype)
    rows_U = jnp.where(rows_U < spec.rows, rows_U, past_end_U)
    places, begin = {}, 0
    for name in spec.features:
        size = ids[name].size
        places[name] = place_M[begin : begin + size].reshape(ids[name].shape)
        begin += size
    return UniqueRows(rows_U, places)


def read_rows(table_RD: jax.Array, rows_U: jax.Array) -> jax.Array:
    """The rows `rows_U` of a table (or of its optimizer state), `[U, D]`; zeros outside the table."""
    return table_RD.at[rows_U].get(
        mode="fill", fill_value=0, unique_indices=True, indices_are_sorted=True
    )


def write_rows(table_RD: jax.Array, rows_U: jax.Array, new_UD: jax.Array) -> jax.Array:
    """Replaces the rows `rows_U` by `new_UD`, ignoring rows outside the table."""
    return table_RD.at[rows_U].set(
        new_UD, mode="drop", unique_indices=True, indices_are_sorted=True
    )


def combine(rows_UD: jax.Array, places: jax.Array, present: jax.Array, combiner: str) -> jax.Array:
    """Embeddings of bags of ids.

    Args:
      rows_UD: the unique rows.
      places: int32 `[..., K]`, see `UniqueRows`.
      present: bool `[..., K]`, whether there is an id.
      combiner: "mean" or "sum" over the ids of a bag.

    Returns:
      `[..., D]`; zeros for an empty bag.
    """
    weight = present.astype(rows_UD.dtype)
    if combiner == "mean":
        weight = weight / jnp.maximum(weight.sum(axis=-1, keepdims=True), 1)
    else:
        assert combiner == "sum", combiner
    if places.shape[-1] == 1:
        return rows_UD[places[..., 0]] * weight
    return jnp.einsum("...kd,...k->...d", rows_UD[places], weight)
