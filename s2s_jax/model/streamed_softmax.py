"""Softmax cross-entropy over many candidates that never holds the matrix of all logits.

Queries are worked off in blocks. Where a device has all candidates, a block's gradients are formed while
its logits are at hand, since the loss is a sum: three matrix products a block, and nothing is computed
twice. Where every device has its part of the candidates, these go round all devices; logarithms of sums
are kept up as they pass (Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018), and
differentiating sends them round again, together with their gradients, as ring attention does (Liu et
al., "Ring attention with blockwise transformers for near-infinite context", 2023).

Shapes: N queries, C candidates, A candidates of all devices, E width, K words of an item, G blocks of B
queries each.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

# Finite, so that a row without negatives has no inf - inf anywhere.
MASKED = -1e30
# Above every masked logit and below all others: the maximum of no logits yet.
_NOTHING = -1e29
# Bytes of a block's logits: fewer make small matrix products, more do not make them quicker.
_BLOCK_BYTES = 2**24
# Every block adds to the gradients of all candidates, which is worth it for this many queries only.
_LEAST_ROWS = 128
# How a backward rule says that there is none.
_NO_GRADIENT: Any = None


class Queries(NamedTuple):
    """Queries, each with its positive.

    Attributes:
      vectors_NE: unit vectors.
      positives_NE: unit vectors.
      valid_N: bool, whether a query counts.
      bias_N: added to the positive's logit; has no gradient.
      own_N: int32, which candidate is the positive (in a ring: which of all devices' candidates), so
        that it is not a negative as well; None: the positives are not among the candidates.
      item_NK: int32 items of the positives; a candidate with the same item is no negative. None: only
        the positive itself is none.
    """

    vectors_NE: jax.Array
    positives_NE: jax.Array
    valid_N: jax.Array
    bias_N: jax.Array
    own_N: jax.Array | None
    item_NK: jax.Array | None


class Candidates(NamedTuple):
    """What queries are scored against.

    Attributes:
      vectors_CE: unit vectors; in a ring, those of this device.
      bias_C: added to logits, `MASKED` for a candidate that does not count; has no gradient. In a ring,
        `[A]` of all devices in their order.
      item_CK: int32, None if the queries' is. In a ring, `[A, K]`.
    """

    vectors_CE: jax.Array
    bias_C: jax.Array
    item_CK: jax.Array | None


class _Online(NamedTuple):
    """What is known of queries that have met some of the candidates.

    Attributes:
      own: the positive's logit.
      top: the largest of the negatives' logits.
      rest: the sum of exp(logit - top) over the negatives.
    """

    own: jax.Array
    top: jax.Array
    rest: jax.Array


class _Outcome(NamedTuple):
    """What queries make of all their logits; probabilities are exp(logit - shift) weight.

    Attributes:
      loss: cross-entropy.
      hit: bool, whether the positive beats all negatives.
      shift: the largest logit.
      weight: one over the sum of exp(logit - shift).
      lack: 1 - probability of the positive.

    All but `shift` are 0 for a query that does not count.
    """

    loss: jax.Array
    hit: jax.Array
    shift: jax.Array
    weight: jax.Array
    lack: jax.Array


def softmax_sums(
    queries: Queries,
    candidates: Candidates,
    temperature: float | jax.Array,
    axis: str | None = None,
    local: Candidates | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy of each query's positive among itself and the candidates that are negatives.

    Logits are dot products over temperature, plus biases. Products are of the vectors' type and added up
    in float32, or float64 if that is theirs. Gradients go to all vectors and the temperature. Of a
    positive that is among the candidates, a part goes to `positives_NE` (as the positive) and a part to
    `vectors_CE` (as others' negative).

    Args:
      queries: of this device.
      candidates: of this device.
      temperature: number or scalar.
      axis: inside `jax.shard_map`, the mesh axis round which candidates go; None: they stay.
      local: further candidates of this device, none of them a positive, that stay where they are.

    Returns:
      Sums over the queries that count: the loss, and how many positives beat all negatives.
    """
    vectors_NE = queries.vectors_NE
    temperature = jnp.asarray(temperature, _sum_type(vectors_NE))
    # shard_map wants to know that all differ between devices if the queries do.
    one = jnp.ones_like(vectors_NE, shape=(), dtype=jnp.int32)
    candidates, local, temperature = jax.tree.map(
        lambda x: x * one.astype(x.dtype), (candidates, local, temperature)
    )
    if axis is not None and jax.lax.axis_size(axis) > 1:
        return _ring_sums(axis, queries, candidates, local, temperature)
    if local is not None:
        candidates = jax.tree.map(lambda *x: jnp.concatenate(x), candidates, local)
    return _row_sums(queries, candidates, temperature)


@jax.custom_vjp
def _row_sums(
    queries: Queries, candidates: Candidates, temperature: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The sums, block by block, where a device has all candidates."""

    def one_block(_: None, block: Queries) -> tuple[None, tuple]:
        outcome, _shares_BC = _score(block, candidates)
        return None, (outcome.loss, outcome.hit)

    blocks = _cut(queries, candidates.vectors_CE.shape[0], temperature)
    _, (loss_GB, hit_GB) = jax.lax.scan(one_block, None, blocks)
    return _sums(loss_GB, hit_GB)


def _row_forward(queries: Queries, candidates: Candidates, temperature: jax.Array) -> tuple:
    """The sums together with their gradients."""

    def one_block(d_EC: jax.Array, block: Queries) -> tuple[jax.Array, tuple]:
        outcome, shares_BC = _score(block, candidates)
        d_BE, d_block_EC = _pull(shares_BC, block, candidates, outcome)
        d_BE -= outcome.lack[:, None] * block.positives_NE
        return d_EC + d_block_EC, (outcome.loss, outcome.hit, outcome.lack, d_BE)

    blocks = _cut(queries, candidates.vectors_CE.shape[0], temperature)
    none_EC = jnp.zeros_like(candidates.vectors_CE.T, dtype=temperature.dtype)
    d_EC, (loss_GB, hit_GB, *of_queries) = jax.lax.scan(one_block, none_EC, blocks)
    lack_N, d_NE = (_join(x, queries) for x in of_queries)
    residuals = (queries.vectors_NE, temperature, lack_N, d_NE, d_EC)
    return _sums(loss_GB, hit_GB), residuals


def _row_backward(residuals: tuple, cotangents: tuple) -> tuple:
    vectors_NE, temperature, lack_N, d_NE, d_EC = residuals
    by = cotangents[0]
    d_queries, d_temperature = _query_gradients(vectors_NE, temperature, lack_N, d_NE, by)
    d_candidates = Candidates((by * d_EC.T).astype(vectors_NE.dtype), _NO_GRADIENT, _NO_GRADIENT)
    return d_queries, d_candidates, d_temperature


_row_sums.defvjp(_row_forward, _row_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ring_sums(
    axis: str,
    queries: Queries,
    candidates: Candidates,
    local: Candidates | None,
    temperature: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """The sums where every device has its part of the candidates."""
    return _ring_forward(axis, queries, candidates, local, temperature)[0]


def _ring_forward(
    axis: str,
    queries: Queries,
    candidates: Candidates,
    local: Candidates | None,
    temperature: jax.Array,
) -> tuple:
    size = jax.lax.axis_size(axis)
    blocks = _cut(queries, _most(candidates, local), temperature)

    def one_step(carry: tuple, step: jax.Array) -> tuple[tuple, None]:
        vectors_CE, online = carry
        # Sent on before they are used, so that sending need not wait for the products.
        coming_CE = _pass_on(vectors_CE, axis)
        return (
            coming_CE,
            _meet(online, blocks, *_of_step(candidates, vectors_CE, step, axis)),
        ), None

    own_GB = jnp.zeros_like(blocks.bias_N)
    online = _Online(own_GB, jnp.full_like(own_GB, _NOTHING), own_GB)
    steps = jnp.arange(size - 1)
    (last_CE, online), _ = jax.lax.scan(one_step, (candidates.vectors_CE, online), steps)
    online = _meet(online, blocks, *_of_step(candidates, last_CE, size - 1, axis))
    if local is not None:
        online = _meet(online, blocks, local, None)
    shift_GB = jnp.maximum(online.top, online.own)
    rest_GB = online.rest * jnp.exp(online.top - shift_GB)
    outcome = _outcome(online.own, online.top, shift_GB, rest_GB, blocks.valid_N)
    residuals = (queries, candidates, local, temperature, outcome)
    return _sums(outcome.loss, outcome.hit), residuals


def _ring_backward(axis: str, residuals: tuple, cotangents: tuple) -> tuple:
    queries, candidates, local, temperature, outcome = residuals
    size, by = jax.lax.axis_size(axis), cotangents[0]
    blocks = _cut(queries, _most(candidates, local), temperature)

    def one_step(carry: tuple, step: jax.Array) -> tuple[tuple, None]:
        vectors_CE, d_EC, d_GBE = carry
        coming_CE, d_EC = _pass_on(vectors_CE, axis), _pass_on(d_EC, axis)
        d_GBE, d_step_EC = _pull_again(
            d_GBE, blocks, outcome, *_of_step(candidates, vectors_CE, step, axis)
        )
        return (coming_CE, d_EC + d_step_EC, d_GBE), None

    d_GBE = -outcome.lack[..., None] * blocks.positives_NE.astype(temperature.dtype)
    none_EC = jnp.zeros_like(candidates.vectors_CE.T, dtype=temperature.dtype)
    carry, _ = jax.lax.scan(one_step, (candidates.vectors_CE, none_EC, d_GBE), jnp.arange(size - 1))
    last_CE, d_EC, d_GBE = carry
    d_GBE, d_step_EC = _pull_again(
        d_GBE, blocks, outcome, *_of_step(candidates, last_CE, size - 1, axis)
    )
    # One step further, gradients are at home.
    d_EC = _pass_on(_pass_on(d_EC, axis) + d_step_EC, axis)
    dtype, d_local = queries.vectors_NE.dtype, None
    if local is not None:
        d_GBE, d_local_EC = _pull_again(d_GBE, blocks, outcome, local, None)
        d_local = Candidates((by * d_local_EC.T).astype(dtype), _NO_GRADIENT, _NO_GRADIENT)
    lack_N, d_NE = _join(outcome.lack, queries), _join(d_GBE, queries)
    d_queries, d_temperature = _query_gradients(queries.vectors_NE, temperature, lack_N, d_NE, by)
    d_candidates = Candidates((by * d_EC.T).astype(dtype), _NO_GRADIENT, _NO_GRADIENT)
    return d_queries, d_candidates, d_local, d_temperature


_ring_sums.defvjp(_ring_forward, _ring_backward)


def _meet(
    online: _Online, blocks: Queries, candidates: Candidates, first: jax.Array | None
) -> _Online:
    """Lets all queries meet candidates; `[G, B]` arrays in, `[G, B]` arrays out."""

    def one_block(_: None, met: tuple[_Online, Queries]) -> tuple[None, _Online]:
        before, block = met
        raw_BC, logits_BC = _logits(block, candidates, first)
        own_B = before.own
        if first is not None and block.own_N is not None:
            place_B = block.own_N - first
            here_B = (place_B >= 0) & (place_B < raw_BC.shape[1])
            own_B = jnp.where(here_B, _pick(raw_BC, place_B) + block.bias_N, own_B)
        top_B = jnp.maximum(before.top, logits_BC.max(axis=-1))
        rest_B = jnp.exp(logits_BC - top_B[:, None]).sum(axis=-1)
        return None, _Online(own_B, top_B, rest_B + before.rest * jnp.exp(before.top - top_B))

    return jax.lax.scan(one_block, None, (online, blocks))[1]


def _pull_again(
    d_GBE: jax.Array,
    blocks: Queries,
    outcome: _Outcome,
    candidates: Candidates,
    first: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """Adds what candidates give to the gradients of queries; also returns the candidates' own."""

    def one_block(d_EC: jax.Array, each: tuple) -> tuple[jax.Array, jax.Array]:
        d_BE, block, outcome = each
        _, logits_BC = _logits(block, candidates, first)
        shares_BC = jnp.exp(logits_BC - outcome.shift[:, None])
        d_more_BE, d_more_EC = _pull(shares_BC, block, candidates, outcome)
        return d_EC + d_more_EC, d_BE + d_more_BE

    none_EC = jnp.zeros_like(candidates.vectors_CE.T, dtype=d_GBE.dtype)
    d_EC, d_GBE = jax.lax.scan(one_block, none_EC, (d_GBE, blocks, outcome))
    return d_GBE, d_EC


def _of_step(
    candidates: Candidates, vectors_CE: jax.Array, step: jax.Array | int, axis: str
) -> tuple[Candidates, jax.Array]:
    """The candidates that a device has after some steps round the ring, and the first one's number."""
    rows = vectors_CE.shape[0]
    size = jax.lax.axis_size(axis)
    first = (jax.lax.axis_index(axis) + size - step) % size * rows
    _, bias_C, item_CK = jax.tree.map(
        lambda x: jax.lax.dynamic_slice_in_dim(x, first, rows), candidates._replace(vectors_CE=None)
    )
    return Candidates(vectors_CE, bias_C, item_CK), first


def _pass_on(x: jax.Array, axis: str) -> jax.Array:
    size = jax.lax.axis_size(axis)
    return jax.lax.ppermute(x, axis, [(i, (i + 1) % size) for i in range(size)])


def _most(candidates: Candidates, local: Candidates | None) -> int:
    """Candidates that a device scores at a time."""
    return max(x.vectors_CE.shape[0] for x in (candidates, local) if x is not None)


def _cut(queries: Queries, candidates: int, temperature: jax.Array) -> Queries:
    """Queries over temperature, in blocks `[G, B, …]`; what fills the last one does not count."""
    vectors_NE = queries.vectors_NE
    size = vectors_NE.shape[0]
    # The product is rounded once to the vectors' type, also where that is narrow.
    scaled_NE = (vectors_NE.astype(temperature.dtype) / temperature).astype(vectors_NE.dtype)
    number = math.ceil(size * candidates * temperature.dtype.itemsize / _BLOCK_BYTES)
    rows = min(size, max(_LEAST_ROWS, math.ceil(size / number)))
    number = math.ceil(size / rows)

    def cut(x_N: jax.Array) -> jax.Array:
        widths = [(0, number * rows - size)] + [(0, 0)] * (x_N.ndim - 1)
        return jnp.pad(x_N, widths).reshape(number, rows, *x_N.shape[1:])

    return jax.tree.map(cut, queries._replace(vectors_NE=scaled_NE))


def _join(x_GB: jax.Array, queries: Queries) -> jax.Array:
    """Undoes `_cut` of an array."""
    return x_GB.reshape(-1, *x_GB.shape[2:])[: queries.valid_N.size]


def _logits(
    block: Queries, candidates: Candidates, first: jax.Array | int | None
) -> tuple[jax.Array, jax.Array]:
    """`[B, C]` products without biases, and logits, masked where a candidate is no negative.

    Args:
      block: queries over temperature.
      candidates: some of them.
      first: the number of the first, as `own_N` counts; None: no positives are among these.
    """
    raw_BC = _product(block.vectors_NE, candidates.vectors_CE, (1, 1))
    logits_BC = raw_BC + candidates.bias_C
    if block.item_NK is not None and candidates.item_CK is not None:
        # The positive itself has the positive's item.
        words = zip(block.item_NK.T, candidates.item_CK.T, strict=True)
        unlike_BC = functools.reduce(jnp.logical_or, [b[:, None] != c for b, c in words])
        logits_BC = jnp.where(unlike_BC, logits_BC, MASKED)
    elif first is not None and block.own_N is not None:
        place_C = first + jnp.arange(raw_BC.shape[1], dtype=jnp.int32)
        logits_BC = jnp.where(block.own_N[:, None] != place_C, logits_BC, MASKED)
    return raw_BC, logits_BC


def _score(block: Queries, candidates: Candidates) -> tuple[_Outcome, jax.Array]:
    """The outcome of queries that meet all candidates at once, and `[B, C]` exp(logit - shift)."""
    raw_BC, logits_BC = _logits(block, candidates, 0)
    if block.own_N is None:
        both_BE = block.vectors_NE.astype(raw_BC.dtype) * block.positives_NE.astype(raw_BC.dtype)
        own_B = both_BE.sum(axis=-1)
    else:
        # Taken from the same product as the negatives, or rounding would decide ties.
        own_B = _pick(raw_BC, block.own_N)
    own_B += block.bias_N
    top_B = logits_BC.max(axis=-1)
    shift_B = jnp.maximum(top_B, own_B)
    shares_BC = jnp.exp(logits_BC - shift_B[:, None])
    return _outcome(own_B, top_B, shift_B, shares_BC.sum(axis=-1), block.valid_N), shares_BC


def _outcome(
    own: jax.Array, top: jax.Array, shift: jax.Array, rest: jax.Array, valid: jax.Array
) -> _Outcome:
    """`rest` is the sum of exp(logit - shift) over the negatives."""
    total = rest + jnp.exp(own - shift)
    # log1p keeps what log(1 + rest) would round away where the positive leads.
    loss = jnp.where(own >= top, jnp.log1p(rest), jnp.log(total) + shift - own)
    return _Outcome(
        loss=jnp.where(valid, loss, 0),
        hit=(own > top) & valid,
        shift=shift,
        weight=jnp.where(valid, 1 / total, 0),
        lack=jnp.where(valid, rest / total, 0),
    )


def _pull(
    shares_BC: jax.Array, block: Queries, candidates: Candidates, outcome: _Outcome
) -> tuple[jax.Array, jax.Array]:
    """Gradients of queries over temperature, `[B, E]`, and of candidates, `[E, C]`, by the negatives.

    Weights are given to vectors, of which there are fewer than shares.
    """
    vectors_CE = candidates.vectors_CE
    weight_B1 = outcome.weight[:, None]
    shares_BC = shares_BC.astype(vectors_CE.dtype)
    d_BE = weight_B1 * _product(shares_BC, vectors_CE, (1, 0))
    # On CPUs the product with the candidates last is quicker than its transpose.
    weighted_BE = (weight_B1 * block.vectors_NE).astype(vectors_CE.dtype)
    return d_BE, _product(weighted_BE, shares_BC, (0, 0))


def _query_gradients(
    vectors_NE: jax.Array, temperature: jax.Array, lack_N: jax.Array, d_NE: jax.Array, by: jax.Array
) -> tuple[Queries, jax.Array]:
    """Gradients of vectors, positives and temperature from those of vectors over temperature."""
    scaled_NE = vectors_NE.astype(d_NE.dtype) / temperature
    d_vectors_NE = (by / temperature * d_NE).astype(vectors_NE.dtype)
    d_positives_NE = (-by * lack_N[:, None] * scaled_NE).astype(vectors_NE.dtype)
    d_temperature = -by / temperature * (d_NE * scaled_NE).sum()
    return Queries(d_vectors_NE, d_positives_NE, *[_NO_GRADIENT] * 4), d_temperature


def _sums(loss: jax.Array, hit: jax.Array) -> tuple[jax.Array, jax.Array]:
    return loss.sum(), hit.sum(dtype=jnp.float32)


def _pick(x_BC: jax.Array, place_B: jax.Array) -> jax.Array:
    """`x_BC[b, place_B[b]]`, of the nearest place where there is none such."""
    return jnp.take_along_axis(x_BC, place_B[:, None], axis=1, mode="clip")[:, 0]


def _product(a: jax.Array, b: jax.Array, contract: tuple[int, int]) -> jax.Array:
    """Matrix product over one dimension of each, added up in a wide enough type."""
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, preferred_element_type=_sum_type(a))


def _sum_type(x: jax.Array) -> jnp.dtype:
    return jnp.promote_types(x.dtype, jnp.float32)
