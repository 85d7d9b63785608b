"""Writes the layers of a tower as nodes of an ONNX graph.

Shapes: B batch, L positions, E model width, N heads, H head width.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import onnx
from flax import nnx

from s2s_jax.config import ModelConfig
from s2s_jax.exporting.onnx_graph import Graph, Value
from s2s_jax.model.distance_bias import bias_of_distances
from s2s_jax.model.hstu import GatedAttention, HSTULayer
from s2s_jax.model.layers import CausalAttention, FeedForward, Heads, Layer
from s2s_jax.model.norms import LAYER_NORM_EPS, LENGTH_EPS, Norm
from s2s_jax.model.positions import ROPE_BASE

# Finite, so that subtracting masked scores never gives NaN.
_MASKED = np.float32(-1e30)


class Turns(NamedTuple):
    """Cosines and sines of the angles by which rotary positions turn queries and keys.

    Attributes:
      cos_LH: f32 `[L, H/2]`.
      sin_LH: f32 `[L, H/2]`.
    """

    cos_LH: Value
    sin_LH: Value


class Seen(NamedTuple):
    """What layers need to know about positions.

    Attributes:
      seen_LL: bool `[L, L]`, whether a position (first axis) sees another (second axis).
      distance_LL: int32 `[L, L]`, the distance from a position back to another, zero if it is later;
        None without a bias of distances.
      bucket_BLL: int64 `[B, L, L]`, the bucket of the time gap from a position back to another; None
        without a bias of time gaps.
      turns: for rotary positions; None without them.
    """

    seen_LL: Value
    distance_LL: Value | None
    bucket_BLL: Value | None
    turns: Turns | None


class _Around(NamedTuple):
    """What is around a part of a layer.

    Attributes:
      name: the names of the modules, with %s for "norm" or "gate".
      norm: the norm before the part, or after the sum.
      gate: the linear layer of the gate; None without gated residuals.
    """

    name: str
    norm: Norm
    gate: nnx.Linear | None


class LayerWriter:
    """Adds the nodes of layers to a graph; methods take and return names of values."""

    def __init__(self, graph: Graph, model: ModelConfig):
        self._graph, self._model = graph, model
        self._head_width = model.hidden_size // model.nhead

    def seen(self, position_L: Value, time_BL: Value | None) -> Seen:
        """Return what all layers need of the positions, int32 `[L]`, and times, int32 `[B, L]`."""
        add = self._graph.add
        query_L1 = add("Unsqueeze", position_L, self._graph.ints(1))
        seen_LL = add("GreaterOrEqual", query_L1, position_L)
        distance_LL = None
        if self._model.distance_bias:
            difference_LL = add("Sub", query_L1, position_L)
            distance_LL = add("Max", difference_LL, self._graph.scalar(np.int32(0)))
        turns = self._turns(position_L) if self._model.position == "rope" else None
        bucket_BLL = None if time_BL is None else self._buckets(time_BL)
        return Seen(seen_LL, distance_LL, bucket_BLL, turns)

    def layer(
        self,
        name: str,
        layer: Layer | HSTULayer,
        x: Value,
        seen: Seen,
        choose: Callable[[Value], Value],
    ) -> Value:
        """Return the result of a layer.

        Args:
          name: the name of its parameters.
          layer: the layer.
          x: `[B, L, E]`.
          seen: from `seen`.
          choose: is applied to states after attention; the rest is computed for its result.
        """
        gated = self._model.gated_residuals
        first = _Around(f"{name}.%s1", layer.norm1, layer.gate1 if gated else None)
        if isinstance(layer, HSTULayer):
            before = self._before(first, x)
            added = self._gated_attention(f"{name}.attn", layer.attn, before, seen)
            return choose(self._sum(first, x, added))
        second = _Around(f"{name}.%s2", layer.norm2, layer.gate2 if gated else None)
        added = self._attention(f"{name}.attn", layer.attn, self._before(first, x), seen)
        x = choose(self._sum(first, x, added))
        added = self._feed_forward(f"{name}.ffn", layer.ffn, self._before(second, x))
        return self._sum(second, x, added)

    def linear(self, name: str, linear: nnx.Linear, x: Value) -> Value:
        """Return the result of a linear layer."""
        kernel = self.parameter(f"{name}.kernel", linear.kernel)
        bias = self.parameter(f"{name}.bias", linear.bias)
        return self._graph.add("Add", self._graph.add("MatMul", x, kernel), bias)

    def norm(self, name: str, norm: Norm, x: Value) -> Value:
        """Return the result of a norm of states."""
        add = self._graph.add
        scale = self.parameter(f"{name}.scale", norm.scale)
        if isinstance(norm, nnx.LayerNorm):
            bias = self.parameter(f"{name}.bias", norm.bias)
            return add("LayerNormalization", x, scale, bias, axis=-1, epsilon=LAYER_NORM_EPS)
        square = add("ReduceMean", add("Mul", x, x), self._graph.ints(-1), keepdims=1)
        least = self._graph.scalar(np.float32(LAYER_NORM_EPS))
        return add("Mul", add("Div", x, add("Sqrt", add("Add", square, least))), scale)

    def parameter(self, name: str, parameter: nnx.Param | None) -> Value:
        """Add a parameter under a name of its own."""
        assert parameter is not None, f"{name}: the model has this parameter"
        return self._graph.parameter(name, np.asarray(parameter[...], np.float32))

    def _before(self, around: _Around, x: Value) -> Value:
        """Return the input of a part of a layer."""
        if self._model.norm_placement == "post":
            return x
        return self.norm(around.name % "norm", around.norm, x)

    def _sum(self, around: _Around, x: Value, added: Value) -> Value:
        """Return the states after a part of a layer, whose output is `added`."""
        add = self._graph.add
        if around.gate is not None:
            gate = self.linear(around.name % "gate", around.gate, x)
            added = add("Mul", added, add("Sigmoid", gate))
        x = add("Add", x, added)
        if self._model.norm_placement == "pre":
            return x
        return self.norm(around.name % "norm", around.norm, x)

    def _turns(self, position_L: Value) -> Turns:
        """Return the result of `positions.rotation`."""
        add = self._graph.add
        pair_H = np.arange(self._head_width // 2, dtype=np.float32)
        speed_H = np.float32(ROPE_BASE) ** (-2 * pair_H / np.float32(self._head_width))
        position_L1 = add("Unsqueeze", position_L, self._graph.ints(1))
        position_L1 = add("Cast", position_L1, to=onnx.TensorProto.FLOAT)
        angle_LH = add("Mul", position_L1, self._graph.parameter("speed", speed_H))
        return Turns(add("Cos", angle_LH), add("Sin", angle_LH))

    def _buckets(self, time_BL: Value) -> Value:
        """Return the result of `time_bias.bucket_of` for all pairs of events."""
        add, scalar = self._graph.add, self._graph.scalar
        time_BL1 = add("Unsqueeze", time_BL, self._graph.ints(2))
        gap_BLL = add("Sub", time_BL1, add("Unsqueeze", time_BL, self._graph.ints(1)))
        gap_BLL = add("Max", gap_BLL, scalar(np.int32(0)))
        # In float64, adding 1/2 keeps rounding from moving a gap to another bucket.
        exact_BLL = add("Cast", gap_BLL, to=onnx.TensorProto.DOUBLE)
        log_BLL = add("Log", add("Add", exact_BLL, scalar(np.float64(0.5))))
        power_BLL = add("Floor", add("Div", log_BLL, scalar(np.log(np.float64(2)))))
        return add("Cast", add("Add", power_BLL, scalar(np.float64(1))), to=onnx.TensorProto.INT64)

    def _feed_forward(self, name: str, ffn: FeedForward, x: Value) -> Value:
        hidden = self.linear(f"{name}.up", ffn.up, x)
        if self._model.feed_forward == "swiglu":
            gate = self._silu(self.linear(f"{name}.gate", ffn.gate, x))
            hidden = self._graph.add("Mul", hidden, gate)
        else:
            hidden = self._graph.add("Gelu", hidden)
        return self.linear(f"{name}.down", ffn.down, hidden)

    def _attention(self, name: str, attention: CausalAttention, x_BLE: Value, seen: Seen) -> Value:
        qkv_BLE = self.linear(f"{name}.qkv", attention.qkv, x_BLE)
        out_BLE = self._heads(f"{name}.heads", attention.heads, qkv_BLE, seen)
        return self.linear(f"{name}.proj", attention.proj, out_BLE)

    def _gated_attention(
        self, name: str, attention: GatedAttention, x_BLE: Value, seen: Seen
    ) -> Value:
        add, width = self._graph.add, self._model.hidden_size
        uqkv_BLE = self._silu(self.linear(f"{name}.uqkv", attention.uqkv, x_BLE))
        u_BLE, qkv_BLE = self._graph.add_several(
            "Split", 2, uqkv_BLE, self._graph.ints(width, 3 * width), axis=2
        )
        out_BLE = self._heads(f"{name}.heads", attention.heads, qkv_BLE, seen)
        out_BLE = add("Mul", u_BLE, self.norm(f"{name}.norm", attention.norm, out_BLE))
        return self.linear(f"{name}.proj", attention.proj, out_BLE)

    def _heads(self, name: str, of_heads: Heads, qkv_BLE: Value, seen: Seen) -> Value:
        """Return the result of `Heads` for queries, keys and values next to each other."""
        add, heads = self._graph.add, self._model.nhead
        parts = self._graph.ints(0, 0, 3 * heads, self._head_width)
        qkv_BLNH = add("Reshape", qkv_BLE, parts)
        qkv_BNLH = add("Transpose", qkv_BLNH, perm=(0, 2, 1, 3))
        queries_keys, v_BNLH = self._graph.add_several(
            "Split", 2, qkv_BNLH, self._graph.ints(2 * heads, heads), axis=1
        )
        if self._model.qk_norm:
            queries_keys = self._to_length_one(queries_keys)
        if seen.turns is not None:
            queries_keys = self._rotated(queries_keys, seen.turns)
        q_BNLH, k_BNLH = self._graph.add_several("Split", 2, queries_keys, axis=1, num_outputs=2)
        k_BNHL = add("Transpose", k_BNLH, perm=(0, 1, 3, 2))
        if self._model.qk_norm:
            scale_N = np.asarray(of_heads.qk_scale[...], np.float32)
            scale = self._graph.parameter(f"{name}.qk_scale", scale_N[:, None, None])
        else:
            softmax = of_heads.weights == "softmax"
            scale = self._graph.scalar(np.float32(self._head_width**-0.5 if softmax else 1))
        scores_BNLL = add("Mul", add("MatMul", q_BNLH, k_BNHL), scale)
        if seen.distance_LL is not None:
            table_NS = of_heads.distance_bias[...]
            of_distances_NL = np.asarray(bias_of_distances(table_NS, self._model.seq_len))
            bias_NL = self._graph.parameter(f"{name}.distance_bias", of_distances_NL)
            scores_BNLL = add("Add", scores_BNLL, add("Gather", bias_NL, seen.distance_LL, axis=1))
        if seen.bucket_BLL is not None:
            table_NS = self.parameter(f"{name}.time_bias", of_heads.time_bias)
            bias_NBLL = add("Gather", table_NS, seen.bucket_BLL, axis=1)
            bias_BNLL = add("Transpose", bias_NBLL, perm=(1, 0, 2, 3))
            scores_BNLL = add("Add", scores_BNLL, bias_BNLL)
        out_BNLH = add("MatMul", self._weights(of_heads, scores_BNLL, seen), v_BNLH)
        out_BLNH = add("Transpose", out_BNLH, perm=(0, 2, 1, 3))
        return add("Reshape", out_BLNH, self._graph.ints(0, 0, self._model.hidden_size))

    def _weights(self, of_heads: Heads, scores_BNLL: Value, seen: Seen) -> Value:
        """Return `[B, N, L, L]`: the weights of values."""
        add, scalar = self._graph.add, self._graph.scalar
        if of_heads.weights == "silu":
            return add("Where", seen.seen_LL, self._silu(scores_BNLL), scalar(np.float32(0)))
        scores_BNLL = add("Where", seen.seen_LL, scores_BNLL, scalar(_MASKED))
        return add("Softmax", scores_BNLL, axis=-1)

    def _rotated(self, x_BNLH: Value, turns: Turns) -> Value:
        """Return the result of `positions.rotate`."""
        add = self._graph.add
        one, other = self._graph.add_several("Split", 2, x_BNLH, axis=-1, num_outputs=2)
        turned_one = add("Sub", add("Mul", one, turns.cos_LH), add("Mul", other, turns.sin_LH))
        turned_other = add("Add", add("Mul", other, turns.cos_LH), add("Mul", one, turns.sin_LH))
        return add("Concat", turned_one, turned_other, axis=-1)

    def _to_length_one(self, x_BNLH: Value) -> Value:
        """Return the result of `norms.to_length_one`."""
        add = self._graph.add
        square_BNL1 = add("ReduceSum", add("Mul", x_BNLH, x_BNLH), self._graph.ints(-1), keepdims=1)
        least = self._graph.scalar(np.float32(LENGTH_EPS))
        return add("Div", x_BNLH, add("Sqrt", add("Add", square_BNL1, least)))

    def _silu(self, x: Value) -> Value:
        return self._graph.add("Mul", x, self._graph.add("Sigmoid", x))
