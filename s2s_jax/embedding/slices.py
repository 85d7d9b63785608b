"""Sends rows between devices in slices of a fixed size, several arrays together.

Everything here runs inside `jax.shard_map` over one mesh axis of n devices; shapes are those of one
device. The rows that a device needs from an owner are consecutive, and each round sends the next slice
of them.

Shapes: n devices, C rows of a slice, U unique rows of a device, D width.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from s2s_jax.embedding.lookup import Arrays

# A round sends an eighth of what would be sent if every id of a batch had a different row, evenly
# spread. Fewer slices would send more padding, more slices would have more overhead.
_SLICES = 8
# Below this many bytes, a single round (with room for uneven lengths) is faster in spite of padding.
_FEW_BYTES = 2**20
_ROOM = 1.25


class Places(NamedTuple):
    """The next C places of each owner's rows.

    Attributes:
      place: int32 `[n, C]`, places among the unique rows of a device.
      valid: bool `[n, C]`, whether they belong to the owner.
      begin: int32 `[n]`, the first of these places.
      end: int32 `[n]`, the end of all places of the owner.
    """

    place: jax.Array
    valid: jax.Array
    begin: jax.Array
    end: jax.Array


def places_from(begin_n: jax.Array, end_n: jax.Array, size: int) -> Places:
    """The next `size` places of each owner from `begin_n` on; they are valid before `end_n`."""
    place_nC = begin_n[:, None] + jnp.arange(size, dtype=jnp.int32)[None]
    return Places(place_nC, place_nC < end_n[:, None], begin_n, end_n)


def take(values_UD: jax.Array, places: Places) -> jax.Array:
    """`[n, C, D]` values at the places; zeros at invalid places."""
    values_nCD = values_UD.at[places.place].get(mode="clip")
    return jnp.where(places.valid[..., None], values_nCD, 0)


def put(values_UD: jax.Array, places: Places, new_nCD: jax.Array) -> jax.Array:
    """The values with new ones at the valid places."""
    # Gives each invalid place its own index past the end.
    past_end = values_UD.shape[0] + jnp.arange(places.place.size).reshape(places.place.shape)
    index = jnp.where(places.valid, places.place, past_end)
    return values_UD.at[index].set(new_nCD, mode="drop", unique_indices=True)


def slice_rows(rows_U: jax.Array, values: jax.Array, devices: int) -> int:
    """C: number of rows sent to one owner in one round; `values` are rows of the table."""
    bytes_of_all = rows_U.size * values.shape[1] * values.dtype.itemsize
    slices = _SLICES if bytes_of_all >= _FEW_BYTES else 1 / _ROOM
    return math.ceil(rows_U.size / (slices * devices))


def rounds_left(
    begins: Mapping[str, jax.Array],
    ends: Mapping[str, jax.Array],
    slices: Mapping[str, int],
    axis: str,
) -> jax.Array:
    """Number of rounds for the device with the most rows for one owner; the same on all devices."""
    left = [-(-(end - begins[n]).max() // slices[n]) for n, end in ends.items()]
    return jax.lax.pmax(jnp.stack(left).max(), axis)


def by_width(arrays: Mapping[str, jax.Array]) -> list[list[str]]:
    """Names of the arrays that can be sent together."""
    groups: dict[tuple, list[str]] = {}
    for name, array in arrays.items():
        groups.setdefault((array.shape[-1], array.dtype), []).append(name)
    return list(groups.values())


def swap(x: jax.Array, axis: str) -> jax.Array:
    """Sends `x[p]` to device p and returns what each device sent to this one."""
    return jax.lax.all_to_all(x, axis, split_axis=0, concat_axis=0, tiled=True)


def swap_together(parts: Mapping[str, jax.Array], axis: str) -> Arrays:
    """The same as `swap`, for several arrays `[n, C, …]` of the same width at once."""
    joined = swap(jnp.concatenate(list(parts.values()), axis=1), axis)
    arrived, begin = {}, 0
    for name, part in parts.items():
        arrived[name] = joined[:, begin : begin + part.shape[1]]
        begin += part.shape[1]
    return arrived
