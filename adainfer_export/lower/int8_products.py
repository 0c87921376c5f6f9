"""How `--prefill int8` reads prompts: linear layers as products of 8-bit integers (W8A8).

    m = max |x| of a position       q = round(127 x / m)       y = (q @ codes) · s · m / 127

The codes are a second copy of the weights, made from the checkpoint's values and not from their
4-bit codes, with a scale s per output (see `adainfer_export.int8`). Activations are scaled per
position as they come, so no calibration data is needed, and an outlier touches its own position
alone. q is stored unsigned around 128: of x86's instructions that multiply bytes, one operand is.

SmolLM2 on AVX-512 VNNI, milliseconds of all layers (4-bit products with int8 and with float32
activations, these): 16 positions 11, 19 and 11; 128 positions 70, 77 and 44. KL from the float
model: 0.37 (4 bits, float32 activations), 0.10 (these). Signed activations take 15 times as long.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from ..int8 import LARGEST_CODE
from ..quantise import Blocks
from ..weights import Blocked, Columns, WeightExpr
from .graph import (
    CONTRIB,
    add_initializer,
    insert_before,
    ints,
    remove_dead_nodes,
    scalar,
    take_over,
)

__all__ = ["INT8_WIDE_ROWS", "multiply_in_int8"]

Weights = dict[str, WeightExpr]

INT8_WIDE_ROWS = 16  # positions from which on they beat 4-bit products
_MIDDLE = 128
_LEAST = 1e-20  # positions of zeros are divided by it


@dataclass(frozen=True)
class _Rows:
    """An activation's codes uint8 `[1, rows, in]`, and their scales `[1, rows, 1]`."""

    codes: ir.Value
    scales: ir.Value


def multiply_in_int8(graph: ir.Graph, stored: Weights) -> Weights:
    """Replaces a lowered stage's products with blocks; what its new initialisers hold, none where
    there are no such products.

    Args:
        stored: what the stage's initialisers hold.
    """
    weights: Weights = {}
    rows: dict[ir.Value, _Rows] = {}
    for node in [node for node in graph if node.op_type == "MatMulNBits"]:
        matrix = stored[str(node.inputs[1].name)] if node.inputs[1] is not None else None
        value = node.inputs[0]
        assert isinstance(matrix, Blocked) and value is not None  # as the lowering makes them
        if value not in rows:
            rows[value] = _quantise(graph, value, node)
        _replace(graph, node, matrix.parts, rows[value], weights)
    remove_dead_nodes(graph)
    return weights


def _replace(
    graph: ir.Graph, node: ir.Node, parts: tuple[str, ...], rows: _Rows, weights: Weights
) -> None:
    width, outputs = node.attributes["K"].as_int(), node.attributes["N"].as_int()
    name, blocks = "+".join(parts), Blocks(8, width)
    codes, scales = f"{name}.int8", f"{name}.output_scales"
    weights[codes] = Columns(parts, "int8", blocks, "packed")
    weights[scales] = Columns(parts, "int8", blocks, "scales")
    inputs = [
        rows.codes,
        add_initializer(graph, codes, ir.DataType.INT8, [width, outputs]),
        scalar(graph, "int8.one", np.float32(1.0)),
        add_initializer(graph, scales, ir.DataType.FLOAT, [outputs]),
        scalar(graph, "int8.middle", np.uint8(_MIDDLE)),
    ]
    product = ir.Node(CONTRIB, "MatMulIntegerToFloat", inputs)
    scaled = ir.Node("", "Mul", [product.outputs[0], rows.scales])
    insert_before(node, [product, scaled])
    take_over(node.outputs[0], scaled.outputs[0])


def _quantise(graph: ir.Graph, value: ir.Value, before: ir.Node) -> _Rows:
    unit = scalar(graph, "int8.unit", np.float32(1.0 / LARGEST_CODE))
    least = scalar(graph, "int8.least", np.float32(_LEAST))
    middle = scalar(graph, "int8.middle", np.uint8(_MIDDLE))
    size = ir.Node("", "Abs", [value])
    largest = ir.Node("", "ReduceMax", [size.outputs[0], ints(graph, "axes", [-1])])
    share = ir.Node("", "Mul", [largest.outputs[0], unit])
    scales = ir.Node("", "Max", [share.outputs[0], least])
    by_row = ir.Node("", "Reshape", [scales.outputs[0], ints(graph, "shape", [-1])])
    shape = ir.Node("", "Shape", [by_row.outputs[0]])
    zeros = ir.Node("", "Expand", [middle, shape.outputs[0]])
    inputs = [value, by_row.outputs[0], zeros.outputs[0]]
    codes = ir.Node("", "QuantizeLinear", inputs, [ir.AttrInt64("axis", 1)])
    insert_before(before, [size, largest, share, scales, by_row, shape, zeros, codes])
    return _Rows(codes.outputs[0], scales.outputs[0])
