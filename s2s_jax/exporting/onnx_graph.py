"""Collects the nodes and constants of an ONNX graph, and makes a file of them.

The extra `export` installs ONNX.
"""

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import numpy as np
import onnx
from onnx import helper, numpy_helper

# The newest operators that the graph uses are of this version, which ONNX Runtime has since 1.17.
_OPSET = 20
# The version of the file format that came with it.
_IR_VERSION = 9

Attribute: TypeAlias = int | float | str | Sequence[int]
# The name of a value in the graph.
Value: TypeAlias = str


class Graph:
    """A graph that is built node by node; a node takes values by their names."""

    def __init__(self):
        self._nodes: list[onnx.NodeProto] = []
        self._constants: dict[str, onnx.TensorProto] = {}

    def parameter(self, name: str, array: np.ndarray) -> Value:
        """Add an array under a name of its own."""
        assert name not in self._constants, f"two parameters are called {name}"
        self._constants[name] = numpy_helper.from_array(array, name)
        return name

    def scalar(self, value: np.generic) -> Value:
        """Add a number, which keeps its type, unless the graph has it."""
        name = f"{value.dtype}_{value}"
        self._constants[name] = numpy_helper.from_array(np.asarray(value), name)
        return name

    def ints(self, *values: int) -> Value:
        """Add int64 `[…]`, such as a shape or axes, unless the graph has it."""
        name = "_".join(["ints", *map(str, values)])
        self._constants[name] = numpy_helper.from_array(np.array(values, np.int64), name)
        return name

    def add(self, operator: str, *values: Value, **attributes: Attribute) -> Value:
        """Add a node with one result."""
        return self.add_several(operator, 1, *values, **attributes)[0]

    def add_several(
        self, operator: str, results: int, *values: Value, **attributes: Attribute
    ) -> list[Value]:
        """Add a node with several results."""
        name = f"{operator}_{len(self._nodes)}"
        names = [name] if results == 1 else [f"{name}_{i}" for i in range(results)]
        node = helper.make_node(operator, values, names, name=name)
        node.attribute.extend(helper.make_attribute(key, x) for key, x in attributes.items())
        self._nodes.append(node)
        return names

    def to_bytes(
        self,
        inputs: Mapping[str, tuple[type, Sequence[int | str]]],
        outputs: Mapping[str, tuple[type, Sequence[int | str]]],
        results: Sequence[Value],
        producer: tuple[str, str],
    ) -> bytes:
        """Return a checked ONNX model; the same graph always gives the same bytes.

        Args:
          inputs: the type and shape of each input; sizes with a name may differ from call to call.
          outputs: the same for each output.
          results: the values that the outputs are.
          producer: the name and the version of what makes the file.
        """
        for value, output in zip(results, outputs, strict=True):
            self._nodes.append(helper.make_node("Identity", [value], [output], name=output))
        graph = helper.make_graph(
            self._nodes,
            "tower",
            [_described(name, *kind) for name, kind in inputs.items()],
            [_described(name, *kind) for name, kind in outputs.items()],
            initializer=list(self._constants.values()),
        )
        model = helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", _OPSET)],
            ir_version=_IR_VERSION,
            producer_name=producer[0],
            producer_version=producer[1],
        )
        onnx.checker.check_model(model, full_check=True)
        return model.SerializeToString(deterministic=True)


def _described(name: str, dtype: type, shape: Sequence[int | str]) -> onnx.ValueInfoProto:
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    return helper.make_tensor_value_info(name, kind, list(shape))
