"""Softmax over cosine similarities between predictions and the events of a batch.

Shapes: B batch, L positions, N = B (L - 1) pairs of a query and its positive, C candidates (the
positives of the pairs of one device, or of all), E model width, K ids of a bag.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from s2s_jax.config import LossConfig

_NORM_EPS = 1e-6
# Finite, so that a row that masks everything but its positive has no inf - inf anywhere.
_MASKED = -1e30


class LossSums(NamedTuple):
    """Sums over the pairs of a batch: divide by `pairs` for means.

    Attributes:
      loss: f32 scalar, sum of the cross-entropies.
      hits: f32 scalar, pairs whose positive beats all negatives; a tie is no hit.
      pairs: f32 scalar, pairs that count.
    """

    loss: jax.Array
    hits: jax.Array
    pairs: jax.Array


class Pairs(NamedTuple):
    """Queries and the events they are to predict, pair by pair.

    Attributes:
      queries_NE: f32.
      positives_NE: f32; the positives of all pairs are the candidates of each.
      valid_N: bool; a pair that is not valid is no query, positive or negative.
      item_NK: int32 ids of the positives' items; None: repeats of an item count as negatives.
    """

    queries_NE: jax.Array
    positives_NE: jax.Array
    valid_N: jax.Array
    item_NK: jax.Array | None


def pair_up(
    config: LossConfig,
    preds_ME: jax.Array,
    targets_ME: jax.Array,
    length_B: jax.Array,
    item_BLK: jax.Array,
) -> Pairs:
    """Pairs each position's prediction with the event that it is scored against.

    Args:
      config: pairing and masks.
      preds_ME: f32 `[B*L, E]`.
      targets_ME: f32 `[B*L, E]`.
      length_B: int32, real positions of each sequence.
      item_BLK: int32 ids of `config.item_feature`, negative where there is none. A position without
        an item is nobody's positive and no negative.
    """
    batch, seq_len, _ = item_BLK.shape
    earlier, later = slice(None, -1), slice(1, None)
    query, positive = (earlier, later) if config.pairing == "next" else (later, earlier)

    def cut(x_ME: jax.Array, positions: slice) -> jax.Array:
        x_BLE = x_ME.reshape(batch, seq_len, -1)
        return x_BLE[:, positions].reshape(batch * (seq_len - 1), -1)

    real_BL = jnp.arange(seq_len) < length_B[:, None]
    valid_BL = real_BL[:, query] & real_BL[:, positive] & (item_BLK[:, positive, 0] >= 0)
    valid_N = valid_BL.reshape(-1) if config.mask_padding else jnp.ones(valid_BL.size, bool)
    item_NK = item_BLK[:, positive].reshape(valid_N.size, -1) if config.mask_same_item else None
    return Pairs(cut(preds_ME, query), cut(targets_ME, positive), valid_N, item_NK)


def softmax_loss(config: LossConfig, pairs: Pairs, axis: str | None = None) -> LossSums:
    """Cross-entropy of each query's positive among all valid positives.

    Holds an `[N, C]` matrix of similarities.

    Args:
      config: temperature.
      pairs: of this device.
      axis: inside `jax.shard_map`, the mesh axis over which all devices' positives are candidates; None:
        this device's own are.

    Returns:
      Sums over this device's pairs.
    """
    queries_NE = _normalize(pairs.queries_NE)
    candidates_CE = _normalize(pairs.positives_NE)
    valid_C, item_CK, first = pairs.valid_N, pairs.item_NK, 0
    if axis is not None:
        candidates_CE = jax.lax.all_gather(candidates_CE, axis, tiled=True)
        valid_C = jax.lax.all_gather(valid_C, axis, tiled=True)
        if item_CK is not None:
            item_CK = jax.lax.all_gather(item_CK, axis, tiled=True)
        first = jax.lax.axis_index(axis) * pairs.valid_N.size
    own_N = first + jnp.arange(pairs.valid_N.size)
    own_NC = own_N[:, None] == jnp.arange(valid_C.size)
    negative_NC = valid_C & ~own_NC
    if item_CK is not None:
        item_C = item_CK[:, 0] if item_CK.shape[1] == 1 else _number_bags(item_CK)
        negative_NC &= item_C[own_N][:, None] != item_C
    logits_NC = queries_NE @ candidates_CE.T / config.temperature
    logits_NC = jnp.where(negative_NC | own_NC, logits_NC, _MASKED)
    positive_N = jnp.where(own_NC, logits_NC, 0).sum(axis=-1)
    loss_N = jax.nn.logsumexp(logits_NC, axis=-1) - positive_N
    hit_N = positive_N > jnp.where(own_NC, _MASKED, logits_NC).max(axis=-1)
    return LossSums(
        loss=jnp.where(pairs.valid_N, loss_N, 0).sum(),
        hits=(hit_N & pairs.valid_N).sum(dtype=jnp.float32),
        pairs=pairs.valid_N.sum(dtype=jnp.float32),
    )


def _normalize(x_NE: jax.Array) -> jax.Array:
    """x / max(|x|, eps), with a finite gradient at 0."""
    square_N1 = jnp.sum(x_NE * x_NE, axis=-1, keepdims=True)
    return x_NE * jax.lax.rsqrt(jnp.maximum(square_N1, _NORM_EPS**2))


def _number_bags(item_NK: jax.Array) -> jax.Array:
    """int32 `[N]`, equal for bags with the same ids in the same order."""
    _, number_N = jnp.unique(item_NK, axis=0, size=item_NK.shape[0], return_inverse=True)
    return number_N.reshape(-1)
