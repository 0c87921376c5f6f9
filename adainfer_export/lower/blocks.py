"""Matrices in blocks as nodes of the `ort-cpu` dialect: products with them, and rows of them.

Blocks that the export makes are symmetric, which MatMulNBits and GatherBlockQuantized compute as
they are. Blocks of a checkpoint that are kept are computed in float32 by 4-bit operators alone:

    w = 16 (high - 8) s + (low - 8) s + shift      (8 bits; with 4 the first term is missing)
    x·w over a block = what MatMulNBits gives for codes and scales + shift * (sum of x's block)

MatMulNBits has float zero points and 8-bit codes too, but unpacks the whole matrix for them: one
row of 2048x5632 takes a core 42 and 66 ms, symmetric 4 bits 0.81 ms, and with the sums 0.83 ms.
"""

from __future__ import annotations

import onnx_ir as ir

from ..errors import UnsupportedError
from ..quantise import Blocks
from ..weights import Blocked, Dense, Rows, WeightExpr
from .graph import CONTRIB, add_initializer, ints

__all__ = ["add_rows", "blocked_product", "gather_rows"]

Weights = dict[str, WeightExpr]


def blocked_product(
    graph: ir.Graph,
    value: ir.Value,
    names: tuple[str, ...],
    shape: tuple[int, int],
    blocks: Blocks,
    accuracy_level: int,
    weights: Weights,
    rows: tuple[int, int] | None = None,
) -> list[ir.Node]:
    """Nodes of `x Wᵀ` for W `[out, in]`, the rows of all named tensors; the last one gives it.

    Args:
        rows: first row and the one behind the last, where a stage that holds W gives a part of it.
    """
    stored = _stored(graph, names, shape, blocks, weights, rows)
    first, last = rows or (0, shape[0])
    columns = shape[1]
    attributes = {
        "K": columns,
        "N": last - first,
        "bits": 4 if blocks.kept else blocks.bits,
        "block_size": blocks.block_size,
        "accuracy_level": accuracy_level,
    }
    products = [
        ir.Node(CONTRIB, "MatMulNBits", [value, stored[field], stored["scales"]], _ints(attributes))
        for field in ("packed", "low")
        if field in stored
    ]
    nodes = _add_planes(graph, products)
    if "shifts" in stored:
        nodes += _shift_product(
            graph, value, stored["shifts"], nodes[-1].outputs[0], columns, blocks
        )
    return nodes


