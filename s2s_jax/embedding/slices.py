"""How rows travel between devices: in slices of a fixed size, several arrays together.

Everything here runs inside `jax.shard_map` over one mesh axis of n devices; shapes are those of one
device. What a device needs of an owner lies together, and each round takes the next slice of it.

Shapes: n devices, C rows of a slice, U unique rows of a device, D width.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from s2s_jax.embedding.lookup import Arrays

# A round moves an eighth of what would be moved if every id of a batch had a row of its own, spread
# evenly: fewer slices would carry more padding, more would take longer to get going.
_SLICES = 8
# Bytes below which a single round (with room for uneven lengths) is quicker whatever padding it carries.
_FEW_BYTES = 2**20
_ROOM = 1.25


class Places(NamedTuple):
    """The next C places of what is for each owner.

    Attributes:
      place: int32 `[n, C]`, places among the unique rows of a device.
      valid: bool `[n, C]`, whether they are that owner's.
      begin: int32 `[n]`.
      end: int32 `[n]`, of all that is for the owner.
    """

    place: jax.Array
    valid: jax.Array
    begin: jax.Array
    end: jax.Array


def places_from(begin_n: jax.Array, end_n: jax.Array, size: int) -> Places:
    """The places from `begin_n` on, so many for each owner, valid before `end_n`."""
    place_nC = begin_n[:, None] + jnp.arange(size, dtype=jnp.int32)[None]
    return Places(place_nC, place_nC < end_n[:, None], begin_n, end_n)


def take(values_UD: jax.Array, places: Places) -> jax.Array:
    """`[n, C, D]` values of the places, zeros where there is none."""
    values_nCD = values_UD.at[places.place].get(mode="clip")
    return jnp.where(places.valid[..., None], values_nCD, 0)


def put(values_UD: jax.Array, places: Places, new_nCD: jax.Array) -> jax.Array:
    """The values with new ones at the valid places."""
    # Places that are not valid lie, each by itself, past the end.
    past_end = values_UD.shape[0] + jnp.arange(places.place.size).reshape(places.place.shape)
    index = jnp.where(places.valid, places.place, past_end)
    return values_UD.at[index].set(new_nCD, mode="drop", unique_indices=True)


def slice_rows(rows_U: jax.Array, values: jax.Array, devices: int) -> int:
    """C: rows that travel to one owner in one round; `values` are rows of the table."""
    bytes_of_all = rows_U.size * values.shape[1] * values.dtype.itemsize
    slices = _SLICES if bytes_of_all >= _FEW_BYTES else 1 / _ROOM
    return math.ceil(rows_U.size / (slices * devices))


def rounds_left(
    begins: Mapping[str, jax.Array],
    ends: Mapping[str, jax.Array],
    slices: Mapping[str, int],
    axis: str,
) -> jax.Array:
    """Rounds that the device with the most rows for one owner needs, the same on all devices."""
    left = [-(-(end - begins[n]).max() // slices[n]) for n, end in ends.items()]
    return jax.lax.pmax(jnp.stack(left).max(), axis)


def by_width(arrays: Mapping[str, jax.Array]) -> list[list[str]]:
    """Names of the arrays that can travel together."""
    groups: dict[tuple, list[str]] = {}
    for name, array in arrays.items():
        groups.setdefault((array.shape[-1], array.dtype), []).append(name)
    return list(groups.values())


def swap(x: jax.Array, axis: str) -> jax.Array:
    """Sends `x[p]` to device p and returns what each device sent to this one."""
    return jax.lax.all_to_all(x, axis, split_axis=0, concat_axis=0, tiled=True)


def swap_together(parts: Mapping[str, jax.Array], axis: str) -> Arrays:
    """The same for several arrays `[n, C, …]` of one width at once."""
    joined = swap(jnp.concatenate(list(parts.values()), axis=1), axis)
    arrived, begin = {}, 0
    for name, part in parts.items():
        arrived[name] = joined[:, begin : begin + part.shape[1]]
        begin += part.shape[1]
    return arrived
