"""Writes a tower as ONNX, which ONNX Runtime runs without JAX.

The graph is written operator by operator instead of being translated from JAX: that takes no further
package, gives the fused operators for layer norms, softmax and GELU, and leaves B and L open. It must
compute what `Tower.users` computes; `to_onnx` compares the two.

Shapes: B batch, L positions, D width of an embedded event, E model width, N heads, H head width.
"""

import dataclasses
from typing import NamedTuple

import jax
import numpy as np
import onnx
import onnxruntime
from flax import nnx

from s2s_jax.exporting.onnx_graph import Graph, Value
from s2s_jax.exporting.tower import Tower
from s2s_jax.model.attention import ROPE_BASE
from s2s_jax.model.loss import NORM_EPS
from s2s_jax.model.transformer import LAYER_NORM_EPS, CausalAttention, FeedForward
from s2s_jax.version import __version__

# Finite, so that subtracting masked scores never gives NaN.
_MASKED = np.float32(-1e30)
# Number of events in the comparison with JAX, and how much results may differ, by rounding alone.
_COMPARED_EVENTS, _MOST_DIFFERENCE = 64, 1e-3


class _Turns(NamedTuple):
    """Cosines and sines of the angles by which rotary positions turn queries and keys.

    Attributes:
      cos_LH: f32 `[L, H/2]`.
      sin_LH: f32 `[L, H/2]`.
    """

    cos_LH: Value
    sin_LH: Value


def to_onnx(tower: Tower) -> bytes:
    """Return a tower with its parameters as an ONNX model.

    Its inputs are f32 `events` `[B, L, D]` and int32 `length` `[B]`, its output is f32 `users` `[B, E]`,
    for any B and any L up to `model.seq_len`; see `Tower.users`. It computes in float32, whatever
    `model.dtype` is.
    """
    graph = Graph()
    users = _Writer(graph, tower).users("events", "length")
    data = graph.to_bytes(
        inputs={
            "events": (np.float32, ("B", "L", tower.width)),
            "length": (np.int32, ("B",)),
        },
        outputs={"users": (np.float32, ("B", tower.model.hidden_size))},
        results=[users],
        producer=("s2s_jax", __version__),
    )
    _compare(data, tower)
    return data


def _compare(data: bytes, tower: Tower) -> None:
    """Runs an ONNX model and the tower on the same random events."""
    exact = dataclasses.replace(tower, model=dataclasses.replace(tower.model, dtype="float32"))
    seq_len = min(tower.model.seq_len, _COMPARED_EVENTS)
    rng = np.random.default_rng(0)
    events_BLD = rng.normal(size=(3, seq_len, tower.width)).astype(np.float32)
    length_B = np.array([seq_len, 1, 0], np.int32)
    runtime = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    found_BE = np.asarray(runtime.run(["users"], {"events": events_BLD, "length": length_B})[0])
    # GPUs round the factors of products in float32 otherwise.
    with jax.default_matmul_precision("highest"):
        expected_BE = np.asarray(jax.jit(exact.users)(events_BLD, length_B))
    difference = np.abs(found_BE - expected_BE).max() / np.abs(expected_BE).max()
    assert difference < _MOST_DIFFERENCE, (
        f"ONNX and JAX differ by {difference:.1e} of the largest number"
    )


