"""The loss, compared with a float64 NumPy transcription that handles one pair at a time."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from s2s_jax.config import LossConfig
from s2s_jax.model.loss import Events, Pairs, pair_up, softmax_loss

B, L, E = 3, 7, 5


def reference(config, preds, targets, length, items):
    """Mean loss and hit rate in float64, by definition."""
    shift = 1 if config.pairing == "next" else -1
    pairs = []
    for b in range(B):
        for query in range(L):
            positive = query + shift
            if not 0 <= positive < L:
                continue
            real = query < length[b] and positive < length[b]
            real = real and items[b, positive, 0] >= 0
            if real or not config.mask_padding:
                pairs.append((b, query, positive))

    def unit(x):
        x = x.astype(np.float64)
        return x / max(np.linalg.norm(x), 1e-6) if config.similarity == "cosine" else x

    losses, hits = [], 0
    for b, query, positive in pairs:
        scores, own = [], None
        for c, _, candidate in pairs:
            score = unit(preds[b, query]) @ unit(targets[c, candidate]) / config.temperature
            if (c, candidate) == (b, positive):
                own = score
            elif config.mask_same_item and np.array_equal(items[c, candidate], items[b, positive]):
                continue
            else:
                scores.append(score)
        everything = np.array([own, *scores])
        top = everything.max()
        losses.append(np.log(np.exp(everything - top).sum()) + top - own)
        hits += all(own > score for score in scores)
    return np.mean(losses), hits / len(pairs)


def make_batch(seed, bag=1):
    rng = np.random.default_rng(seed)
    preds = rng.normal(size=(B, L, E)).astype(np.float32)
    targets = rng.normal(size=(B, L, E)).astype(np.float32)
    items = rng.integers(0, 6, size=(B, L, bag)).astype(np.int32)
    length = np.array([L, 4, 0], np.int32)
    items[0, 3] = -1
    for b in range(B):
        items[b, length[b] :] = -1
    return preds, targets, length, items


def ours(config, preds, targets, length, items):
    events = Events(jnp.asarray(length), items, items[..., 0] >= 0)
    pairs = pair_up(config, preds.reshape(B * L, E), targets.reshape(B * L, E), events)
    sums = softmax_loss(config, pairs)
    return sums.loss / sums.pairs, sums.hits / sums.pairs


@pytest.mark.parametrize(
    ("pairing", "mask_padding", "mask_same_item", "temperature"),
    list(itertools.product(["next", "previous"], [True, False], [True, False], [1.0, 0.05])),
)
@pytest.mark.parametrize("bag", [1, 2])
def test_against_the_definition(pairing, mask_padding, mask_same_item, temperature, bag):
    config = LossConfig(
        pairing=pairing,
        mask_padding=mask_padding,
        mask_same_item=mask_same_item,
        temperature=temperature,
    )
    for seed in range(3):
        batch = make_batch(seed, bag)
        loss, hit_rate = ours(config, *batch)
        expected_loss, expected_rate = reference(config, *batch)
        np.testing.assert_allclose(loss, expected_loss, rtol=2e-5)
        np.testing.assert_allclose(hit_rate, expected_rate, rtol=1e-6)


@pytest.mark.parametrize("mask_same_item", [True, False])
def test_dot_products_against_the_definition(mask_same_item):
    config = LossConfig(similarity="dot", temperature=1.0, mask_same_item=mask_same_item)
    batch = make_batch(0)
    found, expected = ours(config, *batch), reference(config, *batch)
    np.testing.assert_allclose(found, expected, rtol=2e-5)


@pytest.mark.parametrize("distance", [1, 2, 5])
def test_pairs_of_a_distance_stay_in_their_sequence(distance):
    preds, targets, length, items = make_batch(0)
    sequence = np.array([[0, 0, 0, 1, 1, 1, 1], [2, 2, 3, 3, 9, 9, 9], [9] * L], np.int32)
    events = Events(jnp.asarray(length), items, items[..., 0] >= 0, jnp.asarray(sequence))
    flat = preds.reshape(B * L, E), targets.reshape(B * L, E)
    pairs = pair_up(LossConfig(), *flat, events, distance)
    expected = [
        (preds[b, p], targets[b, p + distance])
        for b in range(B)
        for p in range(L - distance)
        if p + distance < length[b]
        and sequence[b, p] == sequence[b, p + distance]
        and items[b, p + distance, 0] >= 0
    ]
    valid = np.asarray(pairs.valid_N)
    assert valid.size == B * (L - distance)
    found = np.stack([pairs.queries_NE[valid], pairs.positives_NE[valid]], axis=1)
    np.testing.assert_array_equal(found, np.reshape(expected, (-1, 2, E)))


def test_ties_count_against_the_positive():
    same = np.ones((B, L, E), np.float32)
    _, _, length, _ = make_batch(0)
    items = np.arange(B * L, dtype=np.int32).reshape(B, L, 1)
    _, hit_rate = ours(LossConfig(), same, same, length, items)
    assert hit_rate == 0


def test_padding_has_no_effect():
    """The values at padded positions affect neither loss nor gradient, and get no gradient."""
    preds, targets, length, items = make_batch(1)

    def loss(preds, targets):
        return ours(LossConfig(), preds, targets, length, items)[0]

    value, (d_preds, d_targets) = jax.value_and_grad(loss, argnums=(0, 1))(preds, targets)
    padded = np.arange(L) >= length[:, None]
    assert np.all(np.asarray(d_preds)[padded] == 0)
    assert np.all(np.asarray(d_targets)[padded] == 0)
    noisy_preds, noisy_targets = preds.copy(), targets.copy()
    noisy_preds[padded] = 1e3
    noisy_targets[padded] = -1e3
    again, (d_again, _) = jax.value_and_grad(loss, argnums=(0, 1))(noisy_preds, noisy_targets)
    assert again == value
    np.testing.assert_array_equal(np.asarray(d_again)[~padded], np.asarray(d_preds)[~padded])


def test_zero_vectors_and_cold_temperatures_stay_finite():
    zeros = np.zeros((B, L, E), np.float32)
    _, _, length, items = make_batch(2)
    preds, targets, _, _ = make_batch(3)
    for args in ((zeros, zeros), (preds, targets), (preds, preds)):
        config = LossConfig(temperature=0.01)
        value, gradient = jax.value_and_grad(
            lambda p, c=config, t=args[1]: ours(c, p, t, length, items)[0]
        )(args[0])
        assert np.isfinite(value)
        assert np.all(np.isfinite(gradient))


def test_the_loss_without_pairs_is_zero_not_nan():
    preds, targets, _, items = make_batch(0)
    length = np.array([1, 0, 1], np.int32)
    flat = preds.reshape(-1, E), targets.reshape(-1, E)
    pairs = pair_up(LossConfig(), *flat, Events(length, items, items[..., 0] >= 0))
    sums = softmax_loss(LossConfig(), pairs)
    assert (sums.loss, sums.hits, sums.pairs) == (0, 0, 0)


def test_narrow_factors_are_rounded_once_and_added_up_in_float32():
    rng, count = np.random.default_rng(0), 40
    queries_NE, positives_NE = rng.normal(size=(2, count, 16)).astype(np.float32)
    valid_N, item_N1 = rng.random(count) < 0.8, rng.integers(0, 9, (count, 1)).astype(np.int32)
    # A power of two, so that dividing by it is exact.
    config = LossConfig(temperature=1 / 16)

    def narrow(queries_NE, positives_NE):
        pairs = Pairs(queries_NE, positives_NE, valid_N, item_N1)
        return softmax_loss(config, pairs, dtype=jnp.dtype("bfloat16")).loss

    rounded = [
        (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(jnp.bfloat16).astype(np.float32)
        for x in (queries_NE, positives_NE)
    ]
    expected = softmax_loss(
        dataclasses.replace(config, similarity="dot"), Pairs(*rounded, valid_N, item_N1)
    ).loss
    found, gradients = jax.value_and_grad(narrow, (0, 1))(queries_NE, positives_NE)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert [gradient.dtype for gradient in gradients] == [jnp.float32] * 2
