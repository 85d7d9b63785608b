"""A program that knows only the names of `dense.safetensors` computes the vectors of the tower."""

import math
from functools import partial

import numpy as np
import pytest
import safetensors.numpy
from test_tower import TOLERANCE, make

from s2s_jax.exporting.dense_file import NAME, write_dense


def norm(x_BLE, weights, name):
    is_layer_norm = f"{name}.bias" in weights
    if is_layer_norm:
        x_BLE = x_BLE - x_BLE.mean(-1, keepdims=True)
    normal_BLE = x_BLE / np.sqrt(np.square(x_BLE).mean(-1, keepdims=True) + 1e-5)
    return normal_BLE * weights[f"{name}.scale"] + (weights[f"{name}.bias"] if is_layer_norm else 0)


def linear(x_BLE, weights, name):
    return x_BLE @ weights[f"{name}.kernel"] + weights[f"{name}.bias"]


def gelu(x):
    return 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def length_one(x_BNLH):
    return x_BNLH / np.sqrt(np.square(x_BNLH).sum(-1, keepdims=True) + 1e-6)


def turned(x_BNLH):
    """Rotary positions: values i and i + H/2 are rotated by position / 10000^(2i/H)."""
    half = x_BNLH.shape[-1] // 2
    angle = np.arange(x_BNLH.shape[2])[:, None] * 10000.0 ** (-np.arange(half) / half)
    first, second = x_BNLH[..., :half], x_BNLH[..., half:]
    cos, sin = np.cos(angle), np.sin(angle)
    return np.concatenate([first * cos - second * sin, first * sin + second * cos], axis=-1)


def t5_bias(table_NS, seq_len):
    """The formula of the paper's code for a decoder with 32 buckets and a largest distance of 128."""
    distance = np.maximum(np.subtract.outer(np.arange(seq_len), np.arange(seq_len)), 0)
    far = 16 + np.floor(np.log(np.maximum(distance, 16) / 16) / np.log(128 / 16) * 16)
    return table_NS[:, np.where(distance < 16, distance, np.minimum(far, 31)).astype(int)]


def gap_bias(table_NS, time_BL):
    """`[B, N, L, L]`: bucket 0 below a second, and bucket s from 2^(s-1) to below 2^s seconds."""
    gap_BLL = np.maximum(time_BL[:, :, None].astype(int) - time_BL[:, None], 0)
    return table_NS[:, np.vectorize(lambda gap: int(gap).bit_length())(gap_BLL)].swapaxes(0, 1)


def attention(x_BLE, weights, name, model, time_BL):
    qkv = linear(x_BLE, weights, f"{name}.qkv")
    return linear(heads_of(qkv, weights, name, model, time_BL), weights, f"{name}.proj")


def gated_attention(x_BLE, weights, name, model, time_BL):
    """Equations 1 to 3 of the paper on HSTU."""
    uqkv = linear(x_BLE, weights, f"{name}.uqkv")
    uqkv = uqkv * sigmoid(uqkv)
    width = x_BLE.shape[-1]
    out_BLE = heads_of(uqkv[..., width:], weights, name, model, time_BL)
    out_BLE = norm(out_BLE, weights, f"{name}.norm") * uqkv[..., :width]
    return linear(out_BLE, weights, f"{name}.proj")


def heads_of(qkv, weights, name, model, time_BL):
    """The outputs of all heads next to each other."""
    rows, seq_len, width = qkv.shape
    heads, width = model.nhead, width // 3
    q, k, v = qkv.reshape(rows, seq_len, 3, heads, width // heads).transpose(2, 0, 3, 1, 4)
    scale = 1.0 if model.layer == "hstu" else 1 / math.sqrt(width // heads)
    if model.qk_norm:
        q, k = length_one(q), length_one(k)
        scale = weights[f"{name}.heads.qk_scale"][:, None, None]
    if model.position == "rope":
        q, k = turned(q), turned(k)
    scores = q @ k.swapaxes(-1, -2) * scale
    if model.distance_bias:
        scores = scores + t5_bias(weights[f"{name}.heads.distance_bias"], seq_len)
    if model.time_bias is not None:
        scores = scores + gap_bias(weights[f"{name}.heads.time_bias"], time_BL)
    seen = np.tri(seq_len, dtype=bool)
    if model.layer == "hstu":
        shares = seen * scores * sigmoid(scores)
    else:
        scores = np.where(seen, scores, -np.inf)
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        shares = shares / shares.sum(-1, keepdims=True)
    return (shares @ v).transpose(0, 2, 1, 3).reshape(rows, seq_len, width)


def feed_forward(x_BLE, weights, name):
    hidden = linear(x_BLE, weights, f"{name}.up")
    if f"{name}.gate.kernel" in weights:
        gate = linear(x_BLE, weights, f"{name}.gate")
        return linear(hidden * gate * sigmoid(gate), weights, f"{name}.down")
    return linear(gelu(hidden), weights, f"{name}.down")


def add_part(x_BLE, weights, layer, number, pre_norm, part):
    """Adds a part of a layer to its input, with the norm and the gate of this number."""
    x_before = norm(x_BLE, weights, f"{layer}.norm{number}") if pre_norm else x_BLE
    added_BLE = part(x_before)
    if f"{layer}.gate{number}.kernel" in weights:
        added_BLE = added_BLE * sigmoid(linear(x_BLE, weights, f"{layer}.gate{number}"))
    x_BLE = x_BLE + added_BLE
    return x_BLE if pre_norm else norm(x_BLE, weights, f"{layer}.norm{number}")


def encode(events_BLD, weights, model, time_BL):
    x_BLE = linear(events_BLD, weights, "proj")
    if model.position == "learned":
        x_BLE = x_BLE + weights["transformer.positions"][: x_BLE.shape[1]]
    if model.input_norm:
        x_BLE = norm(x_BLE, weights, "transformer.input_norm")
    pre_norm = model.norm_placement == "pre"
    for number in range(model.num_layers):
        layer = f"transformer.layers.{number}"
        attend = attention if model.layer == "transformer" else gated_attention
        attend = partial(
            attend, weights=weights, name=f"{layer}.attn", model=model, time_BL=time_BL
        )
        x_BLE = add_part(x_BLE, weights, layer, 1, pre_norm, attend)
        if model.layer != "transformer":
            continue
        feed = partial(feed_forward, weights=weights, name=f"{layer}.ffn")
        x_BLE = add_part(x_BLE, weights, layer, 2, pre_norm, feed)
    return norm(x_BLE, weights, "transformer.final_norm") if pre_norm else x_BLE


@pytest.mark.parametrize(
    "name",
    [
        "rope",
        "hstu",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("plain", "learned", "dot")),
    ],
)
def test_its_names_are_enough_to_compute_users(tmp_path, name):
    made = make(name)
    write_dense(made.tower.dense, tmp_path / NAME)
    weights = safetensors.numpy.load_file(tmp_path / NAME)
    assert all(x.dtype == np.float32 for x in weights.values())
    weights = {key: np.float64(x) for key, x in weights.items()}
    events_BLD, model = np.float64(made.events_BLD), made.tower.model
    encoded_BLE = encode(events_BLD, weights, model, made.time_BL)
    for row, length in enumerate(made.length_B):
        if length:
            vector = encoded_BLE[row, length - 1]
            is_cosine = made.tower.loss.similarity == "cosine"
            expected = vector / np.linalg.norm(vector) if is_cosine else vector
            np.testing.assert_allclose(made.users_BE[row], expected, atol=TOLERANCE)
