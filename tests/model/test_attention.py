"""Attention against a dense reference in NumPy float64; segments, positions, remat, unrolled layers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from flax import nnx

from s2s_jax.config import ModelConfig, TimeGaps, validate
from s2s_jax.errors import UserError
from s2s_jax.model.attention import causal_attention, choose
from s2s_jax.model.distance_bias import bias_of_distances
from s2s_jax.model.positions import rotate, rotation, sequence_positions
from s2s_jax.model.transformer import Transformer

B, N, H, E = 2, 2, 4, 8
# Three sequences share the first row (the last one is padding); the second row is one sequence.
SEGMENT_BL = np.array([[1] * 70 + [2] * 25 + [0] * 35, [1] * 130], np.int32)
# The sequences in the first 100 positions: row, begin, end.
PLACES = ((0, 0, 70), (0, 70, 95), (0, 95, 100), (1, 0, 100))


def draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def reference(q, k, v, d_out, sequence_BL=None, bias_NL=None):
    """Output and gradients of queries, keys and values in float64, `[B, L, N, H]`.

    With a bias by distance, also the gradient of it.
    """
    q, k, v, d_out = (np.moveaxis(x.astype(np.float64), 2, 1) for x in (q, k, v, d_out))
    seq_len, scale = q.shape[2], q.shape[-1] ** -0.5
    seen = np.tril(np.ones((seq_len, seq_len), bool))[None, None]
    if sequence_BL is not None:
        seen = seen & (sequence_BL[:, None, :, None] == sequence_BL[:, None, None, :])
    scores = q @ k.swapaxes(-1, -2) * scale
    distance_LL = np.subtract.outer(np.arange(seq_len), np.arange(seq_len))
    if bias_NL is not None:
        scores = scores + bias_NL[:, np.maximum(distance_LL, 0)]
    scores = np.where(seen, scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    d_weights = d_out @ v.swapaxes(-1, -2)
    shared = (weights * d_weights).sum(axis=-1, keepdims=True)
    d_biased = weights * (d_weights - shared)
    d_scores = d_biased * scale
    d_k, d_v = d_scores.swapaxes(-1, -2) @ q, weights.swapaxes(-1, -2) @ d_out
    found = [np.moveaxis(x, 1, 2) for x in (weights @ v, d_scores @ k, d_k, d_v)]
    if bias_NL is not None:
        of_pairs_NLL = d_biased.sum(axis=0)
        d_bias = [of_pairs_NLL[:, distance_LL == d].sum(axis=1) for d in range(seq_len)]
        found.append(np.stack(d_bias, axis=1))
    return found


@pytest.mark.parametrize("implementation", ["blocked", "xla"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("seq_len", [1, 64, 130])
def test_values_and_gradients(seq_len, packed, implementation):
    sequence_BL = SEGMENT_BL[:, :seq_len] if packed else None
    q, k, v, d_out = (draw(i, B, seq_len, N, H) * (1 + 2 * (i < 2)) for i in range(4))

    @jax.jit
    def value_and_gradients(q, k, v, d_out):
        def attend(*qkv):
            return causal_attention(*qkv, sequence_BL, implementation)

        out, pull = jax.vjp(attend, q, k, v)
        return out, *pull(d_out)

    expected = reference(q, k, v, d_out, sequence_BL)
    for ours, theirs in zip(value_and_gradients(q, k, v, d_out), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("implementation", ["blocked", "xla"])
@pytest.mark.parametrize("packed", [False, True])
def test_a_bias_of_distances_and_its_gradient(packed, implementation):
    sequence_BL = SEGMENT_BL if packed else None
    q, k, v, d_out = (draw(i, B, 130, N, H) for i in range(4))
    bias_NL = draw(4, N, 130)

    @jax.jit
    def value_and_gradients(q, k, v, bias_NL, d_out):
        def attend(q, k, v, bias_NL):
            return causal_attention(q, k, v, sequence_BL, implementation, bias_NL)

        out, pull = jax.vjp(attend, q, k, v, bias_NL)
        return out, *pull(d_out)

    expected = reference(q, k, v, d_out, sequence_BL, bias_NL)
    for ours, theirs in zip(value_and_gradients(q, k, v, bias_NL, d_out), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("implementation", ["blocked", "xla"])
@pytest.mark.parametrize("packed", [False, True])
def test_weights_by_silu(packed, implementation):
    """The sums are those of a loop; derivatives along a random direction are differences in float64."""
    sequence_BL = SEGMENT_BL if packed else np.ones((B, 130), np.int32)
    arguments = [draw(i, B, 130, N, H) for i in range(3)] + [draw(3, N, 130)]
    directions = [draw(i + 4, *x.shape) for i, x in enumerate(arguments)]
    d_out = draw(9, B, 130, N, H)

    def expected(q, k, v, bias_NL):
        out = np.zeros((B, 130, N, H))
        for query in range(130):
            keys = slice(0, query + 1)
            scores_BKN = (q[:, query, None] * k[:, keys]).sum(-1) + bias_NL[:, query::-1].T
            weights_BKN = scores_BKN / (1 + np.exp(-scores_BKN))
            weights_BKN = weights_BKN * (sequence_BL[:, keys] == sequence_BL[:, [query]])[..., None]
            out[:, query] = (weights_BKN[..., None] * v[:, keys]).sum(axis=1)
        return out

    @jax.jit
    def value_and_gradients(arguments, d_out):
        def attend(q, k, v, bias_NL):
            packs = sequence_BL if packed else None
            return causal_attention(q, k, v, packs, implementation, bias_NL, "silu")

        out, pull = jax.vjp(attend, *arguments)
        return out, pull(d_out)

    out, gradients = value_and_gradients(arguments, d_out)
    exact = [x.astype(np.float64) for x in arguments]
    np.testing.assert_allclose(out, expected(*exact), rtol=1e-4, atol=1e-4)
    for number, direction in enumerate(directions):
        ends = []
        for step in (-1e-5, 1e-5):
            moved = [*exact]
            moved[number] = exact[number] + step * direction
            ends.append((expected(*moved) * d_out).sum())
        slope = (ends[1] - ends[0]) / 2e-5
        np.testing.assert_allclose((gradients[number] * direction).sum(), slope, rtol=1e-3)


def test_buckets_of_distances_are_those_of_t5():
    """The formula of T5's code for its decoder: 32 buckets, the last from where the logarithm ends."""
    distance = np.arange(1000)
    far = 16 + np.floor(np.log(np.maximum(distance, 16) / 16) / np.log(128 / 16) * 16)
    bucket = np.where(distance < 16, distance, np.minimum(far, 31))
    table_NS = np.arange(32, dtype=np.float32)[None]
    np.testing.assert_array_equal(bias_of_distances(table_NS, 1000)[0], bucket)


