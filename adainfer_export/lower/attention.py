"""Attention for ONNX Runtime: com.microsoft.GroupQueryAttention over one KV buffer.

Rewrites `Attention(RotaryEmbedding(q), RotaryEmbedding(k), v, mask, past…)` of the decoder graph.
The cache holds K after rotary. Positions are contiguous, so mask, position ids and the gathered
rotary rows become two lengths that the runtime computes once per pass:
`seqlens_k` int32 `[batch]` (positions afterwards, minus one) and `total_sequence_length`, the int32
scalar that is the longest sequence's.
Rotary goes into that operator where its widths allow, else before it, as an operator of its own,
whose positions are computed in the graph (`computed_positions`) or given (`given_position`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from adainfer_runtime.backends.layout import FIRST_POSITION

from ..errors import LoweringError, UnsupportedError
from .graph import CONTRIB, remove_dead_nodes

__all__ = [
    "SEQLENS_K",
    "TOTAL_LENGTH",
    "Positions",
    "computed_positions",
    "fuse_attention",
    "given_position",
]

SEQLENS_K = "seqlens_k"
TOTAL_LENGTH = "total_sequence_length"
_HEAD_MULTIPLE = 8

# From a rotary embedding that is replaced, what it rotates, and the lengths: position ids, as
# com.microsoft.RotaryEmbedding takes them.
Positions = Callable[[ir.Node, ir.Value, ir.Value], ir.Value]


def computed_positions(rotary: ir.Node, projection: ir.Value, seqlens: ir.Value) -> ir.Value:
    """`[batch, rows]`: of each sequence's last rows."""
    marks = dict(rotary.metadata_props)

    def put(made: ir.Node) -> ir.Value:
        assert rotary.graph is not None  # found by walking the graph
        rotary.graph.insert_before(rotary, made)
        return made.outputs[0]

    def op(op_type: str, inputs: list[ir.Value], **attributes: int) -> ir.Value:
        return put(ir.node(op_type, inputs, attributes, metadata_props=dict(marks)))

    def constant(value: int, *shape: int) -> ir.Value:
        array = np.full(shape, value, np.int64)
        return put(ir.node("Constant", [], {"value": ir.tensor(array)}, metadata_props=dict(marks)))

    rows = op("Shape", [projection], start=1, end=2)
    last = op("Cast", [seqlens], to=ir.DataType.INT64.value)
    last = op("Unsqueeze", [last, constant(1, 1)])
    # -rows + 1 … 0, behind which `last` is every sequence's own.
    first = op("Sub", [constant(1), op("Squeeze", [rows])])
    return op("Add", [last, op("Range", [first, constant(1), constant(1)])])


def given_position(rotary: ir.Node, projection: ir.Value, seqlens: ir.Value) -> ir.Value:
    """`[1]`: the first row's, an input that all layers share; of one sequence at a time.

    For ONNX Runtime's CUDA provider: it leaves what is computed from a Shape to the CPU.
    """
    del projection, seqlens
    graph = rotary.graph
    assert graph is not None  # found by walking the graph
    for value in graph.inputs:
        if value.name == FIRST_POSITION:
            return value
    given = ir.Value(
        name=FIRST_POSITION, type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([1])
    )
    graph.inputs.append(given)
    return given


def fuse_attention(
    model: ir.Model,
    *,
    windows: Sequence[int | None],
    positions: Positions = computed_positions,
) -> None:
    """Rewrites every attention of the decoder in place.

    Args:
        windows: of each layer, tokens that a position attends to, or None for all before it.
        positions: where those of a rotary embedding that stands apart come from.

    Raises:
        LoweringError: an attention that does not have the expected form.
    """
    graph = model.graph
    model.graph.opset_imports[CONTRIB] = 1
    seqlens = ir.Value(
        name=SEQLENS_K, type=ir.TensorType(ir.DataType.INT32), shape=ir.Shape(["batch"])
    )
    total = ir.Value(name=TOTAL_LENGTH, type=ir.TensorType(ir.DataType.INT32), shape=ir.Shape([]))
    graph.inputs.extend([seqlens, total])
    attentions = [node for node in graph if node.op_type == "Attention"]
    for node, window in zip(attentions, windows, strict=True):
        _fuse_one(node, (seqlens, total), window, positions)
    remove_dead_nodes(graph)
    for value in list(graph.inputs):
        if value.name in ("attention_mask", "position_ids") and not value.uses():
            graph.inputs.remove(value)


