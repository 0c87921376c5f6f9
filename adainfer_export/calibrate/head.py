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
    """`logits = norm(hidden) @ weightᵀ + bias`, within ± `cap` (by tanh) where there is one.

    Attributes:
        norm_weight, norm_bias: `[hidden]`; a bias only where the norm has one.
        centred: LayerNorm, which subtracts the mean; else RMSNorm.
        weight: `[vocab, hidden]` in float, or packed codes, which `rows` unpacks.
        scales: of the codes; None in float.
        bias: `[vocab]`, where there is one.
    """

    norm_weight: Float32
    norm_bias: Float32 | None
    epsilon: float
    centred: bool
    weight: npt.NDArray[Any]
    scales: Float32 | None
    bits: Literal[4, 8]
    cap: float | None = None
    bias: Float32 | None = None

    def normed(self, hidden: Float32) -> Float32:
        """Behind the final norm: what the matrix reads."""
        if self.centred:
            hidden = hidden - hidden.mean(axis=-1, keepdims=True)
        scale = np.sqrt((hidden**2).mean(axis=-1, keepdims=True) + self.epsilon)
        normed: Float32 = hidden / scale * self.norm_weight
        return normed if self.norm_bias is None else normed + self.norm_bias

    def logits(self, normed: Float32, tokens: npt.NDArray[np.int64]) -> Float32:
        """`[positions, tokens]` of normed hidden states."""
        logits: Float32 = normed @ self.rows(tokens).T
        if self.bias is not None:
            logits = logits + self.bias[tokens]
        return logits if self.cap is None else self.cap * np.tanh(logits / self.cap)

    def rows(self, tokens: npt.NDArray[np.int64]) -> Float32:
        """`[tokens, hidden]`: these rows of the head, in float; the others are not read."""
        if self.scales is None:
            return np.ascontiguousarray(self.weight[tokens], np.float32)
        return dequantise_blocks(self.weight[tokens], self.scales[tokens], self.bits)


def read_head(folder: Path, manifest: Manifest) -> Head | None:
    """None where the probe is more than that (projections), or its weights are stored otherwise."""
    graph = ir.load(folder / manifest.probe.file).graph
    capped, cap = _uncapped(next(v for v in graph.outputs if v.name == "logits"))
    logits, bias = _unbiased(capped)
    product = _through_reshapes(logits)
    if product is None or product.op_type not in ("MatMulNBits", "Gemm", "MatMul"):
        return None
    norm = _read_norm(_through_reshapes(product.inputs[0]))
    if norm is None or _through_casts(norm.source) != "hidden":
        return None
    constants = [_constant(value) for value in product.inputs[1:]]
    quantised = product.op_type == "MatMulNBits"
    if len(constants) != (2 if quantised else 1):
        return None
    weight = constants[0]
    if not quantised and not (product.op_type == "Gemm" and _integer(product, "transB", 0)):
        weight = weight.T
    return Head(
        norm_weight=norm.weight,
        norm_bias=norm.bias,
        epsilon=norm.epsilon,
        centred=norm.centred,
        weight=weight,
        scales=constants[1] if quantised else None,
        bits=cast(Literal[4, 8], _integer(product, "bits", 4)),
        cap=cap,
        bias=bias,
    )


@dataclass(frozen=True)
class _Norm:
    source: ir.Value | None
    weight: Float32
    bias: Float32 | None
    epsilon: float
    centred: bool


def _read_norm(node: ir.Node | None) -> _Norm | None:
    """A norm as one operator, or RMSNorm in the parts that `lower.standard` makes of it."""
    if node is None:
        return None
    if node.op_type in (*_RMS, "LayerNormalization"):
        weight, *bias = [_constant(value) for value in node.inputs[1:]]
        epsilon = node.attributes.get("epsilon")
        return _Norm(
            node.inputs[0],
            weight,
            bias[0] if bias else None,
            1e-5 if epsilon is None else float(epsilon.as_float()),
            node.op_type == "LayerNormalization",
        )
    divide = _through_reshapes(node.inputs[0]) if node.op_type == "Mul" else None
    if divide is None or divide.op_type != "Div":
        return None
    found = [divide]
    for kind in ("Sqrt", "Add", "ReduceMean"):  # of the divisor, from the outside in
        value = found[-1].inputs[1 if kind == "Sqrt" else 0]
        inner = value.producer() if value is not None else None
        if inner is None or inner.op_type != kind:
            return None
        found.append(inner)
    added = float(_constant(found[2].inputs[1]).item())
    return _Norm(divide.inputs[0], _constant(node.inputs[1]), None, added, False)


def _through_casts(value: ir.Value | None) -> str | None:
    """The name of what a value was cast from."""
    while value is not None and (node := value.producer()) and node.op_type == "Cast":
        value = node.inputs[0]
    return None if value is None else value.name


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


def _unbiased(logits: ir.Value | None) -> tuple[ir.Value | None, Float32 | None]:
    """The value before a bias is added, and the bias; else the value itself."""
    add = logits.producer() if logits is not None else None
    if add is None or add.op_type != "Add":
        return logits, None
    product, bias = add.inputs
    if bias is None or bias.const_value is None:
        return logits, None
    return product, _constant(bias).astype(np.float32)


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
