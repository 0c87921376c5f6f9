"""The `ort-cpu` dialect: com.microsoft operators on float32 activations.

Per stage: residual addition and norm become SkipSimplifiedLayerNormalization, Q, K and V one
product, gate and up another, SiLU one operator, and linear layers MatMulNBits (int4, int8) or
MatMul (fp32).
"""

from __future__ import annotations

import onnx_ir as ir

from ..errors import LoweringError
from ..quantise import Blocks
from ..weights import Dense, WeightExpr
from .blocks import blocked_product, gather_rows
from .few_rows import attend_few_rows, attend_many_rows
from .graph import (
    CONTRIB,
    Linear,
    add_initializer,
    count_ops,
    find_linears,
    insert_before,
    ints,
    only_user,
    remove_dead_nodes,
    take_over,
)
from .int8_caches import attend_in_float
from .int8_products import multiply_in_int8
from .precision import Precision

__all__ = [
    "check_layers",
    "fuse_skip_norms",
    "linears_by_input",
    "lower_candidates",
    "lower_embedding",
    "lower_layers",
    "lower_probe",
    "widen",
]

Weights = dict[str, WeightExpr]

_SKIP_NORMS = {
    "RMSNormalization": "SkipSimplifiedLayerNormalization",
    "SimplifiedLayerNormalization": "SkipSimplifiedLayerNormalization",
    "LayerNormalization": "SkipLayerNormalization",
}


def lower_layers(graph: ir.Graph, precision: Precision) -> Weights:
    """Lowers a stage of decoder layers in place; returns what its new initialisers hold."""
    graph.opset_imports[CONTRIB] = 1
    fuse_skip_norms(graph)
    _fuse_silu(graph)
    weights: Weights = {}
    for linears in _attention_inputs(graph, precision):
        _lower_attention_inputs(graph, linears, precision, weights)
    for siblings in linears_by_input(graph, precision):
        if len(siblings) > 1:  # an MLP's gate and up
            _lower_siblings(graph, siblings, precision, weights)
    for linear in list(find_linears(graph)):
        _replace_linear(graph, (linear,), precision, weights)
    remove_dead_nodes(graph)
    if _has_wide_form(graph, precision):
        attend_few_rows(graph)
    return weights


def lower_embedding(graph: ir.Graph, precision: Precision, *, tied: bool) -> Weights:
    """Lowers the token embedding: Gather, or GatherBlockQuantized on the LM head's blocks.

    Learned positions stay as they are; a projection behind the tokens is a linear layer.
    """
    graph.opset_imports[CONTRIB] = 1
    weights: Weights = {}
    for linear in list(find_linears(graph)):
        _replace_linear(graph, (linear,), precision, weights)
    _gather_tokens(graph, precision, weights, tied=tied)
    remove_dead_nodes(graph)
    return weights


def _gather_tokens(graph: ir.Graph, precision: Precision, weights: Weights, *, tied: bool) -> None:
    ids = graph.inputs[0]
    gather = next((use.node for use in ids.uses() if use.node.op_type == "Gather"), None)
    if gather is None or gather.inputs[0] is None:
        raise LoweringError("the embedding stage gathers no tokens")
    table = gather.inputs[0]
    assert table.shape is not None and table.name is not None
    blocks = precision.embedding(table.name, tied=tied)
    if blocks is None:
        return
    rows, width = int(table.shape[0]), int(table.shape[1])  # type: ignore[arg-type]
    nodes = gather_rows(graph, table.name, (rows, width), ids, blocks, weights)
    insert_before(gather, nodes)
    take_over(gather.outputs[0], nodes[-1].outputs[0])


def lower_candidates(graph: ir.Graph, precision: Precision) -> Weights:
    """Lowers final norm and head for the rows that a new input `candidates` int64 `[n]` names."""
    graph.opset_imports[CONTRIB] = 1
    weights: Weights = {}
    *projections, linear = find_linears(graph)
    for projection in projections:  # from the layers' width to the head's
        _replace_linear(graph, (projection,), precision, weights)
    candidates = ir.Value(
        name="candidates", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape(["n"])
    )
    graph.inputs.append(candidates)
    name = _name(linear.weight)
    blocks = precision.storage(name)
    if blocks is None:
        rows = [ir.Node("", "Gather", [linear.weight, candidates], [ir.AttrInt64("axis", 0)])]
    else:
        shape = (linear.out_features, linear.in_features)
        rows = gather_rows(graph, name, shape, candidates, blocks, weights)
    columns = ir.Node("", "Transpose", [rows[-1].outputs[0]], [ir.AttrInt64s("perm", [1, 0])])
    nodes = [*rows, columns, ir.Node("", "MatMul", [linear.input, columns.outputs[0]])]
    if linear.bias is not None:
        bias = ir.Node("", "Gather", [linear.bias, candidates], [ir.AttrInt64("axis", 0)])
        nodes += [bias, ir.Node("", "Add", [nodes[-1].outputs[0], bias.outputs[0]])]
    insert_before(linear.matmul, nodes)
    for value in (linear.output, *(out for out in graph.outputs if out.name == "logits")):
        value.type = ir.TensorType(ir.DataType.FLOAT)
        value.shape = ir.Shape(["batch", "tokens", "n"])
    take_over(linear.output, nodes[-1].outputs[0])
    remove_dead_nodes(graph)
    return weights