class _Writer:
    """Adds the nodes of a tower to a graph; methods take and return names of values."""

    def __init__(self, graph: Graph, tower: Tower):
        self._graph, self._model, self._loss = graph, tower.model, tower.loss
        self._module = tower.module()
        self._head_width = self._model.hidden_size // self._model.nhead

    def users(self, events_BLD: Value, length_B: Value) -> Value:
        """Add all nodes; return the `[B, E]` result of `Tower.users`."""
        add, zero = self._graph.add, self._graph.scalar(np.float32(0))
        transformer = self._module.transformer
        position_L = self._positions(events_BLD)
        length_B1 = add("Unsqueeze", length_B, self._graph.ints(1))
        real_BL1 = add("Unsqueeze", add("Less", position_L, length_B1), self._graph.ints(2))
        x = self._input(add("Where", real_BL1, events_BLD, zero), position_L)
        seen_LL = self._seen(position_L)
        turns = self._turns(position_L) if self._model.position == "rope" else None
        kind, stacked = nnx.split(transformer.layers)
        for index in range(self._model.num_layers):
            name = f"layers.{index}"
            layer = nnx.merge(kind, jax.tree.map(lambda of_all, i=index: of_all[i], stacked))
            norm_BLE = self._norm(f"{name}.norm1", layer.norm1, x)
            x = add("Add", x, self._attention(f"{name}.attn", layer.attn, norm_BLE, seen_LL, turns))
            if index == self._model.num_layers - 1:
                # Nothing more is needed of earlier events.
                x = self._last(x, length_B1)
            norm = self._norm(f"{name}.norm2", layer.norm2, x)
            x = add("Add", x, self._feed_forward(f"{name}.ffn", layer.ffn, norm))
        users_BE = self._comparable(self._norm("final_norm", transformer.final_norm, x))
        some_B1 = add("Greater", length_B1, self._graph.scalar(np.int32(0)))
        return add("Where", some_B1, users_BE, zero)

    def _positions(self, events_BLD: Value) -> Value:
        """Return int32 `[L]`: 0 to L - 1."""
        add, scalar = self._graph.add, self._graph.scalar
        seq_len_1 = add("Shape", events_BLD, start=1, end=2)
        seq_len = add("Cast", add("Squeeze", seq_len_1), to=onnx.TensorProto.INT32)
        return add("Range", scalar(np.int32(0)), seq_len, scalar(np.int32(1)))

    def _input(self, events_BLD: Value, position_L: Value) -> Value:
        """Return `[B, L, E]`: the input of the first layer."""
        transformer = self._module.transformer
        x_BLE = self._linear("proj", self._module.proj, events_BLD)
        if self._model.position == "learned":
            positions = self._parameter("positions", transformer.positions)
            learned_LE = self._graph.add("Gather", positions, position_L)
            x_BLE = self._graph.add("Add", x_BLE, learned_LE)
        if self._model.input_norm:
            x_BLE = self._norm("input_norm", transformer.input_norm, x_BLE)
        return x_BLE

    def _seen(self, position_L: Value) -> Value:
        """Return bool `[L, L]`: whether a position (first axis) sees another (second axis)."""
        query_L1 = self._graph.add("Unsqueeze", position_L, self._graph.ints(1))
        return self._graph.add("GreaterOrEqual", query_L1, position_L)

    def _turns(self, position_L: Value) -> _Turns:
        """Return the result of `attention.rotation`."""
        add = self._graph.add
        pair_H = np.arange(self._head_width // 2, dtype=np.float32)
        speed_H = np.float32(ROPE_BASE) ** (-2 * pair_H / np.float32(self._head_width))
        position_L1 = add("Unsqueeze", position_L, self._graph.ints(1))
        position_L1 = add("Cast", position_L1, to=onnx.TensorProto.FLOAT)
        angle_LH = add("Mul", position_L1, self._graph.parameter("speed", speed_H))
        return _Turns(add("Cos", angle_LH), add("Sin", angle_LH))

    def _feed_forward(self, name: str, ffn: FeedForward, x: Value) -> Value:
        hidden = self._graph.add("Gelu", self._linear(f"{name}.up", ffn.up, x))
        return self._linear(f"{name}.down", ffn.down, hidden)

    def _attention(
        self,
        name: str,
        attention: CausalAttention,
        x_BLE: Value,
        seen_LL: Value,
        turns: _Turns | None,
    ) -> Value:
        add, heads = self._graph.add, self._model.nhead
        qkv_BLE = self._linear(f"{name}.qkv", attention.qkv, x_BLE)
        parts = self._graph.ints(0, 0, 3 * heads, self._head_width)
        qkv_BLNH = add("Reshape", qkv_BLE, parts)
        qkv_BNLH = add("Transpose", qkv_BLNH, perm=(0, 2, 1, 3))
        queries_keys, v_BNLH = self._graph.add_several(
            "Split", 2, qkv_BNLH, self._graph.ints(2 * heads, heads), axis=1
        )
        if turns is not None:
            queries_keys = self._rotated(queries_keys, turns)
        q_BNLH, k_BNLH = self._graph.add_several("Split", 2, queries_keys, axis=1, num_outputs=2)
        k_BNHL = add("Transpose", k_BNLH, perm=(0, 1, 3, 2))
        scale = self._graph.scalar(np.float32(self._head_width**-0.5))
        scores_BNLL = add("Mul", add("MatMul", q_BNLH, k_BNHL), scale)
        scores_BNLL = add("Where", seen_LL, scores_BNLL, self._graph.scalar(_MASKED))
        out_BNLH = add("MatMul", add("Softmax", scores_BNLL, axis=-1), v_BNLH)
        out_BLNH = add("Transpose", out_BNLH, perm=(0, 2, 1, 3))
        out_BLE = add("Reshape", out_BLNH, self._graph.ints(0, 0, self._model.hidden_size))
        return self._linear(f"{name}.proj", attention.proj, out_BLE)

    def _rotated(self, x_BNLH: Value, turns: _Turns) -> Value:
        """Return the result of `attention.rotate`."""
        add = self._graph.add
        one, other = self._graph.add_several("Split", 2, x_BNLH, axis=-1, num_outputs=2)
        turned_one = add("Sub", add("Mul", one, turns.cos_LH), add("Mul", other, turns.sin_LH))
        turned_other = add("Add", add("Mul", other, turns.cos_LH), add("Mul", one, turns.sin_LH))
        return add("Concat", turned_one, turned_other, axis=-1)

    def _last(self, x_BLE: Value, length_B1: Value) -> Value:
        """Return `[B, E]`: the vectors of the last events; of the first places without events."""
        add = self._graph.add
        one = self._graph.ints(1)
        last_B1 = add("Sub", add("Cast", length_B1, to=onnx.TensorProto.INT64), one)
        end_1 = add("Sub", add("Shape", x_BLE, start=1, end=2), one)
        last_B1 = add("Max", add("Min", last_B1, end_1), self._graph.ints(0))
        return add("GatherND", x_BLE, last_B1, batch_dims=1)

    def _comparable(self, x_BE: Value) -> Value:
        """Return the result of `loss.comparable`."""
        if self._loss.similarity == "dot":
            return x_BE
        add = self._graph.add
        square_B1 = add("ReduceSum", add("Mul", x_BE, x_BE), self._graph.ints(1), keepdims=1)
        least = self._graph.scalar(np.float32(NORM_EPS**2))
        return add("Div", x_BE, add("Sqrt", add("Max", square_B1, least)))

    def _linear(self, name: str, linear: nnx.Linear, x: Value) -> Value:
        kernel = self._parameter(f"{name}.kernel", linear.kernel)
        bias = self._parameter(f"{name}.bias", linear.bias)
        return self._graph.add("Add", self._graph.add("MatMul", x, kernel), bias)

    def _norm(self, name: str, norm: nnx.LayerNorm, x_BLE: Value) -> Value:
        scale = self._parameter(f"{name}.scale", norm.scale)
        bias = self._parameter(f"{name}.bias", norm.bias)
        return self._graph.add(
            "LayerNormalization", x_BLE, scale, bias, axis=-1, epsilon=LAYER_NORM_EPS
        )

    def _parameter(self, name: str, parameter: nnx.Param | None) -> Value:
        assert parameter is not None, f"{name}: the model has this parameter"
        return self._graph.parameter(name, np.asarray(parameter[...], np.float32))
