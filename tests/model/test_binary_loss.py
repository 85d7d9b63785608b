"""The calibrated binary cross-entropy, compared with NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from s2s_jax.config import LossConfig
from s2s_jax.model import softmax_blocks
from s2s_jax.model.binary_loss import positive_weight
from s2s_jax.model.loss import Pairs, Sampled, binary_loss

N, C, E, WEIGHT = 20, 12, 6, 0.3


@pytest.fixture(autouse=True)
def few_rows(monkeypatch):
    """Blocks of few queries, so that there are several and the last one is not full."""
    monkeypatch.setattr(softmax_blocks, "_BLOCK_BYTES_CPU", 1)
    monkeypatch.setattr(softmax_blocks, "_LEAST_ROWS", 3)


def make_batch(seed, words):
    rng = np.random.default_rng(seed)
    vectors = {
        name: rng.normal(size=(rows, E)).astype(np.float32)
        for name, rows in (("queries", N), ("positives", N), ("sampled", C))
    }
    item_NK, item_CK = (rng.integers(0, 3, (rows, words), np.int32) for rows in (N, C))
    return vectors, rng.random(N) < 0.8, item_NK, item_CK


def reference(similarity, temperature, vectors, valid, item_NK, item_CK, devices):
    """The sums, and the gradients of the loss."""
    wide = {name: x.astype(np.float64) for name, x in vectors.items()}
    length = {name: np.linalg.norm(x, axis=1, keepdims=True) for name, x in wide.items()}
    if similarity == "dot":
        length = {name: np.ones_like(x) for name, x in length.items()}
    unit = {name: x / length[name] for name, x in wide.items()}
    own = (unit["queries"] * unit["positives"]).sum(axis=1) / temperature
    logits = unit["queries"] @ unit["sampled"].T / temperature
    counts = (item_NK[:, None] != item_CK).any(axis=-1)
    counts &= np.arange(N)[:, None] * devices // N == np.arange(C) * devices // C
    share = valid / (counts.sum(axis=1) + 1)
    loss = WEIGHT * np.log1p(np.exp(-own)) + (counts * np.log1p(np.exp(logits))).sum(axis=1)
    hits = own > np.where(counts, logits, -np.inf).max(axis=1)
    d_own = -WEIGHT * share / (1 + np.exp(own)) / temperature
    d_logits = counts * share[:, None] / (1 + np.exp(-logits)) / temperature
    gradients = {
        "queries": d_own[:, None] * unit["positives"] + d_logits @ unit["sampled"],
        "positives": d_own[:, None] * unit["queries"],
        "sampled": d_logits.T @ unit["queries"],
    }
    if similarity == "cosine":
        for name, u in unit.items():
            g = gradients[name]
            gradients[name] = (g - u * (u * g).sum(axis=1, keepdims=True)) / length[name]
    return (loss * share).sum(), (hits & valid).sum(), gradients


@pytest.mark.parametrize(
    ("similarity", "temperature", "words", "devices"),
    [("cosine", 0.3, 1, 1), ("dot", 1.0, 3, 1), ("dot", 1.0, 2, 4)],
)
def test_against_numpy(similarity, temperature, words, devices):
    config = LossConfig(
        objective="gbce", negatives="uniform", similarity=similarity, temperature=temperature
    )
    batch = vectors, valid, item_NK, item_CK = make_batch(0, words)

    def on_device(vectors, valid, item_NK, item_CK, weight):
        pairs = Pairs(vectors["queries"], vectors["positives"], valid, item_NK)
        sampled = Sampled(vectors["sampled"], item_CK, None)
        return jax.lax.psum(binary_loss(config, pairs, sampled, weight), "data")

    mesh = jax.make_mesh((devices,), ("data",), (AxisType.Auto,), devices=jax.devices()[:devices])
    first = PartitionSpec("data")
    sums_of = jax.shard_map(
        on_device, mesh=mesh, in_specs=(*[first] * 4, PartitionSpec()), out_specs=PartitionSpec()
    )

    def loss(vectors):
        sums = sums_of(vectors, valid, item_NK, item_CK, jnp.float32(WEIGHT))
        return sums.loss, sums

    (_, sums), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(vectors)
    expected_loss, hits, expected = reference(similarity, temperature, *batch, devices)
    np.testing.assert_allclose(sums.loss, expected_loss, rtol=1e-5)
    assert (sums.hits, sums.pairs) == (hits, valid.sum())
    assert 0 < hits < valid.sum()
    for name, gradient in expected.items():
        np.testing.assert_allclose(gradients[name], gradient, atol=1e-5, err_msg=name)


def test_narrow_vectors_have_gradients():
    config = LossConfig(objective="gbce", negatives="full", similarity="dot", temperature=1.0)
    vectors, valid, item_NK, item_CK = make_batch(1, 1)

    def loss(vectors, dtype):
        pairs = Pairs(vectors["queries"], vectors["positives"], valid, item_NK)
        sampled = Sampled(vectors["sampled"], item_CK, None)
        return binary_loss(config, pairs, sampled, jnp.float32(WEIGHT), jnp.dtype(dtype)).loss

    narrow, wide = (jax.grad(loss)(vectors, dtype) for dtype in ("bfloat16", "float32"))
    for name in vectors:
        np.testing.assert_allclose(narrow[name], wide[name], atol=4e-3)
        assert np.abs(wide[name]).max() > 0.05


def test_the_weight_of_a_positive():
    """The formula of the paper: a (t (1 - 1/a) + 1/a)."""
    for drawn, items, calibration in (
        (10, 1001, 0.75),
        (100, 101, 0.5),
        (7, 50, 0.0),
        (7, 50, 1.0),
    ):
        rate = drawn / (items - 1)
        expected = rate * (calibration * (1 - 1 / rate) + 1 / rate)
        found = positive_weight(calibration, drawn, jnp.float32(1 / items))
        np.testing.assert_allclose(found, expected, rtol=1e-5)
    for items in (1, 2, 5):  # Every item once.
        assert positive_weight(0.75, items, jnp.float32(1 / items)) == 1