@pytest.mark.parametrize("implementation", ["blocked", "xla"])
def test_weights_by_silu_in_bfloat16(implementation):
    """Sums of up to 70 products with a precision of eight bits."""
    arguments, d_out = [draw(i, B, 70, N, H) for i in range(3)], draw(3, B, 70, N, H)

    def value_and_gradients(*arguments):
        def attend(q, k, v):
            return causal_attention(q, k, v, None, implementation, None, "silu")

        out, pull = jax.vjp(attend, *arguments)
        return out, *pull(d_out.astype(out.dtype))

    exact = value_and_gradients(*arguments)
    rough = value_and_gradients(*(x.astype(jnp.bfloat16) for x in arguments))
    for ours, theirs in zip(rough, exact, strict=True):
        assert ours.dtype == jnp.bfloat16
        largest = np.abs(theirs).max()
        np.testing.assert_allclose(np.asarray(ours, np.float32), theirs, atol=0.02 * largest)


def test_blocked_bfloat16_is_close():
    q, k, v, d_out = (draw(i, B, 70, N, H) for i in range(4))
    rough = (jnp.asarray(x, jnp.bfloat16) for x in (q, k, v))
    out, pull = jax.vjp(lambda *qkv: causal_attention(*qkv, implementation="blocked"), *rough)
    found = [out, *pull(jnp.asarray(d_out, jnp.bfloat16))]
    for ours, theirs in zip(found, reference(q, k, v, d_out), strict=True):
        assert ours.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.asarray(ours, np.float32), theirs, rtol=0.05, atol=0.05)


