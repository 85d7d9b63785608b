"""Writes a tower as ONNX, which ONNX Runtime runs without JAX.

The graph is written operator by operator instead of being translated from JAX: that takes no further
package, gives the fused operators for layer norms, softmax and GELU, and leaves B and L open. It must
compute what `Tower.users` computes; `to_onnx` compares the two.

Shapes: B batch, L positions, D width of an embedded event, E model width.
"""

import dataclasses

import jax
import numpy as np
import onnx
import onnxruntime
from flax import nnx

from s2s_jax.exporting.onnx_graph import Graph, Value
from s2s_jax.exporting.onnx_layers import LayerWriter
from s2s_jax.exporting.tower import Tower
from s2s_jax.model.loss import NORM_EPS
from s2s_jax.version import __version__

# Number of events in the comparison with JAX, and how much results may differ, by rounding alone.
_COMPARED_EVENTS, _MOST_DIFFERENCE = 64, 1e-3


def to_onnx(tower: Tower) -> bytes:
    """Return a tower with its parameters as an ONNX model.

    Its inputs are f32 `events` `[B, L, D]`, int32 `length` `[B]` and, if the tower is timed, int32
    `times` `[B, L]`. Its output is f32 `users` `[B, E]`, for any B and any L up to `model.seq_len`; see
    `Tower.users`. It computes in float32, whatever `model.dtype` is.
    """
    graph = Graph()
    times = {"times": (np.int32, ("B", "L"))} if tower.timed else {}
    users = _Writer(graph, tower).users("events", "length", *times)
    data = graph.to_bytes(
        inputs={
            "events": (np.float32, ("B", "L", tower.width)),
            "length": (np.int32, ("B",)),
            **times,
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
    given = {"events": events_BLD, "length": length_B}
    if tower.timed:
        gap_BL = rng.integers(0, 2 ** rng.integers(25, size=(3, seq_len)))
        given["times"] = gap_BL.cumsum(axis=1).astype(np.int32)
    runtime = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    found_BE = np.asarray(runtime.run(["users"], given)[0])
    # GPUs round the factors of products in float32 otherwise.
    with jax.default_matmul_precision("highest"):
        expected_BE = np.asarray(jax.jit(exact.users)(*given.values()))
    difference = np.abs(found_BE - expected_BE).max() / np.abs(expected_BE).max()
    assert difference < _MOST_DIFFERENCE, (
        f"ONNX and JAX differ by {difference:.1e} of the largest number"
    )


class _Writer:
    """Adds the nodes of a tower to a graph; methods take and return names of values."""

    def __init__(self, graph: Graph, tower: Tower):
        self._graph, self._model, self._loss = graph, tower.model, tower.loss
        self._module = tower.module()
        self._layers = LayerWriter(graph, tower.model)

    def users(self, events_BLD: Value, length_B: Value, time_BL: Value | None = None) -> Value:
        """Add all nodes; return the `[B, E]` result of `Tower.users`."""
        add, zero = self._graph.add, self._graph.scalar(np.float32(0))
        transformer = self._module.transformer
        position_L = self._positions(events_BLD)
        length_B1 = add("Unsqueeze", length_B, self._graph.ints(1))
        real_BL1 = add("Unsqueeze", add("Less", position_L, length_B1), self._graph.ints(2))
        x = self._input(add("Where", real_BL1, events_BLD, zero), position_L)
        seen = self._layers.seen(position_L, time_BL)
        kind, stacked = nnx.split(transformer.layers)
        for index in range(self._model.num_layers):
            layer = nnx.merge(kind, jax.tree.map(lambda of_all, i=index: of_all[i], stacked))
            is_last = index == self._model.num_layers - 1

            def choose(x_BLE: Value, is_last: bool = is_last) -> Value:
                # Nothing more is needed of earlier events.
                return self._last(x_BLE, length_B1) if is_last else x_BLE

            x = self._layers.layer(f"layers.{index}", layer, x, seen, choose)
        if self._model.norm_placement == "pre":
            x = self._layers.norm("final_norm", transformer.final_norm, x)
        users_BE = self._comparable(x)
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
        x_BLE = self._layers.linear("proj", self._module.proj, events_BLD)
        if self._model.position == "learned":
            positions = self._layers.parameter("positions", transformer.positions)
            learned_LE = self._graph.add("Gather", positions, position_L)
            x_BLE = self._graph.add("Add", x_BLE, learned_LE)
        if self._model.input_norm:
            x_BLE = self._layers.norm("input_norm", transformer.input_norm, x_BLE)
        return x_BLE

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
