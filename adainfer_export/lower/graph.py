"""Small helpers on onnx_ir graphs that the lowerings share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ..graph_builder import CONTRIB

__all__ = [
    "CONTRIB",
    "Linear",
    "add_initializer",
    "count_ops",
    "find_linears",
    "insert_before",
    "ints",
    "only_user",
    "remove_dead_inputs",
    "remove_dead_nodes",
    "scalar",
    "table",
    "take_over",
]


@dataclass(frozen=True)
class Linear:
    """`y = x Wᵀ (+ b)`: the nodes that compute it, and the names of its checkpoint tensors."""

    matmul: ir.Node
    bias_add: ir.Node | None
    weight: ir.Value
    bias: ir.Value | None

    @property
    def input(self) -> ir.Value:
        """X `[batch, tokens, in]`."""
        value = self.matmul.inputs[0]
        assert value is not None  # a MatMul node always has both inputs
        return value

    @property
    def output(self) -> ir.Value:
        """Y `[batch, tokens, out]`."""
        return (self.bias_add or self.matmul).outputs[0]

    @property
    def out_features(self) -> int:
        """Rows of the weight."""
        return _static(self.weight, 0)

    @property
    def in_features(self) -> int:
        """Columns of the weight."""
        return _static(self.weight, 1)


def find_linears(graph: ir.Graph) -> Iterator[Linear]:
    """Every product with a transposed weight that has no value yet, in graph order."""
    for node in list(graph):
        if node.op_type != "MatMul" or node.inputs[1] is None:
            continue
        transpose = node.inputs[1].producer()
        if transpose is None or transpose.op_type != "Transpose":
            continue
        weight = transpose.inputs[0]
        if weight is None or not weight.is_initializer() or weight.const_value is not None:
            continue
        bias_add, bias = _bias_of(node)
        yield Linear(node, bias_add, weight, bias)


def _bias_of(node: ir.Node) -> tuple[ir.Node | None, ir.Value | None]:
    user = only_user(node.outputs[0])
    if user is None or user.op_type != "Add":
        return None, None
    for value in user.inputs:
        if value is not None and value.is_initializer() and value.const_value is None:
            return user, value
    return None, None


def only_user(value: ir.Value) -> ir.Node | None:
    """The node that uses the value, if it is exactly one and the value is no graph output."""
    users = tuple(value.uses())
    if len(users) != 1 or value.is_graph_output():
        return None
    node: ir.Node = users[0].node
    return node


def insert_before(anchor: ir.Node, nodes: list[ir.Node]) -> None:
    """Puts nodes into the anchor's graph, right before it."""
    graph = anchor.graph
    assert graph is not None  # anchors are always nodes found in a graph
    graph.insert_before(anchor, nodes)


def add_initializer(graph: ir.Graph, name: str, dtype: ir.DataType, shape: list[int]) -> ir.Value:
    """An initialiser without a value; the writer fills it in. Equal names are the same one."""
    if name in graph.initializers:
        return graph.initializers[name]
    value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))
    graph.initializers[name] = value
    return value


def ints(graph: ir.Graph, kind: str, values: list[int]) -> ir.Value:
    """An int64 initialiser with a value; equal ones are the same."""
    name = "_".join([kind, *(str(value).replace("-", "m") for value in values)])
    value = add_initializer(graph, name, ir.DataType.INT64, [len(values)])
    value.const_value = ir.tensor(values, dtype=ir.DataType.INT64, name=name)
    return value


def scalar(graph: ir.Graph, name: str, number: np.generic) -> ir.Value:
    """An initialiser with a value and no dimension; equal names are the same one."""
    return table(graph, name, np.asarray(number))


def table(graph: ir.Graph, name: str, values: npt.NDArray[np.generic]) -> ir.Value:
    """An initialiser with values; equal names are the same one."""
    tensor = ir.tensor(values, name=name)
    value = add_initializer(graph, name, tensor.dtype, list(values.shape))
    value.const_value = tensor
    return value


def remove_dead_nodes(graph: ir.Graph) -> None:
    """Drops nodes, initialisers and (by name) nothing else that no output needs."""
    for node in reversed(list(graph)):
        if all(not out.uses() and not out.is_graph_output() for out in node.outputs):
            graph.remove(node, safe=True)
    for name, value in list(graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del graph.initializers[name]


def remove_dead_inputs(graph: ir.Graph) -> None:
    """Drops nodes that no output needs, then the inputs that no node reads. (TensorRT ignores such
    inputs, which at other places is a mistake of its parser: no build may tell the two apart.)
    """
    remove_dead_nodes(graph)
    for value in list(graph.inputs):
        if not value.uses() and not value.is_graph_output():
            graph.inputs.remove(value)


def take_over(old: ir.Value, new: ir.Value) -> None:
    """The new value takes the old one's place, name and all, also as a graph output."""
    new.type, new.shape, name = old.type, old.shape, old.name
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
    if name:
        old.name, new.name = f"{name}.replaced", name


def count_ops(graph: ir.Graph, op_type: str, domain: str | None = None) -> int:
    """Number of nodes of an operator, of any domain unless one is given."""
    return sum(1 for node in graph if node.op_type == op_type and domain in (None, node.domain))


def _static(value: ir.Value, axis: int) -> int:
    assert value.shape is not None  # weights come from the frontend with static shapes
    size = value.shape[axis]
    assert isinstance(size, int)
    return size
