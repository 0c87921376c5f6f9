"""Attention of graphs that run few positions: ONNX Runtime's kernel for that, and its fast product.

GroupQueryAttention has two kernels on CPUs. The tiled one (flash attention) is made for prompts,
whose scores would take much memory. The other one writes all scores of a pass down, which for one
position is little; its product of a query with the keys has a kernel of its own where nothing is
left to scale. At one position SmolLM2's layers take 5% less time with both, over 128 past positions
as over 1,000 (AVX-512, two cores, ONNX Runtime 1.32), and less is gained with one of them.

The operator has no attribute for either. An attention sink rules the tiled kernel out, and one of
the lowest value adds nothing to any sum, for exp(sink - max) is 0. And queries are scaled in the
weights that they come from, by products of constants, which ONNX Runtime folds on load.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from .graph import insert_before, remove_dead_nodes, table
from .group_query import HEAD_SINK, attentions, drop_empty_inputs

__all__ = ["attend_few_rows", "attend_many_rows"]

_LOWEST = np.float32(-1e30)
_MARK = "adainfer.query_scale"  # of the products of constants
_SCALED_INPUTS = {"MatMulNBits": 2, "Add": 1}  # the scales of its blocks, and a bias


def attend_few_rows(graph: ir.Graph) -> None:
    """Scales queries in their weights, and gives the attention a sink without weight; in place.

    That is for Q, K and V from one product of 4-bit or 8-bit weights. Other attentions stay as they
    are, and so do those with a window, which the tiled kernel skips blocks by, or with a cap.
    """
    for node in attentions(graph):
        sources = _sources(node)
        if not sources or not {"local_window_size", "softcap"}.isdisjoint(node.attributes):
            continue
        factor = np.float32(node.attributes["scale"].as_float())
        for source in sources:
            _scale_queries(graph, source, _SCALED_INPUTS[source.op_type], node, factor)
        sink = table(graph, f"no_sink_{_heads(node)}", np.full(_heads(node), _LOWEST))
        node.resize_inputs(max(len(node.inputs), HEAD_SINK + 1))
        node.replace_input_with(HEAD_SINK, sink)
        node.attributes["scale"] = ir.AttrFloat32("scale", 1.0)


def attend_many_rows(graph: ir.Graph) -> None:
    """Takes back what `attend_few_rows` did."""
    for node in attentions(graph):
        if len(node.inputs) <= HEAD_SINK or node.inputs[HEAD_SINK] is None:
            continue
        for source in _sources(node):
            at = _SCALED_INPUTS[source.op_type]
            product = source.inputs[at].producer()  # type: ignore[union-attr]  # as it was made
            assert product is not None
            source.replace_input_with(at, product.inputs[0])
            factor = float(product.metadata_props[_MARK])
            node.attributes["scale"] = ir.AttrFloat32("scale", factor)
        node.replace_input_with(HEAD_SINK, None)
        drop_empty_inputs(node)
    remove_dead_nodes(graph)


def _sources(attention: ir.Node) -> list[ir.Node]:
    """The nodes that Q, K and V come from together: a product with blocks, and the bias added to
    it; none where they come from others.
    """
    node = attention.inputs[0].producer() if attention.inputs[0] is not None else None
    found = []
    if attention.inputs[1] is None and node is not None and node.op_type == "Add":
        found, node = [node], node.inputs[0].producer()  # type: ignore[union-attr]
    if attention.inputs[1] is not None or node is None or node.op_type != "MatMulNBits":
        return []
    return [node, *found]


def _scale_queries(
    graph: ir.Graph, source: ir.Node, at: int, attention: ir.Node, factor: np.float32
) -> None:
    """A factor for the query's outputs, and one for the others."""
    whole = source.inputs[at]
    assert whole is not None and whole.shape is not None  # made with a static shape
    outputs = int(whole.shape[0])  # type: ignore[arg-type]
    heads, others = _heads(attention), 2 * attention.attributes["kv_num_heads"].as_int()
    queries = outputs * heads // (heads + others)
    values = np.concatenate(
        [np.full(queries, factor), np.ones(outputs - queries, np.float32)]
    ).reshape(-1, *[1] * (len(whole.shape) - 1))
    size = "_".join(map(str, values.shape))
    factors = table(graph, f"query_scale_{factor:.9g}_{queries}_{size}", values)
    product = ir.Node("", "Mul", [whole, factors], metadata_props={_MARK: repr(float(factor))})
    product.outputs[0].type, product.outputs[0].shape = whole.type, whole.shape
    insert_before(source, [product])
    source.replace_input_with(at, product.outputs[0])


def _heads(attention: ir.Node) -> int:
    return attention.attributes["num_heads"].as_int()
