"""A layer stage of an engine folder as a differentiable torch function.

What is distilled must pass gradients through the frozen layers above it, with the weights that the
engine really has (dequantised where they are quantised). So the stage's own ONNX graph is read and
its operators are evaluated in torch, in float32; attention is left to the caller, who knows the K
and V.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx_ir as ir

from ..quantise import dequantise_blocks
from .standard_attention import AttentionSpec, FoundAttention, find_attentions

__all__ = ["Attend", "AttentionSpec", "TorchStage", "read_torch_stage"]


# q [..., heads · head_dim], k and v [..., kv_heads · head_dim] before rotary, to [..., heads · d].
Attend = Callable[[AttentionSpec, Any, Any, Any], Any]


class TorchStage:
    """`hidden [..., hidden_size]` to the same after the stage's layers."""

    def __init__(self, graph: ir.Graph, attentions: Sequence[FoundAttention] = ()) -> None:
        """Attentions in standard operators are given; the others are operators themselves."""
        import torch

        self._torch = torch
        self._standard = {found.result: found for found in attentions}
        self._nodes = _needed_nodes(graph, self._standard)
        self._constants = dict(self._read_constants(graph))
        self._output = graph.outputs[0]

    def __call__(self, hidden: Any, attend: Attend) -> Any:
        """Runs the layers; every attention is `attend`'s."""
        values: dict[ir.Value, Any] = {}
        for node in self._nodes:
            if node.op_type == "GroupQueryAttention":
                values[node.outputs[0]] = self._attention(node, values, attend)
                continue
            if found := self._standard.get(node.outputs[0]):
                operands = (found.query, found.key, found.value)
                taken = [self._get(values, operand) for operand in operands]
                values[found.result] = attend(found.spec, *taken)
                continue
            inputs = [
                hidden if value is not None and value.name == "hidden" else self._get(values, value)
                for value in node.inputs
            ]
            results = _OPERATORS[node.op_type](self._torch, node, inputs)
            for output, result in zip(node.outputs, results, strict=False):
                values[output] = result
        return values[self._output]

    def _get(self, values: Mapping[ir.Value, Any], value: ir.Value | None) -> Any:
        if value is None:
            return None
        return values[value] if value in values else self._constants.get(str(value.name))

    def _attention(self, node: ir.Node, values: Mapping[ir.Value, Any], attend: Attend) -> Any:
        spec = _attention_spec(node)
        query, key, value = (self._get(values, entry) for entry in node.inputs[:3])
        if key is None:
            width = query.shape[-1] // (spec.heads + 2 * spec.kv_heads)
            sizes = [spec.heads * width, spec.kv_heads * width, spec.kv_heads * width]
            query, key, value = query.split(sizes, dim=-1)
        return attend(spec, query, key, value)

    def _read_constants(self, graph: ir.Graph) -> Any:
        """Weights as torch tensors; a quantised pair becomes one matrix `[in, out]`."""
        packed = {}
        for node in self._nodes:
            if node.op_type == "MatMulNBits":
                codes, scales = (np.asarray(_tensor(value)) for value in node.inputs[1:3])
                bits = node.attributes["bits"].as_int()
                matrix = dequantise_blocks(codes, scales, cast(Any, bits))
                packed[str(cast(ir.Value, node.inputs[1]).name)] = matrix
            elif node.op_type == "DequantizeLinear" and _is_weight(node):
                codes, scales = (np.asarray(_tensor(v), np.float32) for v in node.inputs[:2])
                if scales.ndim:  # a row for each block; else one scale, of 8-bit floats
                    scales = np.repeat(scales, len(codes) // len(scales), axis=0)
                packed[str(cast(ir.Value, node.inputs[0]).name)] = (codes * scales).T
        for name, value in graph.initializers.items():
            if name in packed:
                yield name, self._torch.from_numpy(packed[name].T.copy())
            elif value.const_value is not None and not name.endswith(".scales"):
                yield name, self._constant(value.const_value.numpy())

    def _constant(self, stored: Any) -> Any:
        """Sizes as they are; weights in float32, which 16-bit ones become without a loss."""
        array = np.array(stored)
        integers = np.issubdtype(array.dtype, np.integer)
        return self._torch.from_numpy(array if integers else array.astype(np.float32))


def read_torch_stage(path: Path) -> TorchStage | None:
    """None where the graph holds an operator that is not known here."""
    graph = ir.load(path).graph
    attentions = find_attentions(graph)
    if attentions is None:
        return None
    standard = {found.result: found for found in attentions}
    nodes = _needed_nodes(graph, standard)
    known = {*_OPERATORS, "GroupQueryAttention"}
    if any(node.op_type not in known and node.outputs[0] not in standard for node in nodes):
        return None
    if any(len(node.inputs) > 3 for node in nodes if node.op_type == "MatMulNBits"):
        return None  # zero points, which only graphs have that were split as they are
    return TorchStage(graph, attentions)


def _needed_nodes(graph: ir.Graph, attentions: Mapping[ir.Value, FoundAttention]) -> list[ir.Node]:
    """In their order; of an attention in standard operators the one that gives its result."""
    wanted: set[ir.Value | None] = {graph.outputs[0]}
    found = []
    for node in reversed(list(graph)):
        if node.op_type == "Constant" or not wanted & set(node.outputs):
            continue
        found.append(node)
        inside = attentions.get(node.outputs[0])
        if inside is not None:
            wanted.update((inside.query, inside.key, inside.value))
        else:  # of a product with blocks what it reads: scales become part of the matrix
            wanted.update(node.inputs[:2] if node.op_type == "MatMulNBits" else node.inputs)
    return found[::-1]


def _attention_spec(node: ir.Node) -> AttentionSpec:
    window = node.attributes.get("local_window_size")
    softcap = node.attributes.get("softcap")
    return AttentionSpec(
        node.attributes["num_heads"].as_int(),
        node.attributes["kv_num_heads"].as_int(),
        node.attributes["scale"].as_float(),
        None if window is None or window.as_int() < 0 else window.as_int(),
        0.0 if softcap is None else softcap.as_float(),
    )


def _is_weight(node: ir.Node) -> bool:
    """Of a DequantizeLinear; else it stands behind the QuantizeLinear of an activation."""
    return cast(ir.Value, node.inputs[0]).is_initializer()


def _tensor(value: ir.Value | None) -> Any:
    assert value is not None  # a weight, by the operator's spec
    if value.const_value is not None:
        return value.const_value.numpy()
    product = value.producer()
    assert product is not None and product.op_type == "Mul"  # of constants (`lower.few_rows`)
    return _tensor(product.inputs[0]) * _tensor(product.inputs[1])


def _rms(torch: Any, value: Any, weight: Any, node: ir.Node) -> Any:
    epsilon = node.attributes["epsilon"].as_float()
    return value * torch.rsqrt(value.square().mean(dim=-1, keepdim=True) + epsilon) * weight


def _skip_rms(torch: Any, node: ir.Node, inputs: list[Any]) -> list[Any]:
    total = inputs[0] + inputs[1]
    return [_rms(torch, total, inputs[2], node), None, None, total]


def _layer_norm(torch: Any, node: ir.Node, inputs: list[Any]) -> list[Any]:
    bias = inputs[2] if len(inputs) > 2 else None
    epsilon = node.attributes["epsilon"].as_float()
    shape = inputs[1].shape
    return [torch.nn.functional.layer_norm(inputs[0], shape, inputs[1], bias, epsilon)]


def _split(torch: Any, node: ir.Node, inputs: list[Any]) -> list[Any]:
    sizes = [int(size) for size in inputs[1]]
    return list(torch.split(inputs[0], sizes, dim=node.attributes["axis"].as_int()))


def _quantise(torch: Any, _: ir.Node, inputs: list[Any]) -> list[Any]:
    """To 8-bit floats, whose rounding gradients pass as if it were none."""
    values = inputs[0] / inputs[1]
    limit = torch.finfo(torch.float8_e4m3fn).max
    codes = values.detach().clamp(-limit, limit).to(torch.float8_e4m3fn).to(values.dtype)
    return [values + (codes - values.detach())]


def _quick_gelu(torch: Any, node: ir.Node, inputs: list[Any]) -> list[Any]:
    alpha = node.attributes["alpha"].as_float()
    return [inputs[0] * torch.sigmoid(alpha * inputs[0])]


_Operator = Callable[[Any, ir.Node, list[Any]], list[Any]]
_OPERATORS: dict[str, _Operator] = {
    "RMSNormalization": lambda torch, node, i: [_rms(torch, i[0], i[1], node)],
    "SimplifiedLayerNormalization": lambda torch, node, i: [_rms(torch, i[0], i[1], node)],
    "SkipSimplifiedLayerNormalization": _skip_rms,
    "LayerNormalization": _layer_norm,
    "MatMulNBits": lambda _, __, i: [i[0] @ i[1]],
    "MatMul": lambda _, __, i: [i[0] @ i[1]],
    "Add": lambda _, __, i: [i[0] + i[1]],
    "Mul": lambda _, __, i: [i[0] * i[1]],
    "Relu": lambda torch, _, i: [torch.relu(i[0])],
    "Sigmoid": lambda torch, _, i: [torch.sigmoid(i[0])],
    "Split": _split,
    "Swish": lambda torch, _, i: [torch.nn.functional.silu(i[0])],
    # RMSNorm in its parts, over the last axis.
    "ReduceMean": lambda _, __, i: [i[0].mean(dim=-1, keepdim=True)],
    "Sqrt": lambda torch, _, i: [torch.sqrt(i[0])],
    "Div": lambda _, __, i: [i[0] / i[1]],
    "Abs": lambda torch, _, i: [torch.abs(i[0])],
    "ReduceMax": lambda _, __, i: [i[0].amax(dim=-1, keepdim=True)],
    "Max": lambda torch, _, i: [torch.maximum(i[0], i[1])],
    "QuantizeLinear": _quantise,
    # Weights are unpacked beforehand.
    "DequantizeLinear": lambda _, node, i: [i[0] if _is_weight(node) else i[0] * i[1]],
    "Cast": lambda _, __, i: [i[0]],  # between 16 and 32 bits: all is float32 here
    "QuickGelu": _quick_gelu,
}
