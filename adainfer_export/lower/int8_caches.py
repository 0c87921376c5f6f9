"""KV caches in int8 for ONNX Runtime's GroupQueryAttention on CPUs.

Few positions attend to the codes as they are: at one position SmolLM2's layers take 3 to 6% less
time than with a float32 cache behind 200 positions, and a quarter less behind 1,000 (AVX-512, two
cores, ONNX Runtime 1.32). Many positions take longer in that kernel than in float32: 128 of them
1.3 times as long, 512 twice. Their form unpacks what is before them once, attends in float32, and
writes the codes of the new positions (ONNX TensorScatter, in place): 1.03 times at both.

Symmetric codes with fixed scales: see `adainfer_runtime.backends.kv_scales`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from adainfer_runtime.backends.kv_scales import KvScales

from ..errors import LoweringError
from .attention import TOTAL_LENGTH
from .graph import insert_before, ints, scalar, table, take_over
from .group_query import CACHE_SCALES, PASTS, PRESENTS, attentions, drop_empty_inputs

__all__ = ["attend_in_float", "quantise_caches"]

_TYPES = ("k_quant_type", "v_quant_type")
_BITS = "kv_cache_bit_width"
_END = 1 << 31  # beyond any position


def quantise_caches(graph: ir.Graph, scales: KvScales) -> None:
    """Gives every GroupQueryAttention of the decoder, in order of layers, caches of int8.

    Where all channels of a layer have one scale, its operator takes one for the tensor, which is a
    little faster.
    """
    for layer, node in enumerate(attentions(graph), 1):
        own = scales.of(layer, node.attributes["kv_num_heads"].as_int())
        whole = all(np.all(part == part.flat[0]) for part in own)
        node.resize_inputs(max(CACHE_SCALES) + 1)
        for at, part, values in zip(CACHE_SCALES, ("key", "value"), own, strict=True):
            flat = values.reshape(-1)[: 1 if whole else None].copy()
            node.replace_input_with(at, table(graph, f"{part}_scale.{layer}", flat))
        for name in _TYPES:
            kind = "PER_TENSOR" if whole else "PER_CHANNEL"
            node.attributes[name] = ir.AttrString(name, kind)
        node.attributes[_BITS] = ir.AttrInt64(_BITS, 8)
        caches = (*(node.inputs[at] for at in PASTS), *(node.outputs[at] for at in PRESENTS))
        for value in caches:
            assert value is not None  # attention without a cache is refused before
            value.type = ir.TensorType(ir.DataType.INT8)


def attend_in_float(graph: ir.Graph) -> None:
    """The form for many positions, in place; graphs with float caches stay as they are."""
    quantised = [node for node in attentions(graph) if len(node.inputs) > max(CACHE_SCALES)]
    if not quantised:
        return
    past = _past_length(graph)
    for node in quantised:
        for cache, scale, present in zip(PASTS, CACHE_SCALES, PRESENTS, strict=True):
            _unpack(graph, _Cache(node, cache, scale, present), past)
        node.resize_inputs(min(CACHE_SCALES))
        drop_empty_inputs(node)
        for name in (*_TYPES, _BITS):
            del node.attributes[name]


@dataclass(frozen=True)
class _Cache:
    """K or V of an attention: places of its inputs and its output."""

    attention: ir.Node
    past: int
    scale: int
    present: int


def _past_length(graph: ir.Graph) -> ir.Value:
    """Int64 `[1]`: positions before those of the pass."""
    total = next((value for value in graph.inputs if value.name == TOTAL_LENGTH), None)
    if total is None:
        raise LoweringError(f"stage {graph.name}: no input {TOTAL_LENGTH}")
    limits = [ir.AttrInt64("start", 1), ir.AttrInt64("end", 2)]
    rows = ir.Node("", "Shape", [graph.inputs[0]], limits)
    length = ir.Node("", "Cast", [total], [ir.AttrInt64("to", ir.DataType.INT64.value)])
    past = ir.Node("", "Sub", [length.outputs[0], rows.outputs[0]])
    graph.insert_before(graph[0], [rows, length, past])
    return past.outputs[0]


def _unpack(graph: ir.Graph, cache: _Cache, past: ir.Value) -> None:
    """Floats for the attention before it, the new positions' codes behind it."""
    node = cache.attention
    codes, scale = node.inputs[cache.past], node.inputs[cache.scale]
    assert codes is not None and scale is not None  # as `quantise_caches` made them
    heads = node.attributes["kv_num_heads"].as_int()
    by_head = [1, 1, 1, 1] if scale.shape == (1,) else [1, heads, 1, -1]
    to_float = [ir.AttrInt64("to", ir.DataType.FLOAT.value)]
    axis = ints(graph, "axis", [2])

    steps = ir.Node("", "Reshape", [scale, ints(graph, "shape", by_head)])
    before = ir.Node("", "Slice", [codes, ints(graph, "at", [0]), past, axis])
    unpacked = ir.Node("", "Cast", [before.outputs[0]], to_float)
    floats = ir.Node("", "Mul", [unpacked.outputs[0], steps.outputs[0]])
    insert_before(node, [steps, before, unpacked, floats])
    node.replace_input_with(cache.past, floats.outputs[0])

    whole = node.outputs[cache.present]
    rows = ir.Node("", "Slice", [whole, past, ints(graph, "at", [_END]), axis])
    divided = ir.Node("", "Div", [rows.outputs[0], steps.outputs[0]])
    unit = scalar(graph, "int8.one", np.float32(1.0))
    zero = scalar(graph, "int8.zero", np.int8(0))
    packed = ir.Node("", "QuantizeLinear", [divided.outputs[0], unit, zero])
    inputs = [codes, packed.outputs[0], past]
    written = ir.Node("", "TensorScatter", inputs, [ir.AttrInt64("axis", 2)])
    node.graph.insert_after(node, [rows, divided, packed, written])  # type: ignore[union-attr]
    take_over(whole, written.outputs[0])
    rows.replace_input_with(0, whole)
    whole.type, whole.shape = ir.TensorType(ir.DataType.FLOAT), None
