"""Attention in standard ONNX operators over a cache that belongs to the sequence.

Rewrites `Attention(RotaryEmbedding(q), RotaryEmbedding(k), v, mask, past…)` of the decoder graph in
one of two forms:

`fused` (TensorRT 10.15 and later, ONNX Runtime): over a cache `[1, kv_heads, max_length, head_dim]`
TensorScatter writes the new rows at `write_indices` in place, a 4-D Attention reads it whole under
an explicit mask. No past inputs, `nonpad_kv_seqlen` or causal flag: TensorRT refuses the first,
silently ignores the second, and takes the third only without a mask.

`plain` (TensorRT 10.3 and later): MatMul, Softmax, MatMul over the filled prefix of the cache and
the new rows, which leave the stage as they are for the runtime to place (see `KvGeometry`).

Both multiply Q by the scale first, as TensorRT's fused kernels want it. What depends on the
positions of a pass alone becomes the stage `positions`, whose results all layers share: the mask
(bool, or to be added), and the rows of the rotary tables, which so stand in one place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import onnx_ir as ir
from onnx_ir.tape import Tape

from ..errors import LoweringError
from .graph import remove_dead_nodes
from .pass_tensors import LOWEST, Form, PassStage, PassTensors
from .precision import Precision

__all__ = ["standardise_attention"]


def standardise_attention(
    model: ir.Model,
    *,
    windows: Sequence[int | None],
    max_seq_len: int,
    precision: Precision,
    form: Form,
    row_elements: int | None = None,
) -> PassStage:
    """Rewrites every attention of the decoder in place; returns the stage `positions`.

    Args:
        windows: of each layer, tokens that a position attends to, or None for all before it.
        row_elements: width of a row of the cache, of the form `plain`.

    Raises:
        LoweringError: an attention that does not have the expected form.
    """
    graph = model.graph
    shared = PassTensors(precision, max_seq_len, form)
    attentions = [node for node in graph if node.op_type == "Attention"]
    for node, window in zip(attentions, windows, strict=True):
        _Rewrite(node, shared, window, row_elements).apply()
    remove_dead_nodes(graph)
    for value in list(graph.inputs):
        if value.name in ("attention_mask", "position_ids") and not value.uses():
            graph.inputs.remove(value)
    used = [value for value in shared.inputs() if value.uses()]
    graph.inputs.extend(used)
    return shared.stage()


class _Rewrite:
    """One attention."""

    def __init__(
        self,
        node: ir.Node,
        shared: PassTensors,
        window: int | None,
        row_elements: int | None,
    ) -> None:
        self._node = node
        self._shared = shared
        self._mask = shared.mask(window)
        self._row_elements = row_elements
        self._tape = Tape()
        self._heads = node.attributes["q_num_heads"].as_int()
        self._kv_heads = node.attributes["kv_num_heads"].as_int()
        self._scale = node.attributes["scale"].as_float()
        softcap = node.attributes.get("softcap")
        self._softcap = 0.0 if softcap is None else softcap.as_float()

    def apply(self) -> None:
        node, graph = self._node, self._node.graph
        assert graph is not None  # found by walking the graph
        query, key, value = node.inputs[:3]
        if len(node.inputs) < 6 or query is None or key is None or value is None:
            raise LoweringError(f"{node.name}: attention without a KV cache cannot be lowered")
        past_key, past_value = node.inputs[4], node.inputs[5]
        assert past_key is not None and past_value is not None
        width = _static_width(past_key, node)
        q = self._op("Mul", self._rotated(query, self._heads, width), self._number("scale"))
        k = self._rotated(key, self._kv_heads, width)
        v = self._by_head(value, self._kv_heads, width)
        if self._shared.form == "fused":
            k, v, new_k, new_v = self._scatter(past_key, past_value, k, v)
        else:
            k, v, new_k, new_v = self._append_rows(past_key, past_value, k, v, width)
        plain = self._shared.form == "plain" or self._softcap != 0.0
        attended = self._plain(q, k, v) if plain else self._fused(q, k, v)
        flat = self._op("Transpose", attended, perm=[0, 2, 1, 3])
        result = self._op("Reshape", flat, self._ints([0, 0, self._heads * width]))
        for new, old in zip((result, new_k, new_v), node.outputs, strict=True):
            new.name = old.name
            if new is result:
                new.type, new.shape = old.type, old.shape
        places = [(value, value.type, value.shape) for value in (new_k, new_v)]
        for new_node in self._tape.nodes:
            new_node.metadata_props.update(node.metadata_props)  # the layer it belongs to
        ir.convenience.replace_nodes_and_values(
            graph, node, [node], list(self._tape.nodes), list(node.outputs), [result, new_k, new_v]
        )
        for value, kind, shape in places:  # the replaced outputs' shapes are another layout's
            value.type, value.shape = kind, shape

    def _scatter(
        self, past_key: ir.Value, past_value: ir.Value, key: ir.Value, value: ir.Value
    ) -> tuple[ir.Value, ...]:
        """Writes the new rows into the cache, which input and output share."""
        found = []
        for past, new in ((past_key, key), (past_value, value)):
            width = past.shape[-1] if past.shape is not None else None
            past.type = ir.TensorType(self._shared.dtype)
            past.shape = ir.Shape([1, self._kv_heads, self._shared.max_seq_len, width])
            present = self._op(
                "TensorScatter", past, new, self._shared.write_indices, axis=-2, mode="linear"
            )
            present.type, present.shape = past.type, past.shape
            found.append(present)
        return (*found, *found)

    def _append_rows(
        self, past_key: ir.Value, past_value: ir.Value, key: ir.Value, value: ir.Value, width: int
    ) -> tuple[ir.Value, ...]:
        """All K and V `[1, kv_heads, keys, head_dim]`, and the new rows as the cache keeps them."""
        assert self._row_elements is not None  # the form plain comes with it
        used, padding = self._kv_heads * width, self._row_elements - self._kv_heads * width
        everything, rows = [], []
        for past, new in ((past_key, key), (past_value, value)):
            past.type = ir.TensorType(self._shared.dtype)
            past.shape = ir.Shape([1, "past", self._row_elements])
            seen = past
            if padding:
                bounds = (self._ints([0]), self._ints([used]), self._ints([2]))
                seen = self._op("Slice", past, *bounds)
            seen = self._op("Reshape", seen, self._ints([0, 0, self._kv_heads, width]))
            seen = self._op("Transpose", seen, perm=[0, 2, 1, 3])
            everything.append(self._op("Concat", seen, new, axis=2))
            row = self._op("Transpose", new, perm=[0, 2, 1, 3])
            row = self._op("Reshape", row, self._ints([0, 0, used]))
            if padding:
                row = self._op("Pad", row, self._ints([0, 0, 0, 0, 0, padding]))
            else:
                row = self._op("Identity", row)
            row.type = ir.TensorType(self._shared.dtype)
            row.shape = ir.Shape([1, "rows", self._row_elements])
            rows.append(row)
        return (*everything, *rows)

    def _fused(self, query: ir.Value, key: ir.Value, value: ir.Value) -> ir.Value:
        return self._op("Attention", query, key, value, self._mask, scale=1.0)

    def _plain(self, query: ir.Value, key: ir.Value, value: ir.Value) -> ir.Value:
        """Query heads of one KV head become rows of one product: K and V are never repeated."""
        grouped = self._heads != self._kv_heads
        if grouped:
            query = self._op("Reshape", query, self._ints([0, self._kv_heads, -1, 0]))
        scores = self._op("MatMul", query, self._op("Transpose", key, perm=[0, 1, 3, 2]))
        by_head = self._ints([0, self._heads, -1, 0])
        if grouped:
            scores = self._op("Reshape", scores, by_head)
        if self._softcap:
            cap = self._number("softcap")
            scores = self._op("Mul", self._op("Tanh", self._op("Div", scores, cap)), cap)
        if self._shared.form == "fused":
            scores = self._op("Where", self._mask, scores, self._number("lowest"))
        else:
            scores = self._op("Add", scores, self._mask)
        weights = self._op("Softmax", scores, axis=-1)
        if grouped:
            weights = self._op("Reshape", weights, self._ints([0, self._kv_heads, -1, 0]))
        found = self._op("MatMul", weights, value)
        return self._op("Reshape", found, by_head) if grouped else found

    def _rotated(self, value: ir.Value, heads: int, width: int) -> ir.Value:
        """`[1, heads, rows, head_dim]` after rotary, where there is one."""
        rotary = value.producer()
        if rotary is None or rotary.op_type != "RotaryEmbedding":
            return self._by_head(value, heads, width)
        projection = rotary.inputs[0]
        assert projection is not None  # RotaryEmbedding's first input is required
        rows = [self._shared.rotary_rows(_table(rotary, index)) for index in (1, 2)]
        partial = rotary.attributes["rotary_embedding_dim"].as_int()
        interleaved = rotary.attributes["interleaved"].as_int()
        split = self._by_head(projection, heads, width)
        rotate = self._rotate_plain if self._shared.form == "plain" else self._rotate
        return rotate(split, rows[0], rows[1], partial, interleaved, width)

    def _rotate(
        self,
        value: ir.Value,
        cos: ir.Value,
        sin: ir.Value,
        partial: int,
        interleaved: int,
        width: int,
    ) -> ir.Value:
        attributes = {"interleaved": interleaved, "rotary_embedding_dim": partial}
        return self._op("RotaryEmbedding", value, cos, sin, **attributes)

    def _rotate_plain(
        self,
        value: ir.Value,
        cos: ir.Value,
        sin: ir.Value,
        partial: int,
        interleaved: int,
        width: int,
    ) -> ir.Value:
        """By Slice and Concat: pairs are (i, i + half), or neighbours where interleaved."""
        turned = partial or width
        step = 2 if interleaved else 1
        starts = (0, 1) if interleaved else (0, turned // 2)
        ends = (turned, turned) if interleaved else (turned // 2, turned)
        first, second = (
            self._slice(value, start, end, step) for start, end in zip(starts, ends, strict=True)
        )
        c, s = (self._op("Unsqueeze", rows, self._ints([1])) for rows in (cos, sin))
        left = self._op("Sub", self._op("Mul", first, c), self._op("Mul", second, s))
        right = self._op("Add", self._op("Mul", second, c), self._op("Mul", first, s))
        if interleaved:
            pairs = [self._op("Unsqueeze", part, self._ints([-1])) for part in (left, right)]
            both = self._op("Concat", *pairs, axis=-1)
            result = self._op("Reshape", both, self._ints([0, 0, 0, turned]))
        else:
            result = self._op("Concat", left, right, axis=-1)
        if turned < width:
            rest = self._slice(value, turned, width, 1)
            result = self._op("Concat", result, rest, axis=-1)
        return result

    def _slice(self, value: ir.Value, start: int, end: int, step: int) -> ir.Value:
        bounds = [self._ints([number]) for number in (start, end, 3, step)]
        return self._op("Slice", value, *bounds)

    def _by_head(self, value: ir.Value, heads: int, width: int) -> ir.Value:
        split = self._op("Reshape", value, self._ints([0, 0, heads, width]))
        return self._op("Transpose", split, perm=[0, 2, 1, 3])

    def _number(self, kind: Literal["scale", "softcap", "lowest"]) -> ir.Value:
        number = {"scale": self._scale, "softcap": self._softcap, "lowest": LOWEST}[kind]
        return self._constant(f"{kind}_{number!r}", np.array([number], np.float32))

    def _ints(self, values: list[int]) -> ir.Value:
        name = "ints_" + "_".join(str(value).replace("-", "m") for value in values)
        return self._constant(name, np.array(values, np.int64))

    def _constant(
        self, name: str, values: np.ndarray[tuple[int, ...], np.dtype[np.generic]]
    ) -> ir.Value:
        graph = self._node.graph
        assert graph is not None
        if name not in graph.initializers:
            graph.initializers[name] = ir.Value(
                name=name,
                type=ir.TensorType(ir.DataType.from_numpy(values.dtype)),
                shape=ir.Shape(values.shape),
                const_value=ir.tensor(values, name=name),
            )
        return graph.initializers[name]

    def _op(self, op_type: str, *inputs: ir.Value, **attributes: object) -> ir.Value:
        result: ir.Value = self._tape.op(op_type, list(inputs), attributes=attributes or None)  # type: ignore[arg-type]
        return result


def _table(rotary: ir.Node, index: int) -> ir.Value:
    rows = rotary.inputs[index]
    gather = rows.producer() if rows is not None else None
    if gather is None or gather.op_type != "Gather" or gather.inputs[0] is None:
        raise LoweringError(f"{rotary.name}: rotary tables are not gathered by position")
    if gather.inputs[0].const_value is None:
        raise LoweringError(f"{rotary.name}: rotary tables are no constants")
    return gather.inputs[0]


def _static_width(past: ir.Value, node: ir.Node) -> int:
    width = past.shape[-1] if past.shape is not None else None
    if not isinstance(width, int):
        raise LoweringError(f"{node.name}: the head's width is not static")
    return width
