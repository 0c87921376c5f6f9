"""The `ort-cuda` dialect: that of `ort-cpu` in 16 bits.

Inside an engine all activations have the precision's type, so that the fused operators of ONNX
Runtime apply; the residual stream crosses engines in float32. Embedding and LM head are those of
the standard dialects: one 16-bit table.

ONNX Runtime's CUDA provider must take every node of a stage, and leaves two kinds to the CPU:

- Operators whose newest form at the stage's opset it has no kernel for. A kernel that is registered
  from a version on does not serve the operator's next version, and several lag behind: Equal stands
  at opset 13, Pad and ReduceMax at 18, and some releases have no Cast or Reshape of 24
  (microsoft/onnxruntime#28368). So stages have the lowest opset that their operators need,
  `OPSET`, and GELU is the operator that ONNX Runtime had before ONNX did, in opset 20.
- What is computed from a Shape or Size, whose result lies in host memory. So there is none:
  positions are given (see `attention`).
"""

from __future__ import annotations

import onnx_ir as ir

from ..weights import WeightExpr
from . import ort, standard
from .element_types import narrow_initializer
from .graph import CONTRIB, insert_before, remove_dead_nodes, take_over
from .precision import Precision

__all__ = ["OPSET", "fuse_joined", "lower_candidates", "lower_layers", "lower_probe"]

OPSET = 18  # the first with Split and reductions as they are used here

Weights = dict[str, WeightExpr]
_FLOAT = ir.DataType.FLOAT


def lower_layers(graph: ir.Graph, precision: Precision) -> Weights:
    """Lowers a stage of decoder layers in place; returns what its new initialisers hold."""
    weights = ort.lower_layers(graph, precision)
    _contrib_norms(graph)
    _contrib_gelus(graph)
    _narrow(graph, precision.activation_type, weights)
    return weights


def lower_probe(graph: ir.Graph, precision: Precision) -> Weights:
    """Final norm in float32, LM head in float16, features in float32."""
    weights = standard.lower_probe(graph, precision)
    _contrib_norms(graph)
    return weights


def lower_candidates(graph: ir.Graph, precision: Precision) -> Weights:
    """The same for some rows of the head."""
    weights = standard.lower_candidates(graph, precision)
    _contrib_norms(graph)
    return weights


def fuse_joined(graph: ir.Graph) -> None:
    """Drops the casts at the seams of joined stages; additions and norms there become one."""
    for cast in [node for node in graph if node.op_type == "Cast"]:
        wide = cast.inputs[0]
        before = wide.producer() if wide is not None else None
        if before is None or before.op_type != "Cast" or wide is None or wide.is_graph_output():
            continue
        source = before.inputs[0]
        if source is not None and source.dtype == cast.outputs[0].dtype:
            ir.convenience.replace_all_uses_with(cast.outputs[0], source)
    remove_dead_nodes(graph)
    ort.fuse_skip_norms(graph)


def _contrib_norms(graph: ir.Graph) -> None:
    """ONNX Runtime's own name of RMSNormalization, for which its CUDA provider has kernels."""
    for node in [node for node in graph if node.op_type == "RMSNormalization"]:
        same = ir.Node(
            "",
            "SimplifiedLayerNormalization",
            node.inputs,
            [
                ir.AttrFloat32("epsilon", node.attributes["epsilon"].as_float()),
                ir.AttrInt64("axis", -1),
                ir.AttrInt64("stash_type", 1),
            ],
        )
        insert_before(node, [same])
        take_over(node.outputs[0], same.outputs[0])
    remove_dead_nodes(graph)


def _contrib_gelus(graph: ir.Graph) -> None:
    """ONNX's Gelu is of opset 20, in which the provider lacks other operators."""
    for node in [node for node in graph if node.op_type == "Gelu" and not node.domain]:
        approximate = node.attributes.get("approximate")
        tanh = approximate is not None and approximate.as_string() == "tanh"
        same = ir.Node(CONTRIB, "FastGelu" if tanh else "Gelu", [node.inputs[0]])
        insert_before(node, [same])
        take_over(node.outputs[0], same.outputs[0])
    remove_dead_nodes(graph)


def _narrow(graph: ir.Graph, dtype: ir.DataType, weights: Weights) -> None:
    if dtype == _FLOAT:
        return
    hidden, stream = graph.inputs[0], graph.outputs[0]
    for value in [*graph.inputs[1:], *(output for node in graph for output in node.outputs)]:
        if value.dtype == _FLOAT:
            value.type = ir.TensorType(dtype)
    for value in graph.initializers.values():
        narrow_initializer(value, dtype, weights)
    enter = ir.Node("", "Cast", [hidden], [ir.AttrInt64("to", dtype.value)])
    enter.outputs[0].type, enter.outputs[0].shape = ir.TensorType(dtype), hidden.shape
    users = [(usage.node, usage.idx) for usage in hidden.uses() if usage.node is not enter]
    for node, index in users:
        node.replace_input_with(index, enter.outputs[0])
    graph.insert_before(graph[0], enter)
    leave = ir.Node("", "Cast", [stream], [ir.AttrInt64("to", _FLOAT.value)])
    graph.append(leave)
    result = leave.outputs[0]
    result.name, result.type, result.shape = stream.name, ir.TensorType(_FLOAT), stream.shape
    stream.name = f"{stream.name}.narrow"
    graph.outputs[0] = result
