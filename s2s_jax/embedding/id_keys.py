"""Distinct keys of 64-bit ids (see `s2s_serve.encoding.id_keys`), and numbers made from their bits.

Growing tables use bits of an id's key to find its row and its device, and to make its initial vector.

Shapes: M places, U distinct ids, C new ids, D table width.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from s2s_jax.embedding.tables import NUM_SEGMENTS
from s2s_serve.encoding.id_keys import EMPTY as EMPTY
from s2s_serve.encoding.id_keys import ROUND_KEYS, scramble
from s2s_serve.encoding.id_keys import ids_of as ids_of
from s2s_serve.encoding.id_keys import keys_of as keys_of

_SEGMENT_SHIFT = np.uint32(32 - (NUM_SEGMENTS.bit_length() - 1))


class UniqueKeys(NamedTuple):
    """Distinct keys, ascending and therefore sorted by segment, with `EMPTY` at the end.

    Attributes:
      keys_U2: uint32.
      count_U: int32, number of given ids with each key.
      place_M: int32, index of each id's key in `keys_U2`.
    """

    keys_U2: jax.Array
    count_U: jax.Array
    place_M: jax.Array


def unique_keys(keys_M2: jax.Array, count_M: jax.Array | None = None) -> UniqueKeys:
    """Finds the distinct keys among M keys (so U = M).

    Args:
      keys_M2: uint32.
      count_M: int32, how often each key counts; None: once.
    """
    size = keys_M2.shape[0]
    number_M = jnp.arange(size, dtype=jnp.int32)
    first_M, second_M, from_M = jax.lax.sort(
        (keys_M2[:, 0], keys_M2[:, 1], number_M), num_keys=2, is_stable=False
    )
    changed_M = (first_M[1:] != first_M[:-1]) | (second_M[1:] != second_M[:-1])
    group_M = jnp.cumsum(jnp.append(False, changed_M).astype(jnp.int32))
    place_M = jnp.zeros(size, jnp.int32).at[from_M].set(group_M, unique_indices=True)
    # The first key of each group of equal keys.
    begins_U = jnp.full(size, size, jnp.int32).at[group_M].min(number_M, indices_are_sorted=True)
    there_U = begins_U < size
    keys_U2 = jnp.stack([first_M, second_M], axis=1).at[begins_U].get(mode="clip")
    keys_U2 = jnp.where(there_U[:, None], keys_U2, EMPTY)
    count_U = (
        jnp.zeros(size, jnp.int32)
        .at[place_M]
        .add(jnp.ones(size, jnp.int32) if count_M is None else count_M)
    )
    return UniqueKeys(keys_U2, count_U, place_M)


def segment_of(keys_U2: jax.Array) -> jax.Array:
    """int32 `[U]` segment of each key."""
    return (keys_U2[:, 0] >> _SEGMENT_SHIFT).astype(jnp.int32)


def other_bits(keys_U2: jax.Array) -> jax.Array:
    """uint32 `[U, 2]` bits of each key that are independent of its segment and buckets."""
    return scramble(keys_U2 ^ ROUND_KEYS[0])


def is_there(keys_U2: jax.Array) -> jax.Array:
    """bool `[U]`, whether a key is the key of an id."""
    return (keys_U2 != EMPTY).any(axis=-1)


def rank_among_equals(x_U: jax.Array) -> jax.Array:
    """int32 `[U]`: the number of equal values before each value.

    Examples:
      >>> rank_among_equals(jnp.array([7, 9, 7, 7])).tolist()
      [0, 0, 1, 2]
    """
    number_U = jnp.arange(x_U.size, dtype=jnp.int32)
    sorted_U, from_U = jax.lax.sort((x_U, number_U), num_keys=1, is_stable=True)
    begins_U = jnp.append(True, sorted_U[1:] != sorted_U[:-1])
    begin_U = jax.lax.cummax(jnp.where(begins_U, number_U, 0))
    return jnp.zeros_like(number_U).at[from_U].set(number_U - begin_U, unique_indices=True)


def initial_rows(seed: int, std: float, keys_C2: jax.Array, width: int) -> jax.Array:
    """f32 `[C, D]`: normal with `std`, truncated at two standard deviations; depends on seed and key."""
    column_D = np.arange(width, dtype=np.uint32) * ROUND_KEYS[0] + np.uint32(seed)
    bits_CD = scramble(keys_C2[:, 1:] ^ scramble(column_D)[None])
    bits_CD = scramble(keys_C2[:, :1] ^ bits_CD)
    # 24 bits, in the middle of their cells, so that neither 0 nor 1 occurs.
    uniform_CD = ((bits_CD >> np.uint32(8)).astype(jnp.float32) + 0.5) * 2**-24
    edge = math.erf(2**0.5)
    unit_CD = 2**0.5 * jax.lax.erf_inv((2 * uniform_CD - 1) * edge)
    return jnp.clip(unit_CD, -2, 2) * std
