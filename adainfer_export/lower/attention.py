"""Attention for ONNX Runtime: com.microsoft.GroupQueryAttention over one KV buffer.

Rewrites `Attention(RotaryEmbedding(q), RotaryEmbedding(k), v, mask, past…)` of the decoder graph.
The cache holds K after rotary. Positions are contiguous, so mask, position ids and the gathered
rotary rows become two lengths that the runtime computes once per pass:
`seqlens_k` int32 `[1]` (positions afterwards, minus one) and `total_sequence_length` int32 scalar.
"""

from __future__ import annotations

import onnx_ir as ir

from ..errors import LoweringError, UnsupportedError
from .graph import CONTRIB, remove_dead_nodes

__all__ = ["SEQLENS_K", "TOTAL_LENGTH", "fuse_attention"]

SEQLENS_K = "seqlens_k"
TOTAL_LENGTH = "total_sequence_length"


def fuse_attention(model: ir.Model, *, window: int | None) -> None:
    """Rewrites every attention of the decoder in place.

    Args:
        window: tokens that each position attends to, or None for all before it.

    Raises:
        LoweringError: an attention that does not have the expected form.
    """
    graph = model.graph
    model.graph.opset_imports[CONTRIB] = 1
    seqlens = ir.Value(
        name=SEQLENS_K, type=ir.TensorType(ir.DataType.INT32), shape=ir.Shape(["batch"])
    )
    total = ir.Value(name=TOTAL_LENGTH, type=ir.TensorType(ir.DataType.INT32), shape=ir.Shape([]))
    graph.inputs.extend([seqlens, total])
    for node in [node for node in graph if node.op_type == "Attention"]:
        _fuse_one(node, seqlens, total, window)
    remove_dead_nodes(graph)
    for value in list(graph.inputs):
        if value.name in ("attention_mask", "position_ids") and not value.uses():
            graph.inputs.remove(value)


def _fuse_one(node: ir.Node, seqlens: ir.Value, total: ir.Value, window: int | None) -> None:
    query, key, value = node.inputs[:3]
    if len(node.inputs) < 6 or query is None or key is None or value is None:
        raise LoweringError(f"{node.name}: attention without a KV cache cannot be lowered")
    query, cos, sin, interleaved = _before_rotary(query)
    key, *_ = _before_rotary(key)
    attributes: list[ir.Attr] = [
        ir.AttrInt64("num_heads", node.attributes["q_num_heads"].as_int()),
        ir.AttrInt64("kv_num_heads", node.attributes["kv_num_heads"].as_int()),
        ir.AttrFloat32("scale", node.attributes["scale"].as_float()),
        ir.AttrInt64("do_rotary", int(cos is not None)),
        ir.AttrInt64("rotary_interleaved", interleaved),
    ]
    softcap = node.attributes.get("softcap")
    if softcap is not None and softcap.as_float() != 0.0:
        attributes.append(ir.AttrFloat32("softcap", softcap.as_float()))
    if window is not None:
        attributes.append(ir.AttrInt64("local_window_size", window))
    fused = ir.Node(
        CONTRIB,
        "GroupQueryAttention",
        [query, key, value, node.inputs[4], node.inputs[5], seqlens, total, cos, sin],
        attributes,
        num_outputs=3,
        name=node.name,
        metadata_props=dict(node.metadata_props),
    )
    for new, old in zip(fused.outputs, node.outputs, strict=True):
        new.name, new.type, new.shape = old.name, old.type, old.shape
    assert node.graph is not None  # found by walking the graph
    ir.convenience.replace_nodes_and_values(
        node.graph, node, [node], [fused], list(node.outputs), list(fused.outputs)
    )


def _before_rotary(
    value: ir.Value,
) -> tuple[ir.Value, ir.Value | None, ir.Value | None, int]:
    """The projection before rotary, and the tables (cos, sin) `[positions, rotary_dim/2]`."""
    rotary = value.producer()
    if rotary is None or rotary.op_type != "RotaryEmbedding":
        return value, None, None, 0
    if rotary.attributes["rotary_embedding_dim"].as_int() != 0:
        raise UnsupportedError("partial rotary embeddings are not supported by this target yet")
    tables = []
    for table in rotary.inputs[1:3]:
        gather = table.producer() if table is not None else None
        if gather is None or gather.op_type != "Gather" or gather.inputs[0] is None:
            raise LoweringError(f"{rotary.name}: rotary tables are not gathered by position")
        tables.append(gather.inputs[0])
    projection = rotary.inputs[0]
    assert projection is not None  # RotaryEmbedding's first input is required
    return projection, tables[0], tables[1], rotary.attributes["interleaved"].as_int()