def test_large_scores_are_finite():
    q, k, v = (1e4 * draw(i, 1, 70, N, H) for i in range(3))
    gradients = jax.grad(lambda q: causal_attention(q, k, v, implementation="blocked").sum())(q)
    assert np.all(np.isfinite(gradients))


def test_choice():
    assert choose("cpu", jnp.dtype("float32"), 64) == "blocked"
    assert choose("gpu", jnp.dtype("bfloat16"), 128) == "cudnn"
    for dtype, width in (("float32", 64), ("bfloat16", 20), ("bfloat16", 256)):
        assert choose("gpu", jnp.dtype(dtype), width) == "xla"
    assert choose("tpu", jnp.dtype("bfloat16"), 64) == "xla"
    assert choose("cpu", jnp.dtype("float32"), 64, is_plain=False) == "blocked"
    assert choose("gpu", jnp.dtype("bfloat16"), 128, is_plain=False) == "xla"


def test_sequence_positions():
    sequence_BL = jnp.asarray([[3, 3, 3, 1, 1, 2, 0, 0], [5, 5, 5, 5, 5, 5, 5, 5]])
    expected = [[0, 1, 2, 0, 1, 0, 0, 1], [0, 1, 2, 3, 4, 5, 6, 7]]
    np.testing.assert_array_equal(sequence_positions(sequence_BL), expected)


def test_rotation_is_a_complex_product():
    position_BL = np.array([[0, 1, 2, 50], [7, 0, 1000, 3]])
    x = draw(0, 2, 4, N, H)
    ours = rotate(jnp.asarray(x), rotation(jnp.asarray(position_BL), H))
    angle = position_BL[..., None, None] / 10_000.0 ** (2 * np.arange(H // 2) / H)
    turned = (x[..., : H // 2] + 1j * x[..., H // 2 :]) * np.exp(1j * angle)
    expected = np.concatenate([turned.real, turned.imag], axis=-1)
    # float32 has a precision of 6e-5 at an angle of 1000.
    np.testing.assert_allclose(ours, expected, atol=3e-4)


def test_rotated_products_depend_on_distance_only():
    q, k = (jnp.broadcast_to(draw(i, 1, 1, 1, H), (1, 30, 1, H)) for i in range(2))
    turns = rotation(jnp.arange(30)[None], H)
    products = np.einsum("qh,kh->qk", *(np.asarray(rotate(x, turns))[0, :, 0] for x in (q, k)))
    np.testing.assert_allclose(products[5:, 5:], products[:-5, :-5], atol=1e-5)
    assert np.ptp(np.diagonal(products, 1)) < 1e-5 < np.ptp(products[0])


def make_transformer(**changes):
    config = dataclasses.replace(
        ModelConfig(
            seq_len=130, hidden_size=E, num_layers=3, nhead=N, dim_feedforward=8, dropout=0.0
        ),
        **changes,
    )
    return Transformer(config, nnx.Rngs(0))


@pytest.mark.parametrize(
    ("position", "attention"),
    [
        pytest.param("none", "xla", marks=pytest.mark.slow),
        pytest.param("learned", "blocked", marks=pytest.mark.slow),
        ("rope", "blocked"),
    ],
)
def test_packed_sequences_are_encoded_as_alone(position, attention):
    """States, and gradients of events and parameters, are the same as with one sequence per row."""
    transformer = make_transformer(position=position, attention=attention)
    graph, params = nnx.split(transformer)
    x_BLE, weight_BLE = draw(0, B, 100, E), draw(1, B, 100, E)

    def packed(params, x_BLE):
        run = nnx.merge(graph, params)
        out_BLE = run(x_BLE.reshape(-1, E), 100, None, SEGMENT_BL[:, :100]).reshape(x_BLE.shape)
        return (out_BLE * weight_BLE).sum(), out_BLE

    def alone(params, x_BLE):
        run = nnx.merge(graph, params)
        rows = [
            jnp.pad(x_BLE[row, begin:end], ((0, 100 - end + begin), (0, 0)))
            for row, begin, end in PLACES
        ]
        outs = run(jnp.concatenate(rows), 100, None).reshape(len(rows), 100, E)
        real = [out[: end - begin] for out, (_, begin, end) in zip(outs, PLACES, strict=True)]
        out_BLE = jnp.concatenate(real).reshape(x_BLE.shape)
        return (out_BLE * weight_BLE).sum(), out_BLE

    found, expected = (
        jax.jit(jax.value_and_grad(f, argnums=(0, 1), has_aux=True))(params, x_BLE)
        for f in (packed, alone)
    )
    np.testing.assert_allclose(found[0][1], expected[0][1], atol=1e-5)
    # Gradients of parameters are sums over 200 positions.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), found[1], expected[1]
    )


@pytest.mark.parametrize("position", ["learned", "rope"])
def test_positions_matter_and_can_be_given(position):
    transformer = make_transformer(position=position)
    x_ME = draw(0, 8, E)
    plain = transformer(x_ME, 4, None)
    counted = jnp.broadcast_to(jnp.arange(4), (2, 4))
    np.testing.assert_array_equal(plain, transformer(x_ME, 4, None, position_BL=counted))
    moved = transformer(x_ME, 4, None, position_BL=3 * counted)
    assert np.abs(moved - plain).max() > 1e-4
    shifted = transformer(x_ME, 4, None, position_BL=counted + 9)
    if position == "rope":
        np.testing.assert_allclose(shifted, plain, atol=1e-5)
    else:
        assert np.abs(shifted - plain).max() > 1e-4


def test_only_learned_positions_add_parameters():
    plain = nnx.to_pure_dict(nnx.state(make_transformer()))
    learned = nnx.to_pure_dict(nnx.state(make_transformer(position="learned")))
    assert learned.pop("positions").shape == (130, E)
    jax.tree.map(np.testing.assert_array_equal, plain, learned)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"remat": "attention"}, marks=pytest.mark.slow),
        pytest.param({"remat": "full"}, marks=pytest.mark.slow),
        pytest.param({"unroll": 1}, marks=pytest.mark.slow),
        {"unroll": 2},
        {"unroll": 3, "remat": "full"},
    ],
)
def test_remat_and_unroll_change_nothing(changes):
    x_ME, key = draw(0, 2 * 20, E), jax.random.key(0)

    def run(**changes):
        transformer = make_transformer(position="rope", dropout=0.3, **changes)
        graph, params = nnx.split(transformer)

        def loss(params, x_ME):
            return jnp.square(nnx.merge(graph, params)(x_ME, 20, key) - 1).sum()

        forward = str(jax.make_jaxpr(loss)(params, x_ME))
        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(params, x_ME), forward

    (expected, plain), (found, program) = run(), run(**changes)
    # The name of `jax.checkpoint` in programs.
    assert "remat2[" not in plain
    assert ("remat2[" in program) == ("remat" in changes)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, expected
    )


