"""Vectors of items against a dense factorization by NumPy."""

import numpy as np
import pytest
import scipy.sparse

from s2s_jax.data.items import item_vectors as module
from s2s_jax.data.items.item_vectors import item_vectors

# Shapes: I items, D width.


def counts(items, pairs, seed):
    rng = np.random.default_rng(seed)
    counts_II = np.zeros((items, items))
    np.add.at(counts_II, tuple(rng.integers(0, items, (2, pairs))), 1 / rng.integers(1, 4, pairs))
    return counts_II


def gram_by_numpy(counts_II, width):
    """Dot products of unit vectors: rows of the left factors times the roots of singular values."""
    pairs_II = counts_II + counts_II.T
    share_II = pairs_II / pairs_II.sum()
    context_I = pairs_II.sum(axis=1) ** 0.75
    with np.errstate(divide="ignore", invalid="ignore"):
        likely_II = share_II.sum(axis=1)[:, None] * context_I / context_I.sum()
        information_II = np.maximum(np.log(share_II / likely_II), 0)
    left, singular, _ = np.linalg.svd(np.nan_to_num(information_II))
    factors_ID = (left * np.sqrt(singular))[:, :width]
    norm_I1 = np.linalg.norm(factors_ID, axis=1, keepdims=True)
    unit_ID = factors_ID / np.where(norm_I1 > 1e-9, norm_I1, 1)
    return unit_ID @ unit_ID.T


@pytest.mark.parametrize(("width", "pairs"), [(40, 300), (64, 300), (24, 900)])
def test_vectors_are_the_factors_of_the_information(width, pairs):
    counts_II = counts(40, pairs, seed=width)
    vectors_ID = item_vectors(scipy.sparse.csr_matrix(counts_II), width, seed=0)
    assert vectors_ID.dtype == np.float32
    np.testing.assert_allclose(
        vectors_ID @ vectors_ID.T / width, gram_by_numpy(counts_II, width), atol=2e-3
    )
    # The entries of a vector have about the same size, so no column carries more than others.
    if width <= 40:
        size_D = np.sqrt((vectors_ID**2).mean(axis=0))
        assert size_D.max() < 3 * size_D.min()


def test_a_few_factors_of_many_keep_groups_together():
    """500 items in 20 groups of which only one's items follow each other: 20 factors tell them apart."""
    group_I = np.arange(500) % 20
    rng = np.random.default_rng(0)
    together_II = group_I[:, None] == group_I
    counts_II = scipy.sparse.csr_matrix(together_II & (rng.random((500, 500)) < 0.3))
    unit_ID = item_vectors(counts_II.astype(float), width=20, seed=1) / np.sqrt(20)
    alike_II = unit_ID @ unit_ID.T
    assert alike_II[together_II].min() > 0.9
    assert alike_II[~together_II].max() < 0.1


def test_items_without_neighbours_have_no_vector(monkeypatch):
    counts_II = counts(40, 300, seed=1)
    counts_II[[3, 17]] = counts_II[:, [3, 17]] = 0
    vectors_ID = item_vectors(scipy.sparse.csr_matrix(counts_II), 8, seed=0)
    assert np.flatnonzero(~vectors_ID.any(axis=1)).tolist() == [3, 17]
    np.testing.assert_allclose((np.delete(vectors_ID, [3, 17], 0) ** 2).mean(axis=1), 1, rtol=1e-5)
    monkeypatch.setattr(module, "MOST_ITEMS", 30)
    first_ID = item_vectors(scipy.sparse.csr_matrix(counts_II), 8, seed=0)
    assert len(first_ID) == 30
    alone_ID = item_vectors(scipy.sparse.csr_matrix(counts_II[:30, :30]), 8, seed=0)
    np.testing.assert_array_equal(first_ID, alone_ID)
    assert not item_vectors(scipy.sparse.csr_matrix((5, 5)), 8, seed=0).any()
