"""Final norm and LM head, read off the probe's graph: what adapters are distilled through."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from adainfer_runtime.manifest import Manifest

from ..quantise import dequantise_blocks

__all__ = ["Head", "read_head"]

Float32 = npt.NDArray[np.float32]

_RMS = ("RMSNormalization", "SimplifiedLayerNormalization")


@dataclass(frozen=True)
class Head:
    """`logits = norm(hidden) @ weightᵀ`, within ± `cap` (by tanh) where there is one.

    Attributes:
        norm_weight, norm_bias: `[hidden]`; a bias only where the norm has one.
        centred: LayerNorm, which subtracts the mean; else RMSNorm.
        weight: `[vocab, hidden]` in float, or packed codes, which `rows` unpacks.
        scales: of the codes; None in float.
    """

    norm_weight: Float32
    norm_bias: Float32 | None
    epsilon: float
    centred: bool
    weight: npt.NDArray[Any]
    scales: Float32 | None
    bits: Literal[4, 8]
    cap: float | None = None

    def rows(self, tokens: npt.NDArray[np.int64]) -> Float32:
        """`[tokens, hidden]`: these rows of the head, in float; the others are not read."""
        if self.scales is None:
            return np.ascontiguousarray(self.weight[tokens], np.float32)
        return dequantise_blocks(self.weight[tokens], self.scales[tokens], self.bits)


def read_head(folder: Path, manifest: Manifest) -> Head | None:
    """None where the probe is more than a norm and a matrix (projections, biases)."""
    graph = ir.load(folder / manifest.probe.file).graph
    logits, cap = _uncapped(next(v for v in graph.outputs if v.name == "logits"))
    product = _through_reshapes(logits)
    if product is None or product.op_type not in ("MatMulNBits", "Gemm", "MatMul"):
        return None
    norm = _through_reshapes(product.inputs[0])
    if norm is None or norm.op_type not in (*_RMS, "LayerNormalization"):
        return None
    source = norm.inputs[0]
    if source is None or source.name != "hidden":
        return None
    constants = [_constant(value) for value in product.inputs[1:]]
    quantised = product.op_type == "MatMulNBits"
    if len(constants) != (2 if quantised else 1):
        return None
    weight = constants[0]
    if not quantised and not (product.op_type == "Gemm" and _integer(product, "transB", 0)):
        weight = weight.T
    norm_weight, *norm_bias = [_constant(value) for value in norm.inputs[1:]]
    epsilon = norm.attributes.get("epsilon")
    return Head(
        norm_weight=norm_weight,
        norm_bias=norm_bias[0] if norm_bias else None,
        epsilon=1e-5 if epsilon is None else float(epsilon.as_float()),
        centred=norm.op_type == "LayerNormalization",
        weight=weight,
        scales=constants[1] if quantised else None,
        bits=cast(Literal[4, 8], _integer(product, "bits", 4)),
        cap=cap,
    )


def _uncapped(logits: ir.Value) -> tuple[ir.Value | None, float | None]:
    """The value before `cap · tanh(value / cap)`, and the cap; else the value itself."""
    multiply = logits.producer()
    tanh = multiply.inputs[0] if multiply is not None and multiply.op_type == "Mul" else None
    node = tanh.producer() if tanh is not None else None
    divided = node.inputs[0] if node is not None and node.op_type == "Tanh" else None
    divide = divided.producer() if divided is not None else None
    if divide is None or divide.op_type != "Div":
        return logits, None
    return divide.inputs[0], float(_constant(divide.inputs[1]))


def _through_reshapes(value: ir.Value | None) -> ir.Node | None:
    node = value.producer() if value is not None else None
    while node is not None and node.op_type in ("Reshape", "Unsqueeze", "Cast"):
        source = node.inputs[0]
        node = source.producer() if source is not None else None
    return node


def _constant(value: ir.Value | None) -> npt.NDArray[Any]:
    assert value is not None and value.const_value is not None  # a weight, by the operator's spec
    return np.asarray(value.const_value.numpy())


def _integer(node: ir.Node, name: str, default: int) -> int:
    attribute = node.attributes.get(name)
    return default if attribute is None else attribute.as_int()
