"""What a graph costs to run, in multiply-adds."""

from __future__ import annotations

import math

import onnx_ir as ir

__all__ = ["multiply_adds"]


def multiply_adds(graph: ir.Graph) -> int:
    """Of one position through the graph's weight matrices (attention's own products depend on
    the context and are counted by the runtime; norms and activations are not counted). Zeros that
    `padding` adds to a matrix are multiplied like any others, and are counted.
    """
    return sum(_of_node(node) for node in graph)


def _of_node(node: ir.Node) -> int:
    if node.op_type == "MatMulNBits":
        return node.attributes["K"].as_int() * node.attributes["N"].as_int()
    if node.op_type not in ("MatMul", "Gemm"):
        return 0
    weight = node.inputs[1]
    source = weight.producer() if weight is not None else None
    if source is not None and source.op_type in ("DequantizeLinear", "Cast"):
        weight = source.inputs[0]
    if weight is None or weight.shape is None or len(weight.shape) != 2:
        return 0
    producer = weight.producer()
    cut = producer is not None and producer.op_type == "Slice"
    stored = producer.inputs[0] if producer is not None and cut else weight
    if stored is None or stored.const_value is None:
        return 0
    return math.prod(weight.shape.numpy())
