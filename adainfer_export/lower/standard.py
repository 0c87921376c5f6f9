"""Stages in standard ONNX operators: the dialects `onnx-std`, `tensorrt` and `tensorrt-basic`.

Linear layers are MatMul, with int4 weights behind DequantizeLinear, or of 8-bit floats (`float8`).
The embedding and the LM head are never quantised: one table `[vocabulary, hidden_size]` serves the
embedding, the head and candidate rows of it (TensorRT gathers no int4 rows). 16-bit tables are
float16 even where activations are bfloat16: logits need its digits, and normed hidden states fit
its range.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ..errors import LoweringError, UnsupportedError
from ..weights import Columns, Dense, WeightExpr
from .element_types import set_activation_type
from .float8 import Float8Products
from .graph import (
    Linear,
    add_initializer,
    count_ops,
    find_linears,
    insert_before,
    remove_dead_nodes,
    take_over,
)
from .precision import Precision

__all__ = [
    "check_layers",
    "check_plain_layers",
    "keep_as_joined",
    "lower_candidates",
    "lower_embedding",
    "lower_layers",
    "lower_plain_candidates",
    "lower_plain_layers",
    "lower_plain_probe",
    "lower_probe",
    "no_wide_form",
]

Weights = dict[str, WeightExpr]


def lower_layers(graph: ir.Graph, precision: Precision) -> Weights:
    """Lowers a stage of decoder layers in place; returns what its new initialisers hold."""
    weights: Weights = {}
    float8 = Float8Products(graph, precision.activations, weights)
    for linear in list(find_linears(graph)):
        if precision.float8:
            nodes = float8.nodes(linear)
        else:
            nodes = _product(graph, linear, precision, weights)
        _replace(linear, nodes)
    set_activation_type(graph, precision.activation_type, weights)
    remove_dead_nodes(graph)
    _fix_batch(graph)
    return weights


def lower_embedding(graph: ir.Graph, precision: Precision, *, tied: bool) -> Weights:
    """Gathers rows of the table and brings them to float32."""
    weights: Weights = {}
    for linear in find_linears(graph):
        raise UnsupportedError(
            f"{linear.weight.name}: this target takes no projection behind the embedding; export "
            "with --target ort-cpu"
        )
    ids = graph.inputs[0]
    gather = next((use.node for use in ids.uses() if use.node.op_type == "Gather"), None)
    if gather is None or gather.inputs[0] is None:
        raise LoweringError("the embedding stage gathers no tokens")
    _set_table(gather.inputs[0], precision, weights)
    if weights:
        rows = gather.outputs[0]
        users = [(usage.node, usage.idx) for usage in rows.uses()]
        cast = _cast(rows, ir.DataType.FLOAT)
        graph.insert_after(gather, cast)
        for user, index in users:
            user.replace_input_with(index, cast.outputs[0])
        if rows.is_graph_output():
            take_over(rows, cast.outputs[0])
            cast.replace_input_with(0, rows)
        rows.type = ir.TensorType(ir.DataType.FLOAT16)
    _fix_batch(graph)
    return weights


def lower_probe(graph: ir.Graph, precision: Precision) -> Weights:
    """Lowers final norm and LM head; features are computed from float32 logits."""
    weights: Weights = {}
    linear = _only_head(graph)
    _set_table(linear.weight, precision, weights)
    _head(graph, linear, linear.weight, precision)
    remove_dead_nodes(graph)
    _fix_batch(graph)
    return weights


def lower_candidates(graph: ir.Graph, precision: Precision) -> Weights:
    """The same for the head's rows that a new input `candidates` int64 `[n]` names."""
    weights: Weights = {}
    linear = _only_head(graph)
    candidates = ir.Value(
        name="candidates", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape(["n"])
    )
    graph.inputs.append(candidates)
    _set_table(linear.weight, precision, weights)
    rows = ir.Node("", "Gather", [linear.weight, candidates], [ir.AttrInt64("axis", 0)])
    insert_before(linear.matmul, [rows])
    linear.output.shape = ir.Shape(["batch", "tokens", "n"])
    _head(graph, linear, rows.outputs[0], precision, candidates)
    remove_dead_nodes(graph)
    _fix_batch(graph)
    return weights


def lower_plain_layers(graph: ir.Graph, precision: Precision) -> Weights:
    """`lower_layers` without operators that TensorRT 10.3 does not have."""
    weights = lower_layers(graph, precision)
    _decompose_norms(graph)
    return weights


def lower_plain_probe(graph: ir.Graph, precision: Precision) -> Weights:
    """`lower_probe` without operators that TensorRT 10.3 does not have."""
    weights = lower_probe(graph, precision)
    _decompose_norms(graph)
    return weights


