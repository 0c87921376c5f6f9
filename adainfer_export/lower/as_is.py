"""The dialect of decoders that are ONNX already: nodes stay as they are, weights too."""

from __future__ import annotations

import onnx_ir as ir

from ..errors import LoweringError, UnsupportedError
from ..weights import AsIs, WeightExpr
from .graph import CONTRIB, count_ops, insert_before, remove_dead_nodes
from .ort import fuse_skip_norms
from .precision import Precision

__all__ = ["check_layers", "keep_candidates", "keep_embedding", "keep_layers", "keep_stage"]

Weights = dict[str, WeightExpr]


def keep_stage(graph: ir.Graph, precision: Precision) -> Weights:
    """Every weight as it is stored."""
    del precision
    graph.opset_imports[CONTRIB] = 1
    return {
        str(name): AsIs((str(name),))
        for name, value in graph.initializers.items()
        if value.const_value is None
    }


def keep_embedding(graph: ir.Graph, precision: Precision, *, tied: bool) -> Weights:
    """See `keep_stage`."""
    del tied
    return keep_stage(graph, precision)


def keep_layers(graph: ir.Graph, precision: Precision) -> Weights:
    """See `keep_stage`; what the split took apart inside an engine is put together again."""
    graph.opset_imports[CONTRIB] = 1
    fuse_skip_norms(graph)
    return keep_stage(graph, precision)


def keep_candidates(graph: ir.Graph, precision: Precision) -> Weights:
    """The head's rows that a new input `candidates` int64 `[n]` names, from its own blocks.

    Raises:
        UnsupportedError: the head is more than one product.
    """
    products = [node for node in graph if node.op_type in ("MatMulNBits", "MatMul")]
    if len(products) != 1:
        raise UnsupportedError(f"the head is {len(products)} products, expected one")
    (product,) = products
    candidates = ir.Value(
        name="candidates", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape(["n"])
    )
    graph.inputs.append(candidates)
    if product.op_type == "MatMul":
        nodes = [ir.Node("", "Gather", [product.inputs[1], candidates], [ir.AttrInt64("axis", 1)])]
    else:
        rows = _rows_of(product, candidates)
        nodes = [rows, ir.Node("", "Transpose", [rows.outputs[0]], [ir.AttrInt64s("perm", [1, 0])])]
    result = ir.Node("", "MatMul", [product.inputs[0], nodes[-1].outputs[0]])
    insert_before(product, [*nodes, result])
    old, new = product.outputs[0], result.outputs[0]
    new.type, new.shape, name = old.type, ir.Shape(["batch", "tokens", "n"]), old.name
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
    old.name, new.name = f"{name}.replaced", name
    remove_dead_nodes(graph)
    return keep_stage(graph, precision)


def _rows_of(product: ir.Node, candidates: ir.Value) -> ir.Node:
    bits, size = (product.attributes[name].as_int() for name in ("bits", "block_size"))
    rows, columns = (product.attributes[name].as_int() for name in ("N", "K"))
    packed, scales, *zeros = product.inputs[1:4]
    if packed is None or scales is None or any(value is not None for value in product.inputs[4:]):
        raise UnsupportedError("the head's blocks have an order or a bias of their own")
    count = columns // size
    packed.shape = ir.Shape([rows, columns * bits // 8])
    scales.shape = ir.Shape([rows, count])
    inputs = [packed, candidates, scales]
    if zeros and zeros[0] is not None:
        zeros[0].shape = ir.Shape([rows, -(-count * bits // 8)])
        inputs.append(zeros[0])
    attributes = {"bits": bits, "block_size": size, "gather_axis": 0, "quantize_axis": 1}
    made = [ir.AttrInt64(name, value) for name, value in attributes.items()]
    return ir.Node(CONTRIB, "GatherBlockQuantized", inputs, made)


def check_layers(graph: ir.Graph, layers: int, precision: Precision) -> None:
    """One attention per layer; products may be of any kind.

    Raises:
        LoweringError: found against expected.
    """
    del precision
    if (found := count_ops(graph, "GroupQueryAttention")) != layers:
        raise LoweringError(
            f"stage {graph.name}: found {found} of operator GroupQueryAttention, expected {layers}"
        )
