"""Softmax over cosine similarities between predictions and the events of a batch.

Shapes: B batch, L positions, N = B (L - 1) pairs of a query and its positive, E model width, K ids
of a bag.
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
      item_N: int32, equal where the positives' items are equal; None: repeats count as negatives.
    """

    queries_NE: jax.Array
    positives_NE: jax.Array
    valid_N: jax.Array
    item_N: jax.Array | None


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
    item_N = None
    if config.mask_same_item:
        item_NK = item_BLK[:, positive].reshape(valid_N.size, -1)
        item_N = item_NK[:, 0] if item_NK.shape[1] == 1 else _number_bags(item_NK)
    return Pairs(cut(preds_ME, query), cut(targets_ME, positive), valid_N, item_N)


def softmax_loss(config: LossConfig, pairs: Pairs) -> LossSums:
    """Cross-entropy of each query's positive among all valid positives of the batch.

    Holds an `[N, N]` matrix of similarities.
    """
    logits_NN = _normalize(pairs.queries_NE) @ _normalize(pairs.positives_NE).T
    logits_NN = logits_NN / config.temperature
    own_NN = jnp.eye(pairs.valid_N.size, dtype=bool)
    negative_NN = pairs.valid_N[None, :] & ~own_NN
    if pairs.item_N is not None:
        negative_NN &= pairs.item_N[:, None] != pairs.item_N[None, :]
    logits_NN = jnp.where(negative_NN | own_NN, logits_NN, _MASKED)
    own_N = jnp.diagonal(logits_NN)
    loss_N = jax.nn.logsumexp(logits_NN, axis=-1) - own_N
    hit_N = own_N > jnp.where(own_NN, _MASKED, logits_NN).max(axis=-1)
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
