"""Scores blocks of queries against candidates: logits, outcomes and gradients.

`streamed_softmax` and `softmax_ring` use these functions.

Shapes: N queries, C candidates, A candidates of all devices, E width, K words of an item, G blocks of B
queries each.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

# Finite, so that a row without negatives never computes inf - inf.
MASKED = -1e30
# Above every masked logit and below all others.
NO_LOGIT = -1e29
# A backward rule returns this for an input without a gradient.
NO_GRADIENT: Any = None
# Bytes of a block's logits. Smaller blocks make the matrix products too small; larger ones make them no
# faster. On a GPU, products are so fast that adding to the gradients of all candidates, once per block,
# takes a larger part of the time.
_BLOCK_BYTES_CPU, _BLOCK_BYTES = 2**24, 2**26
# Every block adds to the gradients of all candidates, so a block should have at least this many queries.
_LEAST_ROWS = 128
# Sizes should be multiples of this on tensor cores. Otherwise XLA pads them, and it pads all candidates
# again in every block.
_ALIGNMENT_CPU, _ALIGNMENT = 1, 128


class Queries(NamedTuple):
    """Queries, each with its positive.

    Attributes:
      vectors_NE: the vectors of the queries, scaled so that dot products are similarities.
      positives_NE: the vectors of the positives, scaled in the same way.
      valid_N: bool, whether a query counts.
      bias_N: a number added to the positive's logit; it has no gradient.
      own_N: int32, the number of the positive among the candidates (in a ring: among those of all
        devices), so that it is not also used as a negative; None: positives are not among the
        candidates.
      item_NK: int32 items of the positives; a candidate with the same item is not a negative. None: all
        candidates but the positive are negatives.
    """

    vectors_NE: jax.Array
    positives_NE: jax.Array
    valid_N: jax.Array
    bias_N: jax.Array
    own_N: jax.Array | None
    item_NK: jax.Array | None


class Candidates(NamedTuple):
    """The candidates that queries are scored against.

    Attributes:
      vectors_CE: the vectors, scaled like the queries; in a ring, those of this device.
      bias_C: numbers added to logits, `MASKED` for a candidate that does not count; they have no
        gradient. In a ring, `[A]`, those of all devices in order.
      item_CK: int32 items; None if `Queries.item_NK` is None. In a ring, `[A, K]`.
    """

    vectors_CE: jax.Array
    bias_C: jax.Array
    item_CK: jax.Array | None


class Outcome(NamedTuple):
    """The outcome of queries over all their logits. A probability is exp(logit - shift) * weight.

    Attributes:
      loss: cross-entropy.
      hit: bool, whether the positive scores above all negatives.
      shift: the largest logit.
      weight: 1 / sum of exp(logit - shift).
      lack: probability of the positive in the targets, minus that of the model, for a loss without
        smoothing: 1 - probability.
      even: what each negative has in the targets, divided by `weight`; None without smoothing.

    All but `shift` and `even` are 0 for a query that does not count.
    """

    loss: jax.Array
    hit: jax.Array
    shift: jax.Array
    weight: jax.Array
    lack: jax.Array
    even: jax.Array | None


class Spread(NamedTuple):
    """What label smoothing needs to know about the negatives of queries.

    Attributes:
      count: f32, the number of negatives.
      total: the sum of their logits.
    """

    count: jax.Array
    total: jax.Array


def alignment() -> int:
    """Return the number whose multiples are the fastest sizes on the default backend."""
    return _ALIGNMENT_CPU if jax.default_backend() == "cpu" else _ALIGNMENT


def cut_queries(queries: Queries, candidates: int, temperature: jax.Array) -> Queries:
    """Divides queries by the temperature and cuts them into blocks `[G, B, …]`.

    Invalid queries pad the last block.
    """
    vectors_NE = queries.vectors_NE
    size = vectors_NE.shape[0]
    # Computed in the wide type, so that it is rounded to the vectors' type only once.
    scaled_NE = (vectors_NE.astype(temperature.dtype) / temperature).astype(vectors_NE.dtype)
    most = _BLOCK_BYTES_CPU if jax.default_backend() == "cpu" else _BLOCK_BYTES
    number = math.ceil(size * candidates * temperature.dtype.itemsize / most)
    rows = min(size, max(_LEAST_ROWS, math.ceil(size / number)))
    rows = math.ceil(rows / alignment()) * alignment()
    number = math.ceil(size / rows)

    def cut(x_N: jax.Array) -> jax.Array:
        widths = [(0, number * rows - size)] + [(0, 0)] * (x_N.ndim - 1)
        return jnp.pad(x_N, widths).reshape(number, rows, *x_N.shape[1:])

    return jax.tree.map(cut, queries._replace(vectors_NE=scaled_NE))


def join_blocks(x_GB: jax.Array, queries: Queries) -> jax.Array:
    """Undoes `cut_queries` for an array."""
    return x_GB.reshape(-1, *x_GB.shape[2:])[: queries.valid_N.size]


def logits_of(
    block: Queries, candidates: Candidates, first: jax.Array | int | None
) -> tuple[jax.Array, jax.Array]:
    """Return `[B, C]` products without biases, and logits, masked where a candidate is not a negative.

    Args:
      block: queries divided by temperature.
      candidates: some or all candidates.
      first: the number of the first of these candidates, as in `own_N`; None: no positive is among them.
    """
    raw_BC = product(block.vectors_NE, candidates.vectors_CE, (1, 1))
    logits_BC = raw_BC + candidates.bias_C[None]
    if block.item_NK is not None and candidates.item_CK is not None:
        # This also masks the positive.
        words = zip(block.item_NK.T, candidates.item_CK.T, strict=True)
        unlike_BC = functools.reduce(jnp.logical_or, [b[:, None] != c[None] for b, c in words])
        logits_BC = jnp.where(unlike_BC, logits_BC, MASKED)
    elif first is not None and block.own_N is not None:
        place_C = first + jnp.arange(raw_BC.shape[1], dtype=jnp.int32)
        logits_BC = jnp.where(block.own_N[:, None] != place_C[None], logits_BC, MASKED)
    return raw_BC, logits_BC


def score(
    block: Queries, candidates: Candidates, smoothing: float = 0.0
) -> tuple[Outcome, jax.Array]:
    """Return the outcome of queries against all candidates, and `[B, C]` shares, see `shares_of`.

    Args:
      block: queries divided by temperature.
      candidates: all candidates.
      smoothing: see `outcome_of`.
    """
    raw_BC, logits_BC = logits_of(block, candidates, 0)
    if block.own_N is None:
        both_BE = block.vectors_NE.astype(raw_BC.dtype) * block.positives_NE.astype(raw_BC.dtype)
        own_B = both_BE.sum(axis=-1)
    else:
        # From the same product as the negatives; otherwise rounding would break ties.
        own_B = pick(raw_BC, block.own_N)
    own_B += block.bias_N
    top_B = logits_BC.max(axis=-1)
    shift_B = jnp.maximum(top_B, own_B)
    shares_BC = jnp.exp(logits_BC - shift_B[:, None])
    spread = _spread_of(logits_BC) if smoothing > 0 else None
    rest_B = shares_BC.sum(axis=-1)
    outcome = outcome_of(own_B, top_B, shift_B, rest_B, block.valid_N, smoothing, spread)
    return outcome, _without_even(shares_BC, logits_BC, outcome)


def shares_of(logits_BC: jax.Array, outcome: Outcome) -> jax.Array:
    """Return `[B, C]`: exp(logit - shift), minus `outcome.even` for negatives.

    Multiplied by the weight, this is the gradient of the loss with respect to the logit.
    """
    return _without_even(jnp.exp(logits_BC - outcome.shift[:, None]), logits_BC, outcome)


def _without_even(shares_BC: jax.Array, logits_BC: jax.Array, outcome: Outcome) -> jax.Array:
    if outcome.even is None:
        return shares_BC
    return shares_BC - jnp.where(logits_BC > NO_LOGIT, outcome.even[:, None], 0)


def _spread_of(logits_BC: jax.Array) -> Spread:
    counts_BC = logits_BC > NO_LOGIT
    count_B = counts_BC.sum(axis=-1, dtype=logits_BC.dtype)
    return Spread(count_B, jnp.where(counts_BC, logits_BC, 0).sum(axis=-1))


def add_to_spread(spread: Spread | None, logits_BC: jax.Array) -> Spread | None:
    """Return the spread with the negatives of more candidates."""
    if spread is None:
        return None
    return jax.tree.map(jnp.add, spread, _spread_of(logits_BC))


def outcome_of(
    own: jax.Array,
    top: jax.Array,
    shift: jax.Array,
    rest: jax.Array,
    valid: jax.Array,
    smoothing: float,
    spread: Spread | None,
) -> Outcome:
    """Return the outcome of queries.

    Args:
      own: the positive's logit.
      top: the largest logit of the negatives.
      shift: the larger of the two.
      rest: the sum of exp(logit - shift) over the negatives.
      valid: whether a query counts.
      smoothing: the probability that targets spread evenly over the positive and the negatives.
      spread: what this needs; None if it is 0.
    """
    total = rest + jnp.exp(own - shift)
    # Where the positive leads, log1p(rest) keeps digits that log(1 + rest) would round away.
    loss = jnp.where(own >= top, jnp.log1p(rest), jnp.log(total) + shift - own)
    lack, even = rest / total, None
    if spread is not None:
        each = smoothing / (spread.count + 1)
        loss += each * (spread.count * own - spread.total)
        lack -= each * spread.count
        even = each * total
    return Outcome(
        loss=jnp.where(valid, loss, 0),
        hit=(own > top) & valid,
        shift=shift,
        weight=jnp.where(valid, 1 / total, 0),
        lack=jnp.where(valid, lack, 0),
        even=even,
    )


def negative_gradients(
    shares_BC: jax.Array, block: Queries, candidates: Candidates, outcome: Outcome
) -> tuple[jax.Array, jax.Array]:
    """Return gradients through the negatives: `[B, E]` of scaled queries, `[E, C]` of candidates.

    The weights multiply the vectors, not the shares, because vectors are smaller.
    """
    vectors_CE = candidates.vectors_CE
    weight_B1 = outcome.weight[:, None]
    shares_BC = shares_BC.astype(vectors_CE.dtype)
    d_BE = weight_B1 * product(shares_BC, vectors_CE, (1, 0))
    # On CPUs the product with candidates on the last axis is faster than its transpose.
    weighted_BE = (weight_B1 * block.vectors_NE).astype(vectors_CE.dtype)
    return d_BE, product(weighted_BE, shares_BC, (0, 0))


def query_gradients(
    vectors_NE: jax.Array,
    temperature: jax.Array,
    lack_N: jax.Array,
    d_NE: jax.Array,
    d_loss: jax.Array,
) -> tuple[Queries, jax.Array]:
    """Return gradients of vectors, positives and temperature.

    `d_NE` are the gradients of the vectors divided by the temperature, for a loss with gradient 1;
    `d_loss` is the gradient of the loss.
    """
    scaled_NE = vectors_NE.astype(d_NE.dtype) / temperature
    d_vectors_NE = (d_loss / temperature * d_NE).astype(vectors_NE.dtype)
    d_positives_NE = (-d_loss * lack_N[:, None] * scaled_NE).astype(vectors_NE.dtype)
    d_temperature = -d_loss / temperature * (d_NE * scaled_NE).sum()
    return Queries(d_vectors_NE, d_positives_NE, *[NO_GRADIENT] * 4), d_temperature


def sums_of(loss: jax.Array, hit: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the sum of the losses, and the number of hits."""
    return loss.sum(), hit.sum(dtype=jnp.float32)


def pick(x_BC: jax.Array, place_B: jax.Array) -> jax.Array:
    """Return `x_BC[b, place_B[b]]` for each b; places out of range are clipped."""
    return jnp.take_along_axis(x_BC, place_B[:, None], axis=1, mode="clip")[:, 0]


def product(a: jax.Array, b: jax.Array, contract: tuple[int, int]) -> jax.Array:
    """Return the matrix product over one dimension of each operand, accumulated in `sum_type`."""
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, preferred_element_type=sum_type(a))


def sum_type(x: jax.Array) -> jnp.dtype:
    """Return the type in which products of `x` are summed: float64 if `x` has it, else float32."""
    return jnp.promote_types(x.dtype, jnp.float32)