def _fuse_one(
    node: ir.Node, lengths: tuple[ir.Value, ir.Value], window: int | None, positions: Positions
) -> None:
    query, key, value = node.inputs[:3]
    if len(node.inputs) < 6 or query is None or key is None or value is None:
        raise LoweringError(f"{node.name}: attention without a KV cache cannot be lowered")
    past = node.inputs[4]
    head_dim = past.shape[3] if past is not None and past.shape is not None else None
    if not isinstance(head_dim, int) or head_dim % _HEAD_MULTIPLE:
        raise UnsupportedError(
            f"heads of width {head_dim}: ONNX Runtime's attention takes multiples of "
            f"{_HEAD_MULTIPLE}"
        )
    rotary = _Rotary.before(query)
    if rotary is None or rotary.fits(head_dim):
        query, key = (_unrotated(value) for value in (query, key))
    else:
        query, key = (
            _rotated_by_contrib(value, rotary, lengths[0], positions) for value in (query, key)
        )
        rotary = None
    attributes: list[ir.Attr] = [
        ir.AttrInt64("num_heads", node.attributes["q_num_heads"].as_int()),
        ir.AttrInt64("kv_num_heads", node.attributes["kv_num_heads"].as_int()),
        ir.AttrFloat32("scale", node.attributes["scale"].as_float()),
        ir.AttrInt64("do_rotary", int(rotary is not None)),
        ir.AttrInt64("rotary_interleaved", rotary.interleaved if rotary else 0),
    ]
    softcap = node.attributes.get("softcap")
    if softcap is not None and softcap.as_float() != 0.0:
        attributes.append(ir.AttrFloat32("softcap", softcap.as_float()))
    if window is not None:
        attributes.append(ir.AttrInt64("local_window_size", window))
    tables = (rotary.cos, rotary.sin) if rotary else (None, None)
    fused = ir.Node(
        CONTRIB,
        "GroupQueryAttention",
        [query, key, value, past, node.inputs[5], *lengths, *tables],
        attributes,
        num_outputs=3,
        name=node.name,
        metadata_props=dict(node.metadata_props),
    )
    for new, old in zip(fused.outputs, node.outputs, strict=True):
        new.name, new.type, new.shape = old.name, old.type, old.shape
    assert node.graph is not None  # found by walking the graph
    ir.convenience.replace_nodes_and_values(
        node.graph, node, [node], [fused], list(node.outputs), list(fused.outputs)
    )


@dataclass(frozen=True)
class _Rotary:
    """Tables `[positions, rotated width / 2]`, and how they are applied."""

    cos: ir.Value
    sin: ir.Value
    interleaved: int
    width: int

    @classmethod
    def before(cls, value: ir.Value) -> _Rotary | None:
        """The rotary embedding that the value comes from, if it does."""
        node = value.producer()
        if node is None or node.op_type != "RotaryEmbedding":
            return None
        cos, sin = (_table(node, table) for table in node.inputs[1:3])
        width = node.attributes["rotary_embedding_dim"].as_int()
        return cls(cos, sin, node.attributes["interleaved"].as_int(), width)

    def fits(self, head_dim: int) -> bool:
        """Whether GroupQueryAttention takes it: ONNX Runtime 1.32 wants multiples."""
        return head_dim % 16 == 0 and self.width % 16 == 0


def _table(rotary: ir.Node, rows: ir.Value | None) -> ir.Value:
    gather = rows.producer() if rows is not None else None
    if gather is None or gather.op_type != "Gather" or gather.inputs[0] is None:
        raise LoweringError(f"{rotary.name}: rotary tables are not gathered by position")
    return gather.inputs[0]


def _unrotated(value: ir.Value) -> ir.Value:
    node = value.producer()
    if node is None or node.op_type != "RotaryEmbedding":
        return value
    projection = node.inputs[0]
    assert projection is not None  # RotaryEmbedding's first input is required
    return projection


def _rotated_by_contrib(
    value: ir.Value, rotary: _Rotary, seqlens: ir.Value, positions: Positions
) -> ir.Value:
    """The rotation as an operator of its own."""
    old = value.producer()
    assert old is not None and old.graph is not None  # it is the rotary embedding
    projection = _unrotated(value)
    inputs = [projection, positions(old, projection, seqlens), rotary.cos, rotary.sin]
    attributes = {
        "num_heads": old.attributes["num_heads"].as_int(),
        "rotary_embedding_dim": rotary.width,
        "interleaved": rotary.interleaved,
    }
    marks = dict(old.metadata_props)
    made = ir.node("RotaryEmbedding", inputs, attributes, domain=CONTRIB, metadata_props=marks)
    old.graph.insert_before(old, made)
    return made.outputs[0]