def lower_probe(graph: ir.Graph, precision: Precision) -> Weights:
    """Lowers final norm and LM head. In fp32 the head reads the embedding's rows as they lie."""
    graph.opset_imports[CONTRIB] = 1
    weights: Weights = {}
    for linear in list(find_linears(graph)):
        if precision.storage(_name(linear.weight)) is None:
            _head_by_rows(graph, linear)
        else:
            _replace_linear(graph, (linear,), precision, weights)
    remove_dead_nodes(graph)
    return weights


def check_layers(graph: ir.Graph, layers: int, precision: Precision) -> None:
    """Fails loudly if an operator that the dialect relies on was not found.

    Raises:
        LoweringError: with the operator, and found against expected.
    """
    expected = {(CONTRIB, "GroupQueryAttention"): layers, ("", "Attention"): 0}
    expected["", "RotaryEmbedding"] = 0
    if precision.bits is not None:
        expected["", "MatMul"] = 0
    for (domain, op_type), count in expected.items():
        if (found := count_ops(graph, op_type, domain)) != count:
            raise LoweringError(
                f"stage {graph.name}: found {found} of operator {op_type}, expected {count}"
            )


def widen(graph: ir.Graph, precision: Precision, stored: Weights) -> Weights | None:
    """Turns a lowered stage into its form for many positions: 4-bit products in float32 arithmetic,
    or products of 8-bit integers on weights of their own; attention in float32, whatever the caches
    hold.

    Args:
        stored: what the stage's initialisers hold.

    Returns:
        what new initialisers hold; None where another form is no faster.
    """
    if not _has_wide_form(graph, precision):
        return None
    attend_many_rows(graph)
    attend_in_float(graph)
    if precision.prefill == "int8":
        return multiply_in_int8(graph, stored)
    for node in _products(graph, 4):
        node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", 0)
    return {}


def _has_wide_form(graph: ir.Graph, precision: Precision) -> bool:
    if precision.wide_rows is None:
        return False
    if precision.kv_cache == "int8":
        return True
    return bool(_products(graph, *((4, 8) if precision.prefill == "int8" else (4,))))


def _products(graph: ir.Graph, *bits: int) -> list[ir.Node]:
    products = [node for node in graph if node.op_type == "MatMulNBits"]
    return [node for node in products if node.attributes["bits"].as_int() in bits]


def fuse_skip_norms(graph: ir.Graph) -> None:
    """Residual addition and the norm behind it become one operator."""
    for norm in [node for node in graph if node.op_type in _SKIP_NORMS]:
        add = norm.inputs[0].producer() if norm.inputs[0] is not None else None
        if add is None or add.op_type != "Add" or add.outputs[0].is_graph_output():
            continue
        if any(value is None or value.is_initializer() for value in add.inputs):
            continue
        fused = ir.Node(
            CONTRIB,
            _SKIP_NORMS[norm.op_type],
            [*add.inputs, *norm.inputs[1:]],
            [ir.AttrFloat32("epsilon", norm.attributes["epsilon"].as_float())],
            num_outputs=4,
        )
        insert_before(add, [fused])
        take_over(norm.outputs[0], fused.outputs[0])
        take_over(add.outputs[0], fused.outputs[3])
        for empty in fused.outputs[1:3]:
            empty.name = ""
        remove_dead_nodes(graph)


def _fuse_silu(graph: ir.Graph) -> None:
    for sigmoid in [node for node in graph if node.op_type == "Sigmoid"]:
        mul = only_user(sigmoid.outputs[0])
        if mul is None or mul.op_type != "Mul" or sigmoid.inputs[0] not in mul.inputs:
            continue
        node = ir.Node(CONTRIB, "QuickGelu", [sigmoid.inputs[0]], [ir.AttrFloat32("alpha", 1.0)])
        _replace(mul, node, mul.outputs[0])
    remove_dead_nodes(graph)