def lower_plain_candidates(graph: ir.Graph, precision: Precision) -> Weights:
    """`lower_candidates` without operators that TensorRT 10.3 does not have."""
    weights = lower_candidates(graph, precision)
    _decompose_norms(graph)
    return weights


def check_layers(graph: ir.Graph, layers: int, precision: Precision) -> None:
    """Fails loudly if an operator that the dialect relies on was not found, or one is too many.

    Raises:
        LoweringError: with the operator, and found against expected.
    """
    _check(graph, {"TensorScatter": 2 * layers}, precision)


def check_plain_layers(graph: ir.Graph, layers: int, precision: Precision) -> None:
    """`check_layers` of the dialect `tensorrt-basic`."""
    expected = {"Softmax": layers, "Attention": 0, "RotaryEmbedding": 0, "RMSNormalization": 0}
    _check(graph, {**expected, "TensorScatter": 0, "Swish": 0}, precision)


def no_wide_form(graph: ir.Graph, precision: Precision, stored: Weights) -> None:
    """One graph serves few and many positions: these targets choose kernels by profile."""


def keep_as_joined(graph: ir.Graph) -> None:
    """Nothing to fuse at the seams: the target's own compiler does."""


def _check(graph: ir.Graph, expected: dict[str, int], precision: Precision) -> None:
    foreign = sorted({node.domain for node in graph if node.domain})
    if foreign:
        raise LoweringError(f"stage {graph.name}: operators of {', '.join(foreign)} are left")
    if precision.bits is not None or precision.float8:
        # One for each weight, and for each activation that was quantised.
        weights = _products_with_weights(graph)
        dequantised = weights + count_ops(graph, "QuantizeLinear")
        expected = {**expected, "DequantizeLinear": dequantised}
    for op_type, count in expected.items():
        if (found := count_ops(graph, op_type)) != count:
            raise LoweringError(
                f"stage {graph.name}: found {found} of operator {op_type}, expected {count}"
            )


def _products_with_weights(graph: ir.Graph) -> int:
    """Products whose second operand is no activation."""
    products = (node for node in graph if node.op_type == "MatMul")
    sources = (node.inputs[1].producer() for node in products if node.inputs[1] is not None)
    return sum(source is None or source.op_type == "DequantizeLinear" for source in sources)


def _product(
    graph: ir.Graph, linear: Linear, precision: Precision, weights: Weights
) -> list[ir.Node]:
    nodes: list[ir.Node] = []
    if precision.bits is None:
        name = f"{linear.weight.name}.T"
        weights[name] = Dense((str(linear.weight.name),), transpose=True)
        shape = [linear.in_features, linear.out_features]
        weight = add_initializer(graph, name, ir.DataType.FLOAT, shape)
    else:
        nodes.append(_dequantised(graph, linear, precision, weights))
        weight = nodes[0].outputs[0]
    return [*nodes, ir.Node("", "MatMul", [linear.input, weight])]


def _replace(linear: Linear, product: list[ir.Node]) -> None:
    """By the nodes whose last gives the product, with the bias added."""
    nodes = list(product)
    if linear.bias is not None:
        nodes.append(ir.Node("", "Add", [nodes[-1].outputs[0], linear.bias]))
    insert_before(linear.matmul, nodes)
    take_over(linear.output, nodes[-1].outputs[0])


