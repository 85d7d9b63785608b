"""The loss over similarities between predictions and events.

Shapes: B batch, L positions, N = B (L - 1) pairs of a query and its positive, C candidates (the
positives of one device, or of all devices), E model width, K ids of a bag.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from s2s_jax.config import LossConfig
from s2s_jax.model.binary_loss import binary_sums
from s2s_jax.model.softmax_blocks import MASKED, Candidates, Queries, alignment, sum_type
from s2s_jax.model.streamed_softmax import softmax_sums

NORM_EPS = 1e-6
# Items with more ids (or words) than this are replaced by one number each before they are compared.
_MAX_COMPARED_WORDS = 2


class LossSums(NamedTuple):
    """Sums over the pairs of a batch; divide by `pairs` for means.

    Attributes:
      loss: f32 scalar, sum of the cross-entropies.
      hits: f32 scalar, number of pairs whose positive scores above all negatives; a tie is not a hit.
      pairs: f32 scalar, number of valid pairs.
    """

    loss: jax.Array
    hits: jax.Array
    pairs: jax.Array


class LossTotal(NamedTuple):
    """The sums over the pairs of all distances.

    Attributes:
      loss: f32 scalar, sum of the cross-entropies, each times the weight of its pair.
      weight: f32 scalar, sum of the weights.
      next: the sums over the pairs of neighbours.
    """

    loss: jax.Array
    weight: jax.Array
    next: LossSums

    @property
    def mean(self) -> jax.Array:
        """The weighted mean of the loss; 0 without pairs."""
        return self.loss / jnp.maximum(self.weight, 1)


def weighted(config: LossConfig, by_distance: Sequence[LossSums]) -> LossTotal:
    """Return the sums of all distances together.

    Args:
      config: the weight of later events.
      by_distance: the sums for the distances 1, 2, …
    """
    loss, weight = by_distance[0].loss, by_distance[0].pairs
    for number, sums in enumerate(by_distance[1:], 1):
        loss += config.later_weight**number * sums.loss
        weight += config.later_weight**number * sums.pairs
    return LossTotal(loss, weight, by_distance[0])


class Pairs(NamedTuple):
    """Queries and the events that they should predict.

    Attributes:
      queries_NE: f32.
      positives_NE: f32; the positives of all pairs are the candidates of every query.
      valid_N: bool; an invalid pair is not used as a query, positive or negative.
      item_NK: int32 ids of the positives' items; None: other events of the same item count as negatives.
      share_N: f32 share of all events that are about the positive's item; None if not needed.
    """

    queries_NE: jax.Array
    positives_NE: jax.Array
    valid_N: jax.Array
    item_NK: jax.Array | None
    share_N: jax.Array | None = None


class Events(NamedTuple):
    """Facts about the events of a batch that the loss needs, apart from their vectors.

    Attributes:
      length_B: int32, number of real positions of each row.
      item_BLK: int32 ids (or the words of ids) of the item feature.
      present_BL: bool, whether a position has an item. A position without one is never a positive or a
        negative.
      sequence_BL: int32, the number of the sequence that a position belongs to; None: each row is one
        sequence.
      share_BL: f32 share of all events that are about the position's item; None if not needed.
    """

    length_B: jax.Array
    item_BLK: jax.Array
    present_BL: jax.Array
    sequence_BL: jax.Array | None = None
    share_BL: jax.Array | None = None


def pair_up(
    config: LossConfig,
    preds_ME: jax.Array,
    targets_ME: jax.Array,
    events: Events,
    distance: int = 1,
) -> Pairs:
    """Pairs each position's prediction with the event that it is scored against.

    Args:
      config: the pairing and the masks.
      preds_ME: f32 `[B*L, E]`.
      targets_ME: f32 `[B*L, E]`.
      events: the events at these positions.
      distance: from a position to the event that it is scored against; N is then `B (L - distance)`.
    """
    length_B, item_BLK, present_BL, sequence_BL, share_BL = events
    batch, seq_len, _ = item_BLK.shape
    earlier, later = slice(None, -distance), slice(distance, None)
    query, positive = (earlier, later) if config.pairing == "next" else (later, earlier)

    def cut(x_ME: jax.Array, positions: slice) -> jax.Array:
        x_BLE = x_ME.reshape(batch, seq_len, -1)
        return x_BLE[:, positions].reshape(batch * (seq_len - distance), -1)

    real_BL = jnp.arange(seq_len)[None] < length_B[:, None]
    valid_BL = real_BL[:, query] & real_BL[:, positive] & present_BL[:, positive]
    if not config.mask_padding:
        valid_BL = jnp.ones_like(valid_BL)
    if sequence_BL is not None:
        valid_BL &= sequence_BL[:, query] == sequence_BL[:, positive]
    valid_N = valid_BL.reshape(-1)
    item_NK = item_BLK[:, positive].reshape(valid_N.size, -1) if config.mask_same_item else None
    share_N = None if share_BL is None else share_BL[:, positive].reshape(-1)
    return Pairs(cut(preds_ME, query), cut(targets_ME, positive), valid_N, item_NK, share_N)


class Sampled(NamedTuple):
    """Sampled candidates, which are used as negatives only.

    Attributes:
      vectors_CE: f32; need not be normalized.
      item_CK: int32 items; None if the pairs have none.
      log_q_C: f32 logarithms of the probabilities (or expected counts) with which the candidates were
        drawn, infinite for entries that are not candidates; None: no correction.
    """

    vectors_CE: jax.Array
    item_CK: jax.Array | None
    log_q_C: jax.Array | None


def softmax_loss(
    config: LossConfig,
    pairs: Pairs,
    axis: str | None = None,
    sampled: Sampled | None = None,
    log_q_N: jax.Array | None = None,
    dtype: jnp.dtype | None = None,
) -> LossSums:
    """Return the cross-entropy of each query's positive among itself and the query's negatives.

    Negatives are other pairs' positives, sampled candidates or both, depending on `config.negatives`.
    The correction subtracts log q from the logit of a candidate drawn with probability q, and from the
    positive's logit too (Jean et al., "On using very large target vocabulary for neural machine
    translation", 2015; Yi et al., "Sampling-bias-corrected neural modeling for large corpus item
    recommendations", 2019).

    With `config.label_smoothing`, the targets of the cross-entropy spread a part of the probability
    evenly over the positive and the query's negatives (Szegedy et al., "Rethinking the Inception
    architecture for computer vision", 2016).

    Args:
      config: the temperature, the kind of negatives and the smoothing of targets.
      pairs: the pairs of this device.
      axis: inside `jax.shard_map`, the mesh axis whose devices share their positives as candidates;
        None: only this device's positives are candidates. Sampled candidates are never shared.
      sampled: sampled candidates; must be None if and only if all negatives are in-batch.
      log_q_N: log q of the positives, without gradient; None: no correction.
      dtype: type of the vectors that are multiplied; products are summed in float32 or wider. None: the
        type of the pairs' vectors.

    Returns:
      Sums over this device's pairs.
    """
    operands = _operands(config, pairs, axis, sampled, log_q_N, dtype)
    queries, candidates, local, axis = operands
    smoothing = config.label_smoothing
    loss, hits = softmax_sums(queries, candidates, config.temperature, axis, local, smoothing)
    return LossSums(loss=loss, hits=hits, pairs=pairs.valid_N.sum(dtype=jnp.float32))


def binary_loss(
    config: LossConfig,
    pairs: Pairs,
    sampled: Sampled,
    weight: jax.Array,
    dtype: jnp.dtype | None = None,
) -> LossSums:
    """Return the calibrated binary cross-entropy of each query's positive and negatives (gBCE).

    Args:
      config: the temperature; negatives must be uniform or full.
      pairs: the pairs of this device.
      sampled: the negatives of all queries.
      weight: see `binary_loss.positive_weight`.
      dtype: see `softmax_loss`.

    Returns:
      Sums over this device's pairs.
    """
    assert config.negatives in ("uniform", "full"), "positives of other pairs are no candidates"
    queries, candidates, _, _ = _operands(config, pairs, None, sampled, None, dtype)
    loss, hits = binary_sums(queries, candidates, config.temperature, weight)
    return LossSums(loss=loss, hits=hits, pairs=pairs.valid_N.sum(dtype=jnp.float32))


class _Operands(NamedTuple):
    """The arguments of `softmax_sums`."""

    queries: Queries
    candidates: Candidates
    local: Candidates | None
    axis: str | None


def _operands(
    config: LossConfig,
    pairs: Pairs,
    axis: str | None,
    sampled: Sampled | None,
    log_q_N: jax.Array | None,
    dtype: jnp.dtype | None,
) -> _Operands:
    """Return the vectors that are compared, see `softmax_loss`."""
    _check_sampled(config, sampled)
    pairs, log_q_N = _padded((pairs, log_q_N))  # The added pairs are invalid.
    dtype = pairs.queries_NE.dtype if dtype is None else dtype
    vectors_NE = comparable(config, pairs.queries_NE).astype(dtype)
    positives_NE = comparable(config, pairs.positives_NE).astype(dtype)
    size, first = pairs.valid_N.size, 0
    no_bias_N = jnp.zeros_like(vectors_NE[:, 0], sum_type(vectors_NE))
    bias_N = no_bias_N if log_q_N is None else -log_q_N
    bias_A, item_AK = jnp.where(pairs.valid_N, bias_N, MASKED), pairs.item_NK
    if config.negatives not in ("in_batch", "mixed"):
        axis = None
    if axis is not None:
        # Only vectors are sent round the ring. Biases and items are small, so every device gets all of
        # them, and all devices number the items alike.
        bias_A, item_AK = jax.tree.map(
            lambda x: jax.lax.all_gather(x, axis, tiled=True), (bias_A, item_AK)
        )
        first = jax.lax.axis_index(axis) * size
    item_NK, item_AK, item_SK = _item_words(item_AK, sampled, first, size)
    own_N = first + jnp.arange(size, dtype=jnp.int32)
    queries = Queries(vectors_NE, positives_NE, pairs.valid_N, bias_N, own_N, item_NK)
    candidates, local = Candidates(positives_NE, bias_A, item_AK), None
    if sampled is not None:
        local = _sampled_candidates(config, sampled, item_SK, dtype)
        if config.negatives != "mixed":
            queries, candidates, local = queries._replace(own_N=None), local, None
    return _Operands(queries, candidates, local, axis)


def _check_sampled(config: LossConfig, sampled: Sampled | None) -> None:
    """Refuses sampled candidates that `config` does not use, and their absence if it needs them."""
    if (sampled is None) != (config.negatives == "in_batch"):
        found = "no" if sampled is None else "some"
        raise ValueError(
            f"negatives are {config.negatives!r}, but there are {found} sampled candidates"
        )


def _sampled_candidates(
    config: LossConfig, sampled: Sampled, item_SK: jax.Array | None, dtype: jnp.dtype
) -> Candidates:
    """Return sampled candidates with the items `item_SK`, padded with candidates that do not count."""
    vectors_CE = comparable(config, sampled.vectors_CE).astype(dtype)
    bias_C = jnp.zeros_like(vectors_CE[:, 0], sum_type(vectors_CE))
    if sampled.log_q_C is not None:
        bias_C = jnp.maximum(-sampled.log_q_C, MASKED)
    padded = _padded(Candidates(vectors_CE, bias_C, item_SK))
    real_C = jnp.arange(padded.bias_C.size) < bias_C.size
    return padded._replace(bias_C=jnp.where(real_C, padded.bias_C, MASKED))


def _item_words(
    item_AK: jax.Array | None, sampled: Sampled | None, first: jax.Array | int, size: int
) -> tuple[jax.Array | None, jax.Array | None, jax.Array | None]:
    """Return items as few int32 words, for comparing them.

    Returns:
      The items of the pairs `[first, first + size)`, of all A pairs, and of the sampled candidates.
    """
    if item_AK is None:
        return None, None, None
    item_SK = None if sampled is None else sampled.item_CK
    if sampled is not None and item_SK is None:
        raise ValueError("sampled candidates need items where the pairs have them")
    if item_AK.shape[1] > _MAX_COMPARED_WORDS:
        others_SK = item_AK[:0] if item_SK is None else item_SK
        number_N1 = _number_bags(jnp.concatenate([item_AK, others_SK]))[:, None]
        item_AK, item_SK = number_N1[: len(item_AK)], number_N1[len(item_AK) :]
    return jax.lax.dynamic_slice_in_dim(item_AK, first, size), item_AK, item_SK


def _padded(arrays: Any) -> Any:
    """Return the arrays, padded with zeros at the end to a size that the device multiplies well."""

    def pad(x: jax.Array) -> jax.Array:
        return jnp.pad(x, [(0, -len(x) % alignment())] + [(0, 0)] * (x.ndim - 1))

    return jax.tree.map(pad, arrays)


def comparable(config: LossConfig, x_NE: jax.Array) -> jax.Array:
    """Return vectors whose dot products are the similarity that `config` chooses."""
    return normalize(x_NE) if config.similarity == "cosine" else x_NE


def normalize(x_NE: jax.Array) -> jax.Array:
    """Return x / max(|x|, eps); its gradient is finite at 0."""
    square_N1 = jnp.sum(x_NE * x_NE, axis=-1, keepdims=True)
    return x_NE * jax.lax.rsqrt(jnp.maximum(square_N1, NORM_EPS**2))


def _number_bags(item_NK: jax.Array) -> jax.Array:
    """Return int32 `[N]` numbers, equal only for bags with the same ids in the same order."""
    _, number_N = jnp.unique(item_NK, axis=0, size=item_NK.shape[0], return_inverse=True)
    return number_N.reshape(-1)