def _attention_inputs(graph: ir.Graph, precision: Precision) -> list[tuple[Linear, Linear, Linear]]:
    """Q, K, V, stored alike, whose results go to the attention as they are (no norm between)."""
    by_output = {linear.output: linear for linear in find_linears(graph)}
    packed = []
    for node in graph:
        if node.op_type != "GroupQueryAttention":
            continue
        found = [by_output.get(value) for value in node.inputs[:3] if value is not None]
        linears = [linear for linear in found if linear is not None]
        same = {linear.input for linear in linears}
        biases = {linear.bias is None for linear in linears}
        stored = {precision.storage(_name(linear.weight)) for linear in linears}
        if len(linears) == 3 and len(same) == len(biases) == len(stored) == 1:
            packed.append((linears[0], linears[1], linears[2]))
    return packed


def _lower_attention_inputs(
    graph: ir.Graph,
    linears: tuple[Linear, Linear, Linear],
    precision: Precision,
    weights: Weights,
) -> None:
    attention = only_user(linears[0].output)
    assert attention is not None  # found through the attention's own inputs
    output = _replace_linear(graph, linears, precision, weights)
    for index, value in enumerate((output, None, None)):
        attention.replace_input_with(index, value)


def linears_by_input(graph: ir.Graph, precision: Precision) -> list[tuple[Linear, ...]]:
    """Linear layers that read the same input and are stored alike: they are one product."""
    by_input: dict[tuple[ir.Value, bool, Blocks | None], list[Linear]] = {}
    for linear in find_linears(graph):
        stored = precision.storage(_name(linear.weight))
        by_input.setdefault((linear.input, linear.bias is None, stored), []).append(linear)
    return [tuple(linears) for linears in by_input.values()]


def _lower_siblings(
    graph: ir.Graph, linears: tuple[Linear, ...], precision: Precision, weights: Weights
) -> None:
    """One product, then a split: 4% less time per layer at one row, 1.5% more at 128 (SmolLM2)."""
    output = _replace_linear(graph, linears, precision, weights)
    sizes = [linear.out_features for linear in linears]
    split = ir.Node(
        "",
        "Split",
        [output, ints(graph, "split", sizes)],
        [ir.AttrInt64("axis", -1)],
        num_outputs=len(sizes),
    )
    insert_before(linears[0].matmul, [split])
    for linear, part in zip(linears, split.outputs, strict=True):
        take_over(linear.output, part)


def _replace_linear(
    graph: ir.Graph, linears: tuple[Linear, ...], precision: Precision, weights: Weights
) -> ir.Value:
    """One product over the rows of all the given linear layers, which share their input."""
    first = linears[0]
    names = tuple(_name(linear.weight) for linear in linears)
    rows = sum(linear.out_features for linear in linears)
    nodes = _product(graph, first.input, names, (rows, first.in_features), precision, weights)
    biases = tuple(_name(linear.bias) for linear in linears if linear.bias is not None)
    if biases:
        name = "+".join(biases)
        weights[name] = Dense(biases)
        bias = add_initializer(graph, name, ir.DataType.FLOAT, [rows])
        nodes.append(ir.Node("", "Add", [nodes[-1].outputs[0], bias]))
    insert_before(first.matmul, nodes)
    output = nodes[-1].outputs[0]
    if len(linears) == 1:
        take_over(first.output, output)
    return output


def _product(
    graph: ir.Graph,
    value: ir.Value,
    names: tuple[str, ...],
    shape: tuple[int, int],
    precision: Precision,
    weights: Weights,
) -> list[ir.Node]:
    rows, columns = shape
    blocks = precision.storage(names[0])
    if blocks is None:
        name = "+".join(names) + ".T"
        weights[name] = Dense(names, transpose=True)
        weight = add_initializer(graph, name, ir.DataType.FLOAT, [columns, rows])
        return [ir.Node("", "MatMul", [value, weight])]
    return blocked_product(graph, value, names, shape, blocks, precision.accuracy_level, weights)


def _head_by_rows(graph: ir.Graph, linear: Linear) -> None:
    # Gemm takes the head as [vocabulary, hidden], the embedding's own layout: stored once.
    flat = ir.Node("", "Reshape", [linear.input, ints(graph, "shape", [-1, linear.in_features])])
    gemm = ir.Node("", "Gemm", [flat.outputs[0], linear.weight], [ir.AttrInt64("transB", 1)])
    shape = ints(graph, "shape", [1, -1, linear.out_features])
    back = ir.Node("", "Reshape", [gemm.outputs[0], shape])
    nodes = [flat, gemm, back]
    if linear.bias is not None:
        nodes.append(ir.Node("", "Add", [back.outputs[0], linear.bias]))
    insert_before(linear.matmul, nodes)
    take_over(linear.output, nodes[-1].outputs[0])


def _replace(anchor: ir.Node, node: ir.Node, old: ir.Value) -> None:
    insert_before(anchor, [node])
    take_over(old, node.outputs[0])


def _name(value: ir.Value) -> str:
    assert value.name is not None  # initialisers always carry their checkpoint name
    return value.name
