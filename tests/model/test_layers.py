"""The options of layers: causality, packed sequences, types, remat, and what parameters they add.

`test_dense_file.py` compares what they compute with NumPy.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from s2s_jax.config import ModelConfig, TimeGaps
from s2s_jax.model.transformer import Transformer

L, E = 7, 8
# Two packed sequences, of four and three events.
SEQUENCE_1L = np.array([[3] * 4 + [5] * 3], np.int32)
TIME_1L = np.array([[0, 3, 40, 9_000, 0, 0, 100]], np.int32)
OPTIONS = {
    "modern": {
        "norm": "rms",
        "qk_norm": True,
        "feed_forward": "swiglu",
        "gated_residuals": True,
        "position": "rope",
        "distance_bias": True,
        "time_bias": TimeGaps(),
    },
    "hstu": {"layer": "hstu", "distance_bias": True, "time_bias": TimeGaps(), "position": "rope"},
    "hstu_softmax": {
        "layer": "hstu_softmax",
        "norm": "rms",
        "norm_placement": "post",
        "qk_norm": True,
        "gated_residuals": True,
    },
    "post": {"norm_placement": "post", "input_norm": True},
}


# The others take other paths through the same code.
NAMES = [
    "modern",
    "hstu",
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("hstu_softmax", "post")),
]


def make_transformer(**changes):
    config = ModelConfig(
        seq_len=L, hidden_size=E, num_layers=2, nhead=2, dim_feedforward=8, dropout=0.0
    )
    return Transformer(dataclasses.replace(config, **changes), nnx.Rngs(0))


def moved(params):
    """Parameters near these. Some are zeros or alike at first, which would hide mistakes."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: x + rng.normal(0, 0.3, x.shape).astype(np.float32), params)


def events(*shape):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("attention", ["blocked", pytest.param("xla", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", NAMES)
def test_positions_see_their_sequence_up_to_themselves(name, attention):
    """By gradients: zero from all other positions, and not zero from those that are seen."""
    graph, params = nnx.split(make_transformer(attention=attention, **OPTIONS[name]))
    transformer = nnx.merge(graph, moved(params))

    @jax.jit
    @jax.jacobian
    def jacobian(x_LE, mixed_E):
        return transformer(x_LE, L, None, SEQUENCE_1L, time_BL=TIME_1L) @ mixed_E

    x_LE = events(L, E)
    found_LLE = np.asarray(jacobian(x_LE, events(E)))
    assert np.isfinite(found_LLE).all()
    same_LL = SEQUENCE_1L[0, :, None] == SEQUENCE_1L[0]
    seen_LL = np.tri(L, dtype=bool) & same_LL
    assert np.array_equal((found_LLE != 0).any(axis=-1), seen_LL)


@pytest.mark.parametrize("name", NAMES)
def test_packed_sequences_are_encoded_as_alone_and_in_bfloat16(name):
    """Also the gradients of parameters, which are sums over all positions."""
    transformer = make_transformer(**OPTIONS[name])
    rough = make_transformer(**OPTIONS[name], dtype="bfloat16", attention="xla")
    graph, params = nnx.split(transformer)
    params = moved(params)
    x_LE, weight_LE = events(L, E), events(L, E)[::-1]

    def packed(graph, params, dtype):
        run = nnx.merge(graph, params)
        return run(jnp.asarray(x_LE, dtype), L, None, SEQUENCE_1L, time_BL=TIME_1L)

    def alone(params):
        run = nnx.merge(graph, params)
        # The second sequence is padded to the length of the first.
        x_ME = jnp.concatenate([x_LE, events(1, E)])
        return run(x_ME, 4, None, time_BL=np.append(TIME_1L, 0).reshape(2, 4))[:L]

    @jax.jit
    def both(params):
        def loss(states_LE):
            return (states_LE * weight_LE).sum(), states_LE

        found = jax.value_and_grad(lambda p: loss(packed(graph, p, "float32")), has_aux=True)
        expected = jax.value_and_grad(lambda p: loss(alone(p)), has_aux=True)
        return found(params), expected(params), packed(nnx.graphdef(rough), params, "bfloat16")

    found, expected, rough_LE = both(params)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, expected
    )
    assert rough_LE.dtype == jnp.float32
    assert 1e-4 < np.abs(rough_LE - found[0][1]).max() < 0.15


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "changes",
    [
        {"unroll": 1, "remat": "attention"},
        pytest.param({"remat": "attention"}, marks=pytest.mark.slow),
        pytest.param({"unroll": 1}, marks=pytest.mark.slow),
        pytest.param({"unroll": 1, "remat": "full"}, marks=pytest.mark.slow),
    ],
)
def test_remat_and_unroll_change_nothing(name, changes):
    x_ME, key = events(2 * L, E), jax.random.key(0)

    def run(**changes):
        graph, params = nnx.split(make_transformer(dropout=0.3, **OPTIONS[name], **changes))

        def loss(params, x_ME):
            run = nnx.merge(graph, params)
            return jnp.square(run(x_ME, L, key, time_BL=np.tile(TIME_1L, (2, 1))) - 1).sum()

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(params, x_ME)

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), run(**changes), run()
    )


def of_layers(**changes):
    return nnx.to_pure_dict(nnx.state(make_transformer(**changes)))["layers"]


def test_options_add_parameters_and_keep_the_others():
    plain = of_layers()
    more = of_layers(qk_norm=True, gated_residuals=True, feed_forward="swiglu")
    for name in ("gate1", "gate2"):
        assert more.pop(name)["kernel"].shape == (2, E, E)
    assert more["ffn"].pop("gate")["kernel"].shape == (2, E, 8)
    scale_YN = more["attn"].pop("heads")["qk_scale"]
    np.testing.assert_allclose(scale_YN, np.full((2, 2), np.log2(L * L - L)), rtol=1e-6)
    assert jax.tree.structure(more) == jax.tree.structure(plain)
    np.testing.assert_array_equal(plain["attn"]["qkv"]["kernel"], more["attn"]["qkv"]["kernel"])
    rms = of_layers(norm="rms")
    assert set(rms["norm1"]) == {"scale"}


def test_with_post_norm_each_layer_ends_with_a_norm():
    transformer = make_transformer(norm_placement="post")
    states_ME = transformer(events(L, E), L, None)
    np.testing.assert_allclose(states_ME.mean(axis=-1), 0, atol=1e-5)
    np.testing.assert_allclose(states_ME.std(axis=-1), 1, atol=1e-3)
    assert "final_norm" not in nnx.to_pure_dict(nnx.state(transformer))
