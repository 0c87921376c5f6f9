"""The `ort-cpu` dialect: com.microsoft operators on float32 activations.

Per stage: residual addition and norm become SkipSimplifiedLayerNormalization, Q, K and V one
product, gate and up another, SiLU one operator, and linear layers MatMulNBits (int4, int8) or
MatMul (fp32).
"""

from __future__ import annotations

import onnx_ir as ir

from ..errors import LoweringError, UnsupportedError
from ..weights import Dense, Quantised, WeightExpr
from .graph import (
    CONTRIB,
    Linear,
    add_initializer,
    count_ops,
    find_linears,
    insert_before,
    only_user,
    remove_dead_nodes,
    take_over,
)
from .precision import Precision

__all__ = [
    "check_layers",
    "fuse_skip_norms",
    "lower_candidates",
    "lower_embedding",
    "lower_layers",
    "lower_probe",
    "widen",
]

Weights = dict[str, WeightExpr]
_NORMS = ("RMSNormalization", "SimplifiedLayerNormalization")


def lower_layers(graph: ir.Graph, precision: Precision) -> Weights:
    """Lowers a stage of decoder layers in place; returns what its new initialisers hold."""
    graph.opset_imports[CONTRIB] = 1
    fuse_skip_norms(graph)
    _fuse_silu(graph)
    weights: Weights = {}
    for linears in _attention_inputs(graph):
        _lower_attention_inputs(graph, linears, precision, weights)
    for siblings in _siblings(graph):
        _lower_siblings(graph, siblings, precision, weights)
    for linear in list(find_linears(graph)):
        _replace_linear(graph, (linear,), precision, weights)
    remove_dead_nodes(graph)
    return weights


def lower_embedding(graph: ir.Graph, precision: Precision, *, tied: bool) -> Weights:
    """Lowers the token embedding: Gather, or GatherBlockQuantized on the LM head's blocks."""
    graph.opset_imports[CONTRIB] = 1
    bits = precision.embedding_bits(tied=tied)
    if bits is None:
        return {}
    gather = next((node for node in graph if node.op_type == "Gather"), None)
    if gather is None or gather.inputs[0] is None:
        raise LoweringError("the embedding stage holds no Gather")
    table = gather.inputs[0]
    assert table.shape is not None and table.name is not None
    rows, width = int(table.shape[0]), int(table.shape[1])  # type: ignore[arg-type]
    weights: Weights = {}
    assert gather.inputs[1] is not None
    node = _gather_rows(
        graph, table.name, (rows, width), gather.inputs[1], bits, precision.block_size, weights
    )
    _replace(gather, node, gather.outputs[0])
    remove_dead_nodes(graph)
    return weights


def lower_candidates(graph: ir.Graph, precision: Precision) -> Weights:
    """Lowers final norm and head for the rows that a new input `candidates` int64 `[n]` names."""
    graph.opset_imports[CONTRIB] = 1
    weights: Weights = {}
    (linear,) = find_linears(graph)
    candidates = ir.Value(
        name="candidates", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape(["n"])
    )
    graph.inputs.append(candidates)
    if precision.bits is None:
        rows = ir.Node("", "Gather", [linear.weight, candidates], [ir.AttrInt64("axis", 0)])
    else:
        shape = (linear.out_features, linear.in_features)
        rows = _gather_rows(
            graph,
            _name(linear.weight),
            shape,
            candidates,
            precision.bits,
            precision.block_size,
            weights,
        )
    columns = ir.Node("", "Transpose", [rows.outputs[0]], [ir.AttrInt64s("perm", [1, 0])])
    nodes = [rows, columns, ir.Node("", "MatMul", [linear.input, columns.outputs[0]])]
    if linear.bias is not None:
        bias = ir.Node("", "Gather", [linear.bias, candidates], [ir.AttrInt64("axis", 0)])
        nodes += [bias, ir.Node("", "Add", [nodes[-1].outputs[0], bias.outputs[0]])]
    insert_before(linear.matmul, nodes)
    linear.output.shape = ir.Shape(["batch", "tokens", "n"])
    take_over(linear.output, nodes[-1].outputs[0])
    remove_dead_nodes(graph)
    return weights


