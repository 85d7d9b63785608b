"""Positions of events within their sequences, and rotary positions.

Shapes: B batch, L positions, N heads, H head width.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

ROPE_BASE = 10_000.0


class Rotation(NamedTuple):
    """Angles by which `rotate` turns the pairs of a head's features.

    Attributes:
      cos_BLH: f32 `[B, L, H/2]`, or `[1, L, H/2]` if all rows have the same positions.
      sin_BLH: f32, of the same shape.
    """

    cos_BLH: jax.Array
    sin_BLH: jax.Array


def sequence_positions(sequence_BL: jax.Array) -> jax.Array:
    """Return int32 `[B, L]`: the index of each position within its sequence.

    Examples:
      >>> sequence_positions(jnp.array([[4, 4, 4, 7, 7]])).tolist()
      [[0, 1, 2, 0, 1]]
    """
    index_1L = jnp.arange(sequence_BL.shape[1], dtype=jnp.int32)[None]
    begins_BL = jnp.diff(sequence_BL, axis=1, prepend=sequence_BL[:, :1]) != 0
    return index_1L - jax.lax.cummax(jnp.where(begins_BL, index_1L, 0), axis=1)


def rotation(position_BL: jax.Array, head_width: int) -> Rotation:
    """Return angles for rotary positions: position / 10000^(2i/H) for the i-th pair of features.

    The dot product of a rotated query and a rotated key then depends on their positions only through
    the distance between them (Su et al., "RoFormer", 2021).

    Args:
      position_BL: int32 `[B, L]`, or `[1, L]` for all rows.
      head_width: H; must be even.
    """
    pair_H = jnp.arange(head_width // 2, dtype=jnp.float32)
    speed_H = ROPE_BASE ** (-2 * pair_H / head_width)
    angle_BLH = position_BL[..., None] * speed_H[None, None]
    return Rotation(jnp.cos(angle_BLH), jnp.sin(angle_BLH))


def rotate(x_BLNH: jax.Array, rotation: Rotation) -> jax.Array:
    """Rotates the point (feature i, feature i + H/2) of each head by the i-th angle."""
    cos_BL1H, sin_BL1H = (part[:, :, None] for part in rotation)
    one, other = jnp.split(x_BLNH.astype(jnp.float32), 2, axis=-1)
    turned = (one * cos_BL1H - other * sin_BL1H, other * cos_BL1H + one * sin_BL1H)
    return jnp.concatenate(turned, axis=-1).astype(x_BLNH.dtype)
