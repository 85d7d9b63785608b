"""A program that knows only the names of `dense.safetensors` computes the vectors of the tower."""

import math

import numpy as np
import pytest
import safetensors.numpy
from test_tower import TOLERANCE, make

from s2s_jax.exporting.dense_file import NAME, write_dense


def layer_norm(x_BLE, weights, name):
    centered = x_BLE - x_BLE.mean(-1, keepdims=True)
    normal = centered / np.sqrt(np.square(centered).mean(-1, keepdims=True) + 1e-5)
    return normal * weights[f"{name}.scale"] + weights[f"{name}.bias"]


def linear(x_BLE, weights, name):
    return x_BLE @ weights[f"{name}.kernel"] + weights[f"{name}.bias"]


def gelu(x):
    return 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def turned(x_BNLH):
    """Rotary positions: values i and i + H/2 are rotated by position / 10000^(2i/H)."""
    half = x_BNLH.shape[-1] // 2
    angle = np.arange(x_BNLH.shape[2])[:, None] * 10000.0 ** (-np.arange(half) / half)
    first, second = x_BNLH[..., :half], x_BNLH[..., half:]
    cos, sin = np.cos(angle), np.sin(angle)
    return np.concatenate([first * cos - second * sin, first * sin + second * cos], axis=-1)


def attention(x_BLE, weights, name, heads, rope):
    rows, seq_len, width = x_BLE.shape
    qkv = linear(x_BLE, weights, f"{name}.qkv").reshape(rows, seq_len, 3, heads, width // heads)
    q, k, v = qkv.transpose(2, 0, 3, 1, 4)
    if rope:
        q, k = turned(q), turned(k)
    scores = q @ k.swapaxes(-1, -2) / math.sqrt(width // heads)
    scores = np.where(np.tri(seq_len, dtype=bool), scores, -np.inf)
    shares = np.exp(scores - scores.max(-1, keepdims=True))
    out = shares / shares.sum(-1, keepdims=True) @ v
    return linear(out.transpose(0, 2, 1, 3).reshape(x_BLE.shape), weights, f"{name}.proj")


def encode(events_BLD, weights, model):
    x_BLE = linear(events_BLD, weights, "proj")
    if model.position == "learned":
        x_BLE = x_BLE + weights["transformer.positions"][: x_BLE.shape[1]]
    if model.input_norm:
        x_BLE = layer_norm(x_BLE, weights, "transformer.input_norm")
    for number in range(model.num_layers):
        layer = f"transformer.layers.{number}"
        normal = layer_norm(x_BLE, weights, f"{layer}.norm1")
        x_BLE = x_BLE + attention(
            normal, weights, f"{layer}.attn", model.nhead, model.position == "rope"
        )
        up = linear(layer_norm(x_BLE, weights, f"{layer}.norm2"), weights, f"{layer}.ffn.up")
        x_BLE = x_BLE + linear(gelu(up), weights, f"{layer}.ffn.down")
    return layer_norm(x_BLE, weights, "transformer.final_norm")


@pytest.mark.parametrize("name", ["rope", pytest.param("learned", marks=pytest.mark.slow)])
def test_its_names_are_enough_to_compute_users(tmp_path, name):
    made = make(name)
    write_dense(made.tower.dense, tmp_path / NAME)
    weights = safetensors.numpy.load_file(tmp_path / NAME)
    assert all(x.dtype == np.float32 for x in weights.values())
    weights = {key: np.float64(x) for key, x in weights.items()}
    encoded_BLE = encode(np.float64(made.events_BLD), weights, made.tower.model)
    for row, length in enumerate(made.length_B):
        if length:
            vector = encoded_BLE[row, length - 1]
            expected = vector / np.linalg.norm(vector)
            np.testing.assert_allclose(made.users_BE[row], expected, atol=TOLERANCE)
