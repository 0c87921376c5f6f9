"""Gives a lowered stage its 16-bit types: strongly typed, casts where types meet.

The residual stream stays float32, and so do the additions onto it and the norms that read it:
activations of some models leave float16's range there, and exit points, adapters and the probe read
it. Everything else (products, attention, activation functions) gets the precision's type.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir

from ..weights import AsIs, Dense, ElementName, Rows, WeightExpr
from .graph import insert_before

__all__ = ["narrow_initializer", "set_activation_type"]

_NORMS = ("RMSNormalization", "LayerNormalization", "SimplifiedLayerNormalization")
_FLOAT = ir.DataType.FLOAT
_NAMES: dict[ir.DataType, ElementName] = {
    ir.DataType.FLOAT16: "float16",
    ir.DataType.BFLOAT16: "bfloat16",
}


def set_activation_type(
    graph: ir.Graph, dtype: ir.DataType, weights: dict[str, WeightExpr]
) -> None:
    """Converts a stage whose values are float32 in place; `weights` gets the new element types.

    Its first input is the residual stream. Inputs of other types keep them.
    """
    if dtype == _FLOAT:
        return
    wide_values = {graph.inputs[0]}
    wide_nodes = _residual_nodes(graph, wide_values)
    casts: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}
    for node in list(graph):
        wanted = _FLOAT if node in wide_nodes else dtype
        for index, value in enumerate(node.inputs):
            if value is None:
                continue
            if value.is_initializer():
                if wanted == dtype:
                    narrow_initializer(value, dtype, weights)
                continue
            found = _FLOAT if value in wide_values else value.dtype
            if value.producer() is None and found != _FLOAT:
                continue  # a graph input of its own type: mask, indices, rotary rows
            if value.producer() is not None and value not in wide_values:
                found = dtype if _is_float(value) else None
            if found is not None and found != wanted:
                node.replace_input_with(index, _cast(graph, node, value, wanted, casts))
        for output in node.outputs:
            if _is_float(output):
                output.type = ir.TensorType(wanted)
    _restore_outputs(graph, wide_values, dtype)


def _residual_nodes(graph: ir.Graph, wide: set[ir.Value]) -> set[ir.Node]:
    """Additions onto the stream and norms of it; `wide` grows by the values on it."""
    nodes: set[ir.Node] = set()
    for node in graph:
        inputs = [value for value in node.inputs if value is not None]
        if node.op_type == "Add" and any(value in wide for value in inputs):
            if any(value.is_initializer() for value in inputs):
                continue
        elif not (node.op_type in _NORMS and inputs[0] in wide):
            continue
        nodes.add(node)
        if node.op_type == "Add":
            wide.add(node.outputs[0])
    norms = [node for node in nodes if node.op_type in _NORMS]
    wide.update(node.outputs[0] for node in norms)
    return nodes


def _cast(
    graph: ir.Graph,
    user: ir.Node,
    value: ir.Value,
    dtype: ir.DataType,
    casts: dict[tuple[ir.Value, ir.DataType], ir.Value],
) -> ir.Value:
    key = (value, dtype)
    if key not in casts:
        node = ir.Node("", "Cast", [value], [ir.AttrInt64("to", dtype.value)])
        node.outputs[0].type, node.outputs[0].shape = ir.TensorType(dtype), value.shape
        insert_before(user, [node])
        casts[key] = node.outputs[0]
    return casts[key]


def narrow_initializer(value: ir.Value, dtype: ir.DataType, weights: dict[str, WeightExpr]) -> None:
    """Gives a float32 initialiser, with a value or without one yet, another type."""
    if value.dtype != _FLOAT:
        return
    assert value.name is not None  # initialisers are keyed by name
    value.type = ir.TensorType(dtype)
    if value.const_value is not None:
        array = np.asarray(value.const_value.numpy()).astype(dtype.numpy())
        value.const_value = ir.tensor(array, dtype=dtype, name=value.name)
        return
    expr = weights.get(value.name, Dense((value.name,)))
    assert not isinstance(expr, AsIs | Rows)  # of dialects that narrow nothing
    weights[value.name] = replace(expr, dtype=_NAMES[dtype])


def _restore_outputs(graph: ir.Graph, wide: set[ir.Value], dtype: ir.DataType) -> None:
    """The stream leaves the stage in float32, whatever node it came from."""
    output = graph.outputs[0]
    if output in wide or not _is_float(output):
        return
    node = ir.Node("", "Cast", [output], [ir.AttrInt64("to", _FLOAT.value)])
    name, shape = output.name, output.shape
    graph.append(node)
    output.name, output.type = f"{name}.{_NAMES[dtype]}", ir.TensorType(dtype)
    result = node.outputs[0]
    result.name, result.type, result.shape = name, ir.TensorType(_FLOAT), shape
    graph.outputs[0] = result


def _is_float(value: ir.Value) -> bool:
    # Values that a lowering made carry no type; those that are no floats are never cast.
    return value.dtype in (None, _FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