def _dequantised(
    graph: ir.Graph, linear: Linear, precision: Precision, weights: Weights
) -> ir.Node:
    name = str(linear.weight.name)
    blocks = precision.storage(name)
    assert blocks is not None and blocks.bits == 4  # all that the targets take
    block = blocks.block_size
    if linear.in_features % block or linear.out_features % 2:
        raise UnsupportedError(
            f"{name}: shape {linear.out_features}x{linear.in_features} does not go into blocks of "
            f"{block} in pairs of rows, and feed-forward widths alone are padded; "
            "export with --precision fp16"
        )
    parts = (name,)
    weights[f"{name}.int4"] = Columns(parts, "int4", blocks, "packed", precision.activations)
    weights[f"{name}.scales"] = Columns(parts, "int4", blocks, "scales", precision.activations)
    shape = [linear.in_features, linear.out_features]
    packed = add_initializer(graph, f"{name}.int4", ir.DataType.INT4, shape)
    scales = add_initializer(
        graph, f"{name}.scales", ir.DataType.FLOAT, [shape[0] // block, shape[1]]
    )
    attributes = [ir.AttrInt64("axis", 0), ir.AttrInt64("block_size", block)]
    return ir.Node("", "DequantizeLinear", [packed, scales], attributes)


def _table_type(precision: Precision) -> ir.DataType:
    wide = precision.activation_type == ir.DataType.FLOAT
    return ir.DataType.FLOAT if wide else ir.DataType.FLOAT16


def _set_table(table: ir.Value, precision: Precision, weights: Weights) -> None:
    if _table_type(precision) == ir.DataType.FLOAT:
        return
    table.type = ir.TensorType(ir.DataType.FLOAT16)
    weights[str(table.name)] = Dense((str(table.name),), dtype="float16")


def _only_head(graph: ir.Graph) -> Linear:
    *others, linear = find_linears(graph)
    if others:
        raise UnsupportedError(
            f"{others[0].weight.name}: this target takes no projection before the head; export "
            "with --target ort-cpu"
        )
    return linear


def _head(
    graph: ir.Graph,
    linear: Linear,
    rows: ir.Value,
    precision: Precision,
    candidates: ir.Value | None = None,
) -> None:
    """`hidden @ rowsᵀ`: Gemm reads the table as it lies, so that it is stored once."""
    dtype = _table_type(precision)
    value, nodes = linear.input, []
    if dtype != ir.DataType.FLOAT:
        nodes.append(_cast(value, dtype))
        value = nodes[-1].outputs[0]
    flat = _ints(graph, [-1, linear.in_features])
    nodes.append(ir.Node("", "Reshape", [value, flat]))
    nodes.append(ir.Node("", "Gemm", [nodes[-1].outputs[0], rows], [ir.AttrInt64("transB", 1)]))
    # One batch: the rows are the positions.
    nodes.append(ir.Node("", "Unsqueeze", [nodes[-1].outputs[0], _ints(graph, [0])]))
    if dtype != ir.DataType.FLOAT:
        nodes.append(_cast(nodes[-1].outputs[0], ir.DataType.FLOAT))
    if linear.bias is not None:
        bias = linear.bias
        if candidates is not None:
            nodes.append(ir.Node("", "Gather", [bias, candidates], [ir.AttrInt64("axis", 0)]))
            bias = nodes[-1].outputs[0]
            nodes.append(ir.Node("", "Add", [nodes[-2].outputs[0], bias]))
        else:
            nodes.append(ir.Node("", "Add", [nodes[-1].outputs[0], bias]))
    insert_before(linear.matmul, nodes)
    take_over(linear.output, nodes[-1].outputs[0])


def _decompose_norms(graph: ir.Graph) -> None:
    """RMSNormalization in its parts, computed in float32."""
    for node in [node for node in graph if node.op_type == "RMSNormalization"]:
        value, weight = node.inputs[0], node.inputs[1]
        assert value is not None and weight is not None  # required inputs
        epsilon = node.attributes["epsilon"].as_float()
        narrow = node.outputs[0].dtype if node.outputs[0].dtype != ir.DataType.FLOAT else None
        nodes: list[ir.Node] = []

        def op(kind: str, *inputs: ir.Value, nodes: list[ir.Node] = nodes) -> ir.Value:
            nodes.append(ir.Node("", kind, inputs))
            return nodes[-1].outputs[0]

        if narrow is not None:
            nodes.append(_cast(value, ir.DataType.FLOAT))
            value = nodes[-1].outputs[0]
        square = op("Mul", value, value)
        mean = op("ReduceMean", square, _ints(graph, [-1]))
        root = op("Sqrt", op("Add", mean, _number(graph, "epsilon", epsilon)))
        normed = op("Div", value, root)
        if narrow is not None:
            nodes.append(_cast(normed, narrow))
            normed = nodes[-1].outputs[0]
        result = op("Mul", normed, weight)
        insert_before(node, nodes)
        take_over(node.outputs[0], result)
    remove_dead_nodes(graph)


def _fix_batch(graph: ir.Graph) -> None:
    """One sequence: TensorRT wants caches, rotary rows and activations of one known batch size."""
    for value in [*graph.inputs, *graph.outputs]:
        if value.shape is not None and value.shape.rank() > 1 and not value.shape.frozen:
            value.shape = ir.Shape([1, *value.shape[1:]])


def _cast(value: ir.Value, dtype: ir.DataType) -> ir.Node:
    node = ir.Node("", "Cast", [value], [ir.AttrInt64("to", dtype.value)])
    node.outputs[0].type, node.outputs[0].shape = ir.TensorType(dtype), value.shape
    return node


def _ints(graph: ir.Graph, values: list[int]) -> ir.Value:
    name = "ints_" + "_".join(str(value).replace("-", "m") for value in values)
    value = add_initializer(graph, name, ir.DataType.INT64, [len(values)])
    value.const_value = ir.tensor(values, dtype=ir.DataType.INT64, name=name)
    return value


def _number(graph: ir.Graph, kind: str, number: float) -> ir.Value:
    name = f"{kind}_{number!r}"
    value = add_initializer(graph, name, ir.DataType.FLOAT, [1])
    value.const_value = ir.tensor(np.array([number], np.float32), name=name)
    return value
