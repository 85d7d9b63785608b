"""The bias of time gaps against a dense reference in NumPy float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from s2s_jax.model import time_bias
from s2s_jax.model.attention import causal_attention, choose
from s2s_jax.model.time_bias import BUCKETS, GapBias

B, L, N, H = 2, 70, 2, 4
# Three sequences share the first row, the last one is padding; the second row is one sequence.
SEQUENCE_BL = np.array([[1] * 40 + [2] * 25 + [-1] * 5, [1] * L], np.int32)


def draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def times():
    """Times of sequences that begin anew, with gaps of zero and of all sizes."""
    rng = np.random.default_rng(0)
    gap_BL = np.where(rng.random((B, L)) < 0.2, 0, 2 ** rng.integers(22, size=(B, L)))
    time_BL = np.empty((B, L), np.int32)
    for row, number in {(r, int(n)) for r in range(B) for n in SEQUENCE_BL[r]}:
        inside_L = SEQUENCE_BL[row] == number
        time_BL[row, inside_L] = np.cumsum(gap_BL[row, inside_L]) - gap_BL[row, inside_L][0]
    time_BL[SEQUENCE_BL < 0] = -1
    return time_BL


def bucket(gap: int) -> int:
    """The definition: 0 below a second, s from 2^(s-1) to below 2^s seconds."""
    return next(s for s in range(BUCKETS) if gap < 2**s)


def reference(weights, q, k, v, table_NS):
    """Float64 `[B, L, N, H]`, position by position."""
    time_BL, out = times(), np.zeros((B, L, N, H))
    for row in range(B):
        for query in range(L):
            keys = np.flatnonzero(SEQUENCE_BL[row, : query + 1] == SEQUENCE_BL[row, query])
            buckets = [bucket(int(time_BL[row, query]) - int(time_BL[row, key])) for key in keys]
            scores_KN = np.einsum("nh,knh->kn", q[row, query], k[row, keys])
            scores_KN = (
                scores_KN * (H**-0.5 if weights == "softmax" else 1) + table_NS[:, buckets].T
            )
            if weights == "softmax":
                shares_KN = np.exp(scores_KN - scores_KN.max(axis=0))
                shares_KN /= shares_KN.sum(axis=0)
            else:
                shares_KN = scores_KN / (1 + np.exp(-scores_KN))
            out[row, query] = np.einsum("kn,knh->nh", shares_KN, v[row, keys])
    return out


def test_buckets_end_below_powers_of_two():
    edges = [2**s + d for s in range(31) for d in (-1, 0, 1)]
    found = time_bias.bucket_of(jnp.asarray([-5, *edges, 2**31 - 1], jnp.int32))
    assert found.tolist() == [0, *map(bucket, edges), BUCKETS - 1]


@pytest.mark.parametrize("implementation", ["blocked", "xla"])
@pytest.mark.parametrize("weights", ["softmax", "silu"])
def test_values_and_gradients(weights, implementation):
    """Gradients along random directions, compared with differences of the reference."""
    inputs = [draw(i, B, L, N, H) for i in range(3)] + [draw(3, N, BUCKETS)]
    d_out = draw(4, B, L, N, H)

    @jax.jit
    def value_and_gradients(q, k, v, table_NS):
        def attend(q, k, v, table_NS):
            gaps = GapBias(table_NS, times())
            return causal_attention(
                q, k, v, SEQUENCE_BL, implementation, weights=weights, gaps=gaps
            )

        out, pull = jax.vjp(attend, q, k, v, table_NS)
        return out, pull(jnp.asarray(d_out, jnp.float32))

    found, gradients = value_and_gradients(*(jnp.asarray(x, jnp.float32) for x in inputs))
    np.testing.assert_allclose(found, reference(weights, *inputs), rtol=1e-4, atol=1e-5)
    # Each direction changes one input; the table also bucket by bucket, where gaps have it.
    directions = [
        [draw(9, *x.shape) if i == j else np.zeros_like(x) for j, x in enumerate(inputs)]
        for i in range(4)
    ]
    for number in (0, 5, 20):
        directions.append([np.zeros_like(x) for x in inputs])
        directions[-1][3][0, number] = 1.0
    for direction in directions:
        step = 1e-5
        ahead, behind = (
            (
                reference(weights, *(x + s * d for x, d in zip(inputs, direction, strict=True)))
                * d_out
            )
            for s in (step, -step)
        )
        expected = (ahead - behind).sum() / (2 * step)
        slope = sum((np.float64(g) * d).sum() for g, d in zip(gradients, direction, strict=True))
        assert abs(expected) > 1e-3
        np.testing.assert_allclose(slope, expected, rtol=1e-3, atol=1e-4)


def test_the_gradient_is_the_same_on_gpus(monkeypatch):
    bias = GapBias(jnp.asarray(draw(0, N, BUCKETS), jnp.float32), times())
    d_out = jnp.asarray(draw(1, B, N, L, L - 6), jnp.float32)
    expected = time_bias.gradient_of_block(bias, 6, L, d_out)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    found = time_bias.gradient_of_block(bias, 6, L, d_out)
    assert (np.abs(expected) > 0.1).any(axis=0).sum() > 15
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-3)


def test_cudnn_is_not_chosen():
    assert choose("gpu", jnp.bfloat16, 64) == "cudnn"
    assert choose("gpu", jnp.bfloat16, 64, is_plain=False) == "xla"