def gather_rows(
    graph: ir.Graph,
    name: str,
    shape: tuple[int, int],
    indices: ir.Value,
    blocks: Blocks,
    weights: Weights,
) -> list[ir.Node]:
    """Nodes of `W[indices]` for W `[rows, width]`; the last one gives it."""
    rows, width = shape
    stored = _stored(graph, (name,), shape, blocks, weights)
    bits = 4 if blocks.kept else blocks.bits
    attributes = {
        "bits": bits,
        "block_size": blocks.block_size,
        "gather_axis": 0,
        "quantize_axis": 1,
    }
    parts = []
    for field in ("packed", "low"):
        if field in stored:
            stored[field].shape = ir.Shape([rows, width * bits // 8])
            inputs = [stored[field], indices, stored["scales"]]
            parts.append(ir.Node(CONTRIB, "GatherBlockQuantized", inputs, _ints(attributes)))
    nodes = _add_planes(graph, parts)
    if "shifts" in stored:
        nodes += _shift_rows(graph, stored["shifts"], indices, nodes[-1].outputs[0], blocks)
    return nodes


def _stored(
    graph: ir.Graph,
    names: tuple[str, ...],
    shape: tuple[int, int],
    blocks: Blocks,
    weights: Weights,
    part: tuple[int, int] | None = None,
) -> dict[str, ir.Value]:
    """The initialisers of a matrix or of some of its rows, by field."""
    rows, columns = shape
    if columns % blocks.block_size:
        raise UnsupportedError(
            f"{names[0]}: width {columns} is not divisible by the block of {blocks.block_size}, "
            "and feed-forward widths alone are padded; export with a --block-size that divides it, "
            "or --precision fp32"
        )
    count = columns // blocks.block_size
    planes = blocks.bits // 4 if blocks.kept else 1
    width = blocks.block_size * blocks.bits // 8 // planes
    fields = {"packed": (ir.DataType.UINT8, [rows, count, width])}
    if planes == 2:
        fields["low"] = fields["packed"]
    fields["scales"] = (ir.DataType.FLOAT, [rows, count])
    if blocks.shifted or planes == 2:
        fields["shifts"] = fields["scales"]
    name = "+".join(names)
    if blocks.kept:
        name += ".kept"
    found = {}
    for field, (dtype, dims) in fields.items():
        whole = Blocked(names, blocks, field)  # type: ignore[arg-type]
        if part is None:
            weights[f"{name}.{field}"] = whole
            found[field] = add_initializer(graph, f"{name}.{field}", dtype, dims)
        else:
            found[field] = add_rows(graph, f"{name}.{field}", whole, (*part, rows), dims, weights)
    return found


def add_rows(
    graph: ir.Graph,
    name: str,
    whole: Dense | Blocked,
    of: tuple[int, int, int],
    shape: list[int],
    weights: Weights,
) -> ir.Value:
    """An initialiser that is rows (start, end) of a stored tensor `[total, …]` of this shape."""
    start, end, total = of
    part = f"{name}.rows_{start}_{end}"
    weights[part] = Rows(whole, start, end, total)
    packed = isinstance(whole, Blocked) and whole.field in ("packed", "low")
    dtype = ir.DataType.UINT8 if packed else ir.DataType.FLOAT
    return add_initializer(graph, part, dtype, [end - start, *shape[1:]])


def _add_planes(graph: ir.Graph, parts: list[ir.Node]) -> list[ir.Node]:
    if len(parts) == 1:
        return parts
    high, low = parts
    sixteen = add_initializer(graph, "sixteen", ir.DataType.FLOAT, [1])
    sixteen.const_value = ir.tensor([16.0], dtype=ir.DataType.FLOAT, name="sixteen")
    scaled = ir.Node("", "Mul", [high.outputs[0], sixteen])
    return [high, low, scaled, ir.Node("", "Add", [scaled.outputs[0], low.outputs[0]])]


def _shift_product(
    graph: ir.Graph,
    value: ir.Value,
    shifts: ir.Value,
    product: ir.Value,
    width: int,
    blocks: Blocks,
) -> list[ir.Node]:
    """Adds shifts `[out, blocks]` times the sums of x's blocks. The batch is always 1."""
    count, size = width // blocks.block_size, blocks.block_size
    split = ir.Node("", "Reshape", [value, ints(graph, "shape", [-1, count, size])])
    axis = ints(graph, "axes", [2])
    sums = ir.Node("", "ReduceSum", [split.outputs[0], axis], [ir.AttrInt64("keepdims", 0)])
    shift = ir.Node("", "Gemm", [sums.outputs[0], shifts], [ir.AttrInt64("transB", 1)])
    return [split, sums, shift, ir.Node("", "Add", [product, shift.outputs[0]])]


def _shift_rows(
    graph: ir.Graph, shifts: ir.Value, indices: ir.Value, rows: ir.Value, blocks: Blocks
) -> list[ir.Node]:
    """Adds shifts `[rows, blocks]` to the values of the gathered rows' blocks."""
    shape = ir.Node("", "Shape", [rows])
    gathered = ir.Node("", "Gather", [shifts, indices], [ir.AttrInt64("axis", 0)])
    assert shifts.shape is not None  # made with a static shape
    count = int(shifts.shape[1])  # type: ignore[arg-type]
    column = ir.Node("", "Reshape", [gathered.outputs[0], ints(graph, "shape", [-1, count, 1])])
    split = ir.Node("", "Reshape", [rows, ints(graph, "shape", [-1, count, blocks.block_size])])
    added = ir.Node("", "Add", [split.outputs[0], column.outputs[0]])
    back = ir.Node("", "Reshape", [added.outputs[0], shape.outputs[0]])
    return [shape, gathered, column, split, added, back]


def _ints(attributes: dict[str, int]) -> list[ir.Attr]:
    return [ir.AttrInt64(name, value) for name, value in attributes.items()]
