"""Vectors of items, from counts of which items follow each other.

Items that occur near the same items get similar vectors. A table whose rows begin with them knows from
the first step what counting knows, while random rows must first learn which items are alike.

The matrix of positive pointwise mutual information is factorized, with contexts smoothed by a power of
3/4 and with the square roots of the singular values (Levy, Goldberg, Dagan, "Improving distributional
similarity with lessons learned from word embeddings", 2015). The factors come from a randomized subspace
iteration (Halko, Martinsson, Tropp, "Finding structure with randomness", 2011).

Shapes: I items, D width of a vector, F = D + 16 factors, or I if that is less.
"""

import numpy as np
import scipy.sparse

# More items than this have no vectors, except the first ones: a dense matrix takes 4 F bytes per item.
MOST_ITEMS = 2**19
_CONTEXT_POWER = 0.75
_MORE_FACTORS = 16
# More iterations sharpen only the last factors.
_ITERATIONS = 2


def item_vectors(neighbours_II: scipy.sparse.csr_matrix, width: int, seed: int) -> np.ndarray:
    """Return f32 `[I, D]`: the vectors of the first items, at most `MOST_ITEMS`.

    The mean square of a vector's entries is 1. The vector of an item without neighbours is zero.

    Args:
      neighbours_II: how often items follow each other; see `neighbours.count_neighbours`.
      width: D.
      seed: the seed of a random rotation, which gives all entries of a vector about the same variance.

    Examples:
      >>> together = np.kron(np.eye(2), np.ones((3, 3)))  # items 0 to 2 and 3 to 5 occur together
      >>> vectors_ID = item_vectors(scipy.sparse.csr_matrix(together), width=4, seed=0)
      >>> np.isclose(vectors_ID @ vectors_ID.T, 4, atol=1e-3).tolist()[0]
      [True, True, True, False, False, False]
    """
    information_II = _information(neighbours_II[:MOST_ITEMS, :MOST_ITEMS])
    if information_II.nnz == 0:
        return np.zeros((len(information_II.indptr) - 1, width), np.float32)
    rng = np.random.default_rng(seed)
    factors_ID = _factors(information_II, width, rng)
    rotation, _ = np.linalg.qr(rng.standard_normal((width, width)))
    factors_ID = factors_ID @ rotation[: factors_ID.shape[1]].astype(np.float32)
    norm_I1 = np.linalg.norm(factors_ID, axis=1, keepdims=True)
    # Rounding leaves tiny vectors where there is no information.
    known_I1 = (information_II.getnnz(axis=1)[:, None] > 0) & (norm_I1 > 1e-6 * norm_I1.max())
    scaled_ID = factors_ID * (np.sqrt(width) / np.where(known_I1, norm_I1, 1)).astype(np.float32)
    return np.where(known_I1, scaled_ID, 0).astype(np.float32)


def _information(neighbours_II: scipy.sparse.csr_matrix) -> scipy.sparse.csr_matrix:
    """Return f32 `[I, I]`: positive pointwise mutual information, in either direction of time."""
    pairs = (neighbours_II + neighbours_II.T).tocoo()
    total_I = np.bincount(pairs.row, pairs.data, minlength=pairs.shape[0])
    context_I = total_I**_CONTEXT_POWER
    expected = total_I[pairs.row] * context_I[pairs.col] / context_I.sum()
    information = np.log(pairs.data / expected)
    kept = information > 0
    entries = (information[kept].astype(np.float32), (pairs.row[kept], pairs.col[kept]))
    return scipy.sparse.csr_matrix(entries, shape=pairs.shape)


def _factors(
    information_II: scipy.sparse.csr_matrix, width: int, rng: np.random.Generator
) -> np.ndarray:
    """Return f32 `[I, D]`, or `[I, I]` for fewer than D items: left factors, the largest first."""
    items = len(information_II.indptr) - 1
    number = min(width + _MORE_FACTORS, items)
    start_IF = rng.standard_normal((items, number)).astype(np.float32)
    basis_IF, _ = np.linalg.qr(information_II @ start_IF)
    for _ in range(_ITERATIONS):
        basis_IF, _ = np.linalg.qr(information_II.T @ basis_IF)
        basis_IF, _ = np.linalg.qr(information_II @ basis_IF)
    rest_FI = (information_II.T @ basis_IF).T
    left_FF, singular_F, _ = np.linalg.svd(rest_FI, full_matrices=False)
    return (basis_IF @ (left_FF * np.sqrt(singular_F)))[:, :width]
