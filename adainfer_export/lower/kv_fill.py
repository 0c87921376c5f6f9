"""`kv_fill`: one layer's K and V from a hidden state that is not its own input (as in CALM).

The layer's input norm, K and V projections and rotary, on the layer's own weights: where Q, K and V
are one product, their rows in it.
"""

from __future__ import annotations

import onnx_ir as ir

from ..errors import LoweringError
from ..weights import Dense, WeightExpr
from .blocks import add_rows, blocked_product
from .graph import (
    CONTRIB,
    Linear,
    add_initializer,
    find_linears,
    insert_before,
    ints,
    remove_dead_nodes,
)
from .ort import linears_by_input
from .precision import Precision

__all__ = ["START", "lower_kv_fill", "project_kv"]

START = "start"


def project_kv(attention: ir.Node, start: ir.Value) -> list[ir.Value]:
    """Appends to the decoder what a GroupQueryAttention writes into its cache.

    Args:
        start: int64 `[1]`, the position of the first row.

    Returns:
        the query before rotary (so that lowering sees what is packed together), and K (after
        rotary) and V `[1, kv_heads, rows, head_dim]`.
    """
    query, key, value = attention.inputs[:3]
    graph = attention.graph
    assert graph is not None and query is not None and key is not None and value is not None
    rotary = _rotary(attention, key, start)
    if rotary is not None:
        graph.append(rotary)
        key = rotary.outputs[0]
    query = _before_rotary(query)
    heads = attention.attributes["kv_num_heads"].as_int()
    outputs = [query]
    for name, projected in (("key", key), ("value", value)):
        shape = ir.tensor([0, 0, heads, -1], dtype=ir.DataType.INT64, name=f"{name}_shape")
        constant = ir.Node("", "Constant", [], [ir.AttrTensor("value", shape)])
        table = ir.Node("", "Reshape", [projected, constant.outputs[0]])
        turned = ir.Node("", "Transpose", [table.outputs[0]], [ir.AttrInt64s("perm", [0, 2, 1, 3])])
        graph.extend([constant, table, turned])
        result = turned.outputs[0]
        result.name = f"{attention.name}.{name}"
        result.type = ir.TensorType(ir.DataType.FLOAT)
        result.shape = ir.Shape([1, heads, "rows", None])
        outputs.append(result)
    return outputs


def _rotary(attention: ir.Node, key: ir.Value, start: ir.Value) -> ir.Node | None:
    """The rotation of keys from `start` on, which is the attention's own, or stands before it."""
    cos, sin = (*attention.inputs, None, None)[7:9]
    if cos is not None:
        interleaved = attention.attributes["rotary_interleaved"].as_int()
        attributes = [ir.AttrInt64("interleaved", interleaved)]
        return ir.Node(CONTRIB, "RotaryEmbedding", [key, start, cos, sin], attributes)
    apart = key.producer()
    if apart is None or apart.op_type != "RotaryEmbedding":
        return None
    inputs = [_before_rotary(key), start, *apart.inputs[2:4]]
    return ir.Node(CONTRIB, "RotaryEmbedding", inputs, list(apart.attributes.values()))


def _before_rotary(value: ir.Value) -> ir.Value:
    node = value.producer()
    if node is None or node.op_type != "RotaryEmbedding":
        return value
    projection = node.inputs[0]
    assert projection is not None  # the operator's first input is required
    return projection


def lower_kv_fill(graph: ir.Graph, precision: Precision) -> dict[str, WeightExpr]:
    """Lowers what was cut out of the decoder by `project_kv`; its first output, the query, goes."""
    graph.opset_imports[CONTRIB] = 1
    products = linears_by_input(graph, precision)  # those of the layer's own stage
    graph.outputs.pop(0)
    remove_dead_nodes(graph)
    for name, value in zip(("key", "value"), graph.outputs, strict=True):
        value.name = name
    kept = {linear.matmul for linear in find_linears(graph)}
    weights: dict[str, WeightExpr] = {}
    for linears in products:
        _replace(graph, linears, kept, precision, weights)
    remove_dead_nodes(graph)
    return weights


def _replace(
    graph: ir.Graph,
    linears: tuple[Linear, ...],
    kept: set[ir.Node],
    precision: Precision,
    weights: dict[str, WeightExpr],
) -> None:
    """One product over the rows of those that are kept, out of the product of all."""
    wanted = [linear for linear in linears if linear.matmul in kept]
    if not wanted:
        return
    first = linears.index(wanted[0])
    if list(linears[first : first + len(wanted)]) != wanted:
        raise LoweringError(f"{graph.name}: rows of K and V do not lie side by side")
    start = sum(linear.out_features for linear in linears[:first])
    end = start + sum(linear.out_features for linear in wanted)
    total = sum(linear.out_features for linear in linears)
    names = tuple(_name(linear.weight) for linear in linears)
    shape = (total, wanted[0].in_features)
    nodes = _product(graph, wanted[0].input, names, shape, (start, end), precision, weights)
    biases = tuple(_name(linear.bias) for linear in linears if linear.bias is not None)
    if biases:
        of = (start, end, total)
        bias = add_rows(graph, "+".join(biases), Dense(biases), of, [total], weights)
        nodes.append(ir.Node("", "Add", [nodes[-1].outputs[0], bias]))
    insert_before(wanted[0].matmul, nodes)
    if len(wanted) == 1:
        ir.convenience.replace_all_uses_with(wanted[0].output, nodes[-1].outputs[0])
        return
    sizes = [linear.out_features for linear in wanted]
    split = ir.Node(
        "",
        "Split",
        [nodes[-1].outputs[0], ints(graph, "split", sizes)],
        [ir.AttrInt64("axis", -1)],
        num_outputs=len(sizes),
    )
    insert_before(wanted[0].matmul, [split])
    for linear, part in zip(wanted, split.outputs, strict=True):
        ir.convenience.replace_all_uses_with(linear.output, part)


def _product(
    graph: ir.Graph,
    value: ir.Value,
    names: tuple[str, ...],
    shape: tuple[int, int],
    rows: tuple[int, int],
    precision: Precision,
    weights: dict[str, WeightExpr],
) -> list[ir.Node]:
    blocks = precision.storage(names[0])
    if blocks is not None:
        level = precision.accuracy_level
        return blocked_product(graph, value, names, shape, blocks, level, weights, rows)
    # Stored as columns: no range of them lies in one piece. Constant folding cuts it on load.
    (total, columns), (start, end), stored = shape, rows, "+".join(names) + ".T"
    weights[stored] = Dense(names, transpose=True)
    whole = add_initializer(graph, stored, ir.DataType.FLOAT, [columns, total])
    part = ir.Node("", "Slice", [whole, *(ints(graph, "at", [at]) for at in (start, end, 1))])
    part.outputs[0].type = whole.type
    part.outputs[0].shape = ir.Shape([columns, end - start])
    return [part, ir.Node("", "MatMul", [value, part.outputs[0]])]


def _name(value: ir.Value) -> str:
    assert value.name is not None  # initialisers always carry their checkpoint name
    return value.name