def _gather_rows(
    graph: ir.Graph,
    name: str,
    shape: tuple[int, int],
    indices: ir.Value,
    bits: int,
    block_size: int,
    weights: Weights,
) -> ir.Node:
    rows, width = shape
    packed, scales = _quantised_pair(graph, (name,), shape, bits, block_size, weights)
    packed.shape = ir.Shape([rows, width * bits // 8])
    return ir.Node(
        CONTRIB,
        "GatherBlockQuantized",
        [packed, indices, scales],
        [
            ir.AttrInt64("bits", bits),
            ir.AttrInt64("block_size", block_size),
            ir.AttrInt64("gather_axis", 0),
            ir.AttrInt64("quantize_axis", 1),
        ],
    )


def lower_probe(graph: ir.Graph, precision: Precision) -> Weights:
    """Lowers final norm and LM head. In fp32 the head reads the embedding's rows as they lie."""
    graph.opset_imports[CONTRIB] = 1
    weights: Weights = {}
    for linear in list(find_linears(graph)):
        if precision.bits is None:
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
    expected = {"GroupQueryAttention": layers, "Attention": 0, "RotaryEmbedding": 0}
    if precision.bits is not None:
        expected["MatMul"] = 0
    for op_type, count in expected.items():
        if (found := count_ops(graph, op_type)) != count:
            raise LoweringError(
                f"stage {graph.name}: found {found} of operator {op_type}, expected {count}"
            )


def widen(graph: ir.Graph, precision: Precision) -> bool:
    """Sets every MatMulNBits to float32 arithmetic; False where that is no faster."""
    if precision.wide_rows is None:
        return False
    for node in graph:
        if node.op_type == "MatMulNBits":
            node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", 0)
    return True


def fuse_skip_norms(graph: ir.Graph) -> None:
    """Residual addition and the norm behind it become SkipSimplifiedLayerNormalization."""
    for norm in [node for node in graph if node.op_type in _NORMS]:
        add = norm.inputs[0].producer() if norm.inputs[0] is not None else None
        if add is None or add.op_type != "Add" or add.outputs[0].is_graph_output():
            continue
        if any(value is None or value.is_initializer() for value in add.inputs):
            continue
        fused = ir.Node(
            CONTRIB,
            "SkipSimplifiedLayerNormalization",
            [add.inputs[0], add.inputs[1], norm.inputs[1]],
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


def _attention_inputs(graph: ir.Graph) -> list[tuple[Linear, Linear, Linear]]:
    """Q, K, V whose results go to the attention as they are (no norm in between)."""
    by_output = {linear.output: linear for linear in find_linears(graph)}
    packed = []
    for node in graph:
        if node.op_type != "GroupQueryAttention":
            continue
        found = [by_output.get(value) for value in node.inputs[:3] if value is not None]
        linears = [linear for linear in found if linear is not None]
        same = {linear.input for linear in linears}
        biases = {linear.bias is None for linear in linears}
        if len(linears) == 3 and len(same) == 1 and len(biases) == 1:
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


def _siblings(graph: ir.Graph) -> list[tuple[Linear, ...]]:
    """Linear layers that read the same input (an MLP's gate and up), where there are several."""
    by_input: dict[tuple[ir.Value, bool], list[Linear]] = {}
    for linear in find_linears(graph):
        by_input.setdefault((linear.input, linear.bias is None), []).append(linear)
    return [tuple(linears) for linears in by_input.values() if len(linears) > 1]


def _lower_siblings(
    graph: ir.Graph, linears: tuple[Linear, ...], precision: Precision, weights: Weights
) -> None:
    """One product, then a split: 4% less time per layer at one row, 1.5% more at 128 (SmolLM2)."""
    output = _replace_linear(graph, linears, precision, weights)
    sizes = [linear.out_features for linear in linears]
    split = ir.Node(
        "",
        "Split",
        [output, _ints(graph, "split", sizes)],
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
    if precision.bits is None:
        name = "+".join(names) + ".T"
        weights[name] = Dense(names, transpose=True)
        weight = add_initializer(graph, name, ir.DataType.FLOAT, [columns, rows])
        return [ir.Node("", "MatMul", [value, weight])]
    packed, scales = _quantised_pair(
        graph, names, shape, precision.bits, precision.block_size, weights
    )
    attributes = [
        ir.AttrInt64("K", columns),
        ir.AttrInt64("N", rows),
        ir.AttrInt64("bits", precision.bits),
        ir.AttrInt64("block_size", precision.block_size),
        ir.AttrInt64("accuracy_level", precision.accuracy_level),
    ]
    return [ir.Node(CONTRIB, "MatMulNBits", [value, packed, scales], attributes)]


def _quantised_pair(
    graph: ir.Graph,
    names: tuple[str, ...],
    shape: tuple[int, int],
    bits: int,
    block_size: int,
    weights: Weights,
) -> tuple[ir.Value, ir.Value]:
    rows, columns = shape
    if columns % block_size:
        raise UnsupportedError(
            f"{names[0]}: width {columns} is not divisible by the block of {block_size}; "
            "export with --precision fp32"
        )
    name, blocks = "+".join(names), columns // block_size
    weights[f"{name}.packed"] = Quantised(names, bits, block_size, "packed")  # type: ignore[arg-type]
    weights[f"{name}.scales"] = Quantised(names, bits, block_size, "scales")  # type: ignore[arg-type]
    packed = add_initializer(
        graph, f"{name}.packed", ir.DataType.UINT8, [rows, blocks, block_size * bits // 8]
    )
    scales = add_initializer(graph, f"{name}.scales", ir.DataType.FLOAT, [rows, blocks])
    return packed, scales


def _head_by_rows(graph: ir.Graph, linear: Linear) -> None:
    # Gemm takes the head as [vocabulary, hidden], the embedding's own layout: stored once.
    flat = ir.Node("", "Reshape", [linear.input, _ints(graph, "shape", [-1, linear.in_features])])
    gemm = ir.Node("", "Gemm", [flat.outputs[0], linear.weight], [ir.AttrInt64("transB", 1)])
    shape = _ints(graph, "shape", [1, -1, linear.out_features])
    back = ir.Node("", "Reshape", [gemm.outputs[0], shape])
    nodes = [flat, gemm, back]
    if linear.bias is not None:
        nodes.append(ir.Node("", "Add", [back.outputs[0], linear.bias]))
    insert_before(linear.matmul, nodes)
    take_over(linear.output, nodes[-1].outputs[0])


def _ints(graph: ir.Graph, kind: str, values: list[int]) -> ir.Value:
    name = "_".join([kind, *(str(value).replace("-", "m") for value in values)])
    value = add_initializer(graph, name, ir.DataType.INT64, [len(values)])
    value.const_value = ir.tensor(values, dtype=ir.DataType.INT64, name=name)
    return value


def _replace(anchor: ir.Node, node: ir.Node, old: ir.Value) -> None:
    insert_before(anchor, [node])
    take_over(old, node.outputs[0])


def _name(value: ir.Value) -> str:
    assert value.name is not None  # initialisers always carry their checkpoint name
    return value.name
