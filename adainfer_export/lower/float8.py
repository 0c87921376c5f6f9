"""Linear layers as products of 8-bit floats: what TensorRT runs on FP8 tensor cores.

    m = max |x| of a position            x' = DQ(Q(x / m))
    y = (x' @ DQ(codes)) · s · m         s: a scale per output (see `adainfer_export.float8`)

Activations are scaled per position as they come, so no calibration data is needed, nothing is cut
off, and an outlier touches its own position alone. TensorRT takes only constants as scales of
QuantizeLinear and DequantizeLinear, so these have a fixed power of two, and the scales proper are
multiplied outside; those of the weights as well, since TensorRT 11 is reported to miss the FP8
product where weights have one per output (NVIDIA/TensorRT-Model-Connect#1386; RTX 1.7 finds it).

Dequantising the weights alone, which TensorRT takes as well, is no gain: TensorRT-RTX 1.7 writes
the 16-bit matrix to memory in every pass before multiplying by it, for one position and for many,
wherever products share their input, and for one position wherever outputs have scales of their own.
"""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np
import onnx_ir as ir

from ..float8 import FLOAT8_UNIT
from ..quantise import Blocks
from ..weights import Columns, ElementName, WeightExpr
from .graph import Linear, add_initializer, insert_before, ints, scalar

__all__ = ["Float8Products"]

_LEAST = 6e-5  # the least normal float16: positions of zeros are divided by it


@dataclass(frozen=True)
class _Rows:
    """An activation as it is multiplied, and what it was divided by, per position."""

    values: ir.Value
    largest: ir.Value


class Float8Products:
    """The linear layers of one stage; those that share an input share its codes."""

    def __init__(
        self, graph: ir.Graph, activations: ElementName, weights: dict[str, WeightExpr]
    ) -> None:
        """`weights` takes what new initialisers hold; scales are stored as `activations`."""
        self._graph, self._activations, self._weights = graph, activations, weights
        self._rows: dict[ir.Value, _Rows] = {}

    def nodes(self, linear: Linear) -> list[ir.Node]:
        """What stands for a product; the last gives its value, without the bias."""
        name = str(linear.weight.name)
        if linear.input not in self._rows:
            self._rows[linear.input] = self._quantise(linear, f"{name}.input")
        rows = self._rows[linear.input]
        codes, scales = self._store(linear, name)
        weight = ir.Node("", "DequantizeLinear", [codes, self._unit(f"{name}.unit")])
        product = ir.Node("", "MatMul", [rows.values, weight.outputs[0]])
        # First the smaller factor: activations may be near float16's limit.
        scaled = ir.Node("", "Mul", [product.outputs[0], scales])
        result = ir.Node("", "Mul", [scaled.outputs[0], rows.largest])
        return [weight, product, scaled, result]

    def _quantise(self, linear: Linear, name: str) -> _Rows:
        least = scalar(self._graph, f"{name}.least", np.float32(_LEAST))
        zero = scalar(self._graph, f"{name}.zero", ml_dtypes.float8_e4m3fn(0))
        size = ir.Node("", "Abs", [linear.input])
        most = ir.Node("", "ReduceMax", [size.outputs[0], ints(self._graph, "axes", [-1])])
        largest = ir.Node("", "Max", [most.outputs[0], least])
        share = ir.Node("", "Div", [linear.input, largest.outputs[0]])
        inputs = [share.outputs[0], self._unit(f"{name}.unit"), zero]
        codes = ir.Node("", "QuantizeLinear", inputs)
        codes.outputs[0].type = ir.TensorType(ir.DataType.FLOAT8E4M3FN)
        # A scale of its own: TensorRT has crashed where several nodes share one.
        inputs = [codes.outputs[0], self._unit(f"{name}.unit_back")]
        values = ir.Node("", "DequantizeLinear", inputs)
        insert_before(linear.matmul, [size, most, largest, share, codes, values])
        return _Rows(values.outputs[0], largest.outputs[0])

    def _store(self, linear: Linear, name: str) -> tuple[ir.Value, ir.Value]:
        blocks = Blocks(8, linear.in_features)
        shape = [linear.in_features, linear.out_features]
        codes, scales = f"{name}.float8", f"{name}.output_scales"
        dtype = self._activations
        self._weights[codes] = Columns((name,), "float8", blocks, "packed", dtype)
        self._weights[scales] = Columns((name,), "float8", blocks, "scales", dtype)
        return (
            add_initializer(self._graph, codes, ir.DataType.FLOAT8E4M3FN, shape),
            add_initializer(self._graph, scales, ir.DataType.FLOAT, [1, shape[1]]),
        )

    def _unit(self, name: str) -> ir.Value:
        return scalar(self._graph, name, np.float32(FLOAT8_UNIT))
