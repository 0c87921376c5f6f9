"""Attention in standard operators, read back: where its Q, K and V come from.

`lower.attention_standard` spells an attention in a dozen nodes or more. What distilling needs of it
are the projections that go in and the value that comes out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

__all__ = ["AttentionSpec", "FoundAttention", "find_attentions"]

# On the way back from an attention's operands to a projection; each goes on with its first input.
_PASSED = ("Transpose", "RotaryEmbedding", "Cast", "Slice", "Sub")


@dataclass(frozen=True)
class AttentionSpec:
    """One attention: heads, scale, and what it attends to.

    Attributes:
        window: positions that each attends to, itself included; None for all before it.
        softcap: scores become `softcap · tanh(score / softcap)`; 0 leaves them.
    """

    heads: int
    kv_heads: int
    scale: float
    window: int | None
    softcap: float


@dataclass(frozen=True)
class FoundAttention:
    """Projections `[…, heads · head_dim]` before rotary, and the result of the same form."""

    spec: AttentionSpec
    query: ir.Value
    key: ir.Value
    value: ir.Value
    result: ir.Value


@dataclass(frozen=True)
class _Operand:
    flat: ir.Value
    heads: int
    scale: float


def find_attentions(graph: ir.Graph) -> list[FoundAttention] | None:
    """Every Attention, or Softmax between two products, of a stage; windows are not looked for.

    None where one has another form: norms of Q and K, soft caps, an interleaved rotary.
    """
    cores = [node for node in graph if node.op_type in ("Attention", "Softmax")]
    found = [_read(node) for node in cores]
    known = [attention for attention in found if attention is not None]
    return known if len(known) == len(found) else None


def _read(core: ir.Node) -> FoundAttention | None:
    operands: Sequence[ir.Value | None] = core.inputs[:3]
    last: ir.Node | None = core
    if core.op_type == "Softmax":
        first = _behind(core.inputs[0], ("Add", "Cast", "Reshape"))
        last = _before(core.outputs[0], ("MatMul",), skipped=("Cast", "Reshape"))
        if first is None or first.op_type != "MatMul" or last is None:
            return None
        operands = (*first.inputs, last.inputs[1])
    query, key, value = (_operand(operand) for operand in operands)
    result = None if last is None else _before(last.outputs[0], ("Reshape",), flat=True)
    if query is None or key is None or value is None or result is None:
        return None
    spec = AttentionSpec(query.heads, key.heads, query.scale, None, 0.0)
    return FoundAttention(spec, query.flat, key.flat, value.flat, result.outputs[0])


def _operand(value: ir.Value | None) -> _Operand | None:
    """Back to the projection that was split by heads."""
    scale = 1.0
    while value is not None and (node := value.producer()) is not None:
        source = node.inputs[0]
        if node.op_type == "Reshape":
            shape = _numbers(node.inputs[1])
            if source is not None and len(shape) == 4 and shape[:2] == [0, 0] and shape[2] > 0:
                return _Operand(source, int(shape[2]), scale)
        elif node.op_type == "TensorScatter":
            source = node.inputs[1]
        elif node.op_type == "Concat":  # of the cache and new rows; else of halves of a head
            source = node.inputs[1 if node.attributes["axis"].as_int() == 2 else 0]
        elif node.op_type == "Mul":
            factor = _numbers(node.inputs[1])
            scale *= factor[0] if len(factor) == 1 else 1.0
        elif node.op_type not in _PASSED:
            return None
        value = source
    return None


def _behind(value: ir.Value | None, skipped: tuple[str, ...]) -> ir.Node | None:
    node = value.producer() if value is not None else None
    while node is not None and node.op_type in skipped:
        source = node.inputs[0]
        node = source.producer() if source is not None else None
    return node


def _before(
    value: ir.Value,
    wanted: tuple[str, ...],
    *,
    skipped: tuple[str, ...] = ("Transpose", "Cast", "Reshape"),
    flat: bool = False,
) -> ir.Node | None:
    """The next wanted node that reads a value; `flat`: a Reshape to three dimensions."""
    while len(uses := value.uses()) == 1:
        node = next(iter(uses)).node
        if node.op_type in wanted and not (flat and len(_numbers(node.inputs[1])) != 3):
            return node
        if node.op_type not in skipped:
            return None
        value = node.outputs[0]
    return None


def _numbers(value: ir.Value | None) -> list[float]:
    """Of a constant, or of one in another type; empty for what is computed."""
    node = value.producer() if value is not None else None
    if node is not None and node.op_type == "Cast":
        value = node.inputs[0]
    if value is None or value.const_value is None:
        return []
    return [float(number) for number in value.const_value.numpy().reshape(-1)]