@pytest.mark.parametrize(
    ("changes", "loops"),
    [({}, 0), ({"remat": "full"}, 1), ({"num_layers": 17}, 1), ({"unroll": 1}, 1)],
)
def test_auto_loops_over_many_layers_or_with_remat_only(changes, loops):
    transformer = make_transformer(attention="xla", **changes)
    text = jax.jit(lambda x_ME: transformer(x_ME, 4, None)).lower(draw(0, 8, E)).as_text()
    assert text.count("stablehlo.while") == loops


@pytest.mark.parametrize(
    ("changes", "path"),
    [
        ({"unroll": 3}, "model.unroll"),
        ({"unroll": 0}, "model.unroll"),
        ({"position": "rope", "hidden_size": 12}, "model.position"),
        ({"attention": "cudnn", "dtype": "float32"}, "model.attention"),
        ({"attention": "cudnn", "dtype": "bfloat16", "distance_bias": True}, "model.attention"),
        ({"attention": "cudnn", "dtype": "bfloat16", "time_bias": TimeGaps()}, "model.attention"),
        ({"attention": "cudnn", "dtype": "bfloat16", "layer": "hstu"}, "model.attention"),
        ({"feed_forward": "swiglu", "layer": "hstu"}, "model.feed_forward"),
    ],
)
def test_impossible_models_are_refused(changes, path):
    config = small.config()
    with pytest.raises(UserError, match=path):
        validate(dataclasses.replace(config, model=dataclasses.replace(config.model, **changes)))
