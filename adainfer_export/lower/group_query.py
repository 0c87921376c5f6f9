"""com.microsoft.GroupQueryAttention: places of inputs and outputs, by ONNX Runtime's spec."""

from __future__ import annotations

import onnx_ir as ir

__all__ = [
    "CACHE_SCALES",
    "COS_CACHE",
    "HEAD_SINK",
    "KEY",
    "PASTS",
    "PRESENTS",
    "attentions",
    "drop_empty_inputs",
]

KEY = 1
PASTS = (3, 4)  # of keys, and of values
COS_CACHE = 7
HEAD_SINK = 11
CACHE_SCALES = (12, 13)
PRESENTS = (1, 2)  # outputs


def attentions(graph: ir.Graph) -> list[ir.Node]:
    """In the order of their layers."""
    return [node for node in graph if node.op_type == "GroupQueryAttention"]


def drop_empty_inputs(node: ir.Node) -> None:
    """Drops the inputs at the end that are not given."""
    while node.inputs[-1] is None:
        node.resize_inputs(len(node.inputs) - 1)
