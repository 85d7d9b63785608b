"""The choice of hard negatives, compared with NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from s2s_jax.cluster.mesh import DATA_AXIS, make_mesh
from s2s_jax.config import LossConfig
from s2s_jax.model import hard_negatives
from s2s_jax.model.hard_negatives import hardest
from s2s_jax.model.loss import Pairs, Sampled, softmax_loss

N, C, E, H = 40, 30, 8, 6


@pytest.fixture(autouse=True)
def few_queries_at_a_time(monkeypatch):
    monkeypatch.setattr(hard_negatives, "_BLOCK", 16)


def make(seed: int, words: int) -> tuple[Pairs, Sampled]:
    rng = np.random.default_rng(seed)
    queries, positives = rng.normal(size=(2, N, E)).astype(np.float32)
    items = rng.integers(0, 12, size=(N + C, words)).astype(np.int32)
    valid = rng.random(N) < 0.7
    pairs = Pairs(queries, positives, valid, items[:N] if words else None)
    vectors = rng.normal(size=(C, E)).astype(np.float32) * rng.uniform(0.2, 3, size=(C, 1))
    return pairs, Sampled(vectors.astype(np.float32), items[N:] if words else None, None)


def reference(similarity: str, pairs: Pairs, sampled: Sampled) -> list[int]:
    """The numbers of the hardest candidates, hardest first."""

    def unit(x):
        x = np.asarray(x, np.float64)
        return x / np.linalg.norm(x, axis=1, keepdims=True) if similarity == "cosine" else x

    similar = unit(pairs.queries_NE) @ unit(sampled.vectors_CE).T
    for n in range(N):
        for c in range(C):
            same = pairs.item_NK is not None and (pairs.item_NK[n] == sampled.item_CK[c]).all()
            if same or not pairs.valid_N[n]:
                similar[n, c] = -np.inf
    return sorted(range(C), key=lambda c: -similar[:, c].max())[:H]


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
@pytest.mark.parametrize("words", [0, 1, 2, 5])
def test_against_numpy(similarity, words):
    config = LossConfig(similarity=similarity, hard_negatives=H, negatives="uniform")
    pairs, sampled = make(words, words)
    chosen = reference(similarity, pairs, sampled)
    found = hardest(config, pairs, sampled, None)
    np.testing.assert_array_equal(found.vectors_CE, sampled.vectors_CE[chosen])
    if words:
        np.testing.assert_array_equal(found.item_CK, sampled.item_CK[chosen])


@pytest.mark.parametrize("devices", [1, 2, 4, 8])
def test_devices_with_the_same_candidates_choose_alike(devices):
    config = LossConfig(hard_negatives=H, negatives="full")
    pairs, sampled = make(7, 1)
    chosen = reference("cosine", pairs, sampled)
    mesh = make_mesh(jax.devices()[:devices])
    split, everywhere = PartitionSpec(DATA_AXIS), PartitionSpec()
    mapped = jax.shard_map(
        lambda pairs, sampled: hardest(config, pairs, sampled, DATA_AXIS).vectors_CE,
        mesh=mesh,
        in_specs=(split, everywhere),
        out_specs=split,
        check_vma=False,
    )
    found = np.asarray(jax.jit(mapped)(pairs, sampled)).reshape(devices, H, E)
    for of_device in found:
        np.testing.assert_array_equal(of_device, sampled.vectors_CE[chosen])


def test_only_chosen_candidates_have_gradients():
    config = LossConfig(hard_negatives=H, negatives="uniform")
    pairs, sampled = make(3, 1)
    chosen = reference("cosine", pairs, sampled)

    def loss(queries, vectors, choose):
        now, drawn = pairs._replace(queries_NE=queries), sampled._replace(vectors_CE=vectors)
        if choose:
            drawn = hardest(config, now, drawn, None)
        else:
            drawn = jax.tree.map(lambda x: jnp.asarray(x)[np.array(chosen)], drawn)
        return softmax_loss(config, now, sampled=drawn).loss

    operands = pairs.queries_NE, sampled.vectors_CE
    value, gradients = jax.value_and_grad(loss, (0, 1))(*operands, True)
    expected, of_chosen = jax.value_and_grad(loss, (0, 1))(*operands, False)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), gradients, of_chosen)
    moved = np.abs(np.asarray(gradients[1])).sum(axis=1) > 0
    assert set(np.flatnonzero(moved)) == set(chosen)


def test_all_are_kept_if_there_are_few():
    config = LossConfig(hard_negatives=500, negatives="uniform")
    pairs, sampled = make(2, 1)
    found = hardest(config, pairs, sampled, None)
    assert sorted(found.vectors_CE[:, 0].tolist()) == sorted(sampled.vectors_CE[:, 0].tolist())
