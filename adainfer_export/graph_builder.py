"""A thin builder of ONNX graphs: for the probe's features and the exit graph's models."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx_ir.tape import Tape

__all__ = ["CONTRIB", "GraphBuilder", "graph_input", "serialise"]

CONTRIB = "com.microsoft"
# The lowest opset that the operators need: ONNX Runtime's CUDA provider has kernels for it (see
# `lower.cuda`), and TensorRT 10.3 reads it.
_OPSET, _IR_VERSION = 18, 10


class GraphBuilder:
    """Appends nodes; constants are float32 unless said otherwise."""

    def __init__(self) -> None:
        self._tape = Tape()
        self._constants: dict[str, ir.Value] = {}
        self._contrib = False

    def contrib(self, op_type: str, *inputs: ir.Value, **attributes: int | float) -> ir.Value:
        """A node of ONNX Runtime's own operators."""
        self._contrib = True
        return self._tape.op(op_type, list(inputs), attributes=attributes, domain=CONTRIB)

    def op(self, op_type: str, *inputs: ir.Value, **attributes: int | float) -> ir.Value:
        """A node with one output."""
        return self._tape.op(op_type, list(inputs), attributes=attributes or None)

    def top_two(self, value: ir.Value) -> tuple[ir.Value, ir.Value]:
        """The two largest along the last axis, and where they are; of equal ones the first."""
        values, places = self._tape.op_multi_out("TopK", [value, self.ints([2])], num_outputs=2)
        return values, places

    def top(self, values: ir.Value, count: int) -> ir.Value:
        """Where the largest are along the last axis."""
        _, places = self._tape.op_multi_out("TopK", [values, self.ints([count])], num_outputs=2)
        return places

    def const(self, name: str, values: npt.ArrayLike) -> ir.Value:
        """A float32 initialiser; the name must be new."""
        return self._add(name, np.asarray(values, np.float32))

    def half(self, name: str, values: npt.ArrayLike) -> ir.Value:
        """A float16 initialiser, as float32: half the file, the same arithmetic."""
        return self.cast(self._add(name, np.asarray(values, np.float16)))

    def ints(self, values: list[int]) -> ir.Value:
        """An int64 initialiser; equal ones are the same."""
        return self._add("ints_" + "_".join(map(str, values)), np.array(values, np.int64))

    def index(self, name: str, values: list[int]) -> ir.Value:
        """A long int64 initialiser."""
        return self._add(name, np.array(values, np.int64))

    def codes(self, name: str, values: npt.NDArray[np.uint8]) -> ir.Value:
        """A uint8 initialiser."""
        return self._add(name, values)

    def bools(self, name: str, values: npt.ArrayLike) -> ir.Value:
        """A boolean initialiser."""
        return self._add(name, np.asarray(values, np.bool_))

    def scalar(self, value: int) -> ir.Value:
        """An int64 without dimensions; equal ones are the same."""
        return self._add(f"scalar_{value}", np.array(value, np.int64))

    def shared(self, stored: ir.Value) -> ir.Value:
        """An initialiser that another graph of the same folder has too: a reference, no copy."""
        name = str(stored.name)
        if name not in self._constants:
            assert stored.const_value is not None  # it is an initialiser there
            self._constants[name] = self._tape.initializer(stored.const_value, name=name)
        return self._constants[name]

    def transpose(self, value: ir.Value, order: list[int]) -> ir.Value:
        """Axes in another order."""
        return self._tape.op("Transpose", [value], attributes={"perm": order})

    def number(self, value: float) -> ir.Value:
        """A float32 of shape `[1]`; equal ones are the same."""
        return self._add(f"number_{value!r}", np.array([value], np.float32))

    def column(self, value: ir.Value) -> ir.Value:
        """`[n]` to `[n, 1]`."""
        return self.op("Unsqueeze", value, self.ints([-1]))

    def row(self, value: ir.Value) -> ir.Value:
        """`[n, 1]` to `[n]`."""
        return self.op("Squeeze", value, self.ints([-1]))

    def cast(self, value: ir.Value) -> ir.Value:
        """To float32."""
        return self.op("Cast", value, to=ir.DataType.FLOAT.value)

    def output(
        self,
        value: ir.Value,
        name: str,
        shape: list[int | str],
        dtype: ir.DataType = ir.DataType.FLOAT,
    ) -> ir.Value:
        """Names a node's result, which becomes an output of the graph."""
        value.name, value.type, value.shape = name, ir.TensorType(dtype), ir.Shape(shape)
        return value

    def append_to(self, graph: ir.Graph) -> None:
        """Puts what was built behind the nodes of an existing graph."""
        for value in self._tape.initializers:
            graph.register_initializer(value)
        graph.extend(self._tape.nodes)

    def model(
        self, name: str, inputs: list[ir.Value], outputs: list[ir.Value], opset: int = _OPSET
    ) -> ir.Model:
        """The finished model."""
        graph = ir.Graph(
            inputs,
            outputs,
            nodes=self._tape.nodes,
            initializers=self._tape.initializers,
            opset_imports={"": opset} | ({CONTRIB: 1} if self._contrib else {}),
            name=name,
        )
        return ir.Model(graph, ir_version=_IR_VERSION, producer_name="adainfer-export")

    def _add(self, name: str, values: npt.NDArray[np.generic]) -> ir.Value:
        if name not in self._constants:
            tensor = ir.tensor(values, name=name)
            self._constants[name] = self._tape.initializer(tensor, name=name)
        return self._constants[name]


def graph_input(
    name: str, shape: list[int | str], dtype: ir.DataType = ir.DataType.FLOAT
) -> ir.Value:
    """An input of a graph."""
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))


def serialise(model: ir.Model) -> bytes:
    """The model as ONNX; external tensors stay references."""
    content: bytes = ir.to_proto(model).SerializeToString()
    return content
