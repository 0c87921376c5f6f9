"""Builds the standard decoder graph, block by block."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
from onnx_ir.tape import Tape

from ..errors import UnsupportedError
from ..graph_builder import graph_input
from .rotary import Tables
from .views import Heads, View

__all__ = ["SCOPES_KEY", "Decoder", "DecoderBuilder", "LayerHeads", "Rotation"]

# The frontend's library marks the module that a node belongs to in this way.
SCOPES_KEY = "pkg.onnxscript.name_scopes"
_OPSET, _IR_VERSION = 24, 11
# The attribute with an attention's query heads, and the input with its past keys.
_ATTENTIONS = {"Attention": ("q_num_heads", 4), "GroupQueryAttention": ("num_heads", 3)}
_Attribute = float | str | list[int]
_ACTIVATIONS: dict[str, tuple[str, dict[str, str]]] = {
    "relu": ("Relu", {}),
    "gelu": ("Gelu", {}),
    "gelu_new": ("Gelu", {"approximate": "tanh"}),
    "gelu_fast": ("Gelu", {"approximate": "tanh"}),
    "gelu_pytorch_tanh": ("Gelu", {"approximate": "tanh"}),
}


@dataclass(frozen=True)
class LayerHeads:
    """Heads of queries, heads of keys and values, and their width."""

    query: int
    kv: int
    head_dim: int


@dataclass(frozen=True)
class Decoder:
    """A graph without weights, and what those are made of where that is no plain tensor.

    Inputs `input_ids`, `position_ids` `[batch, tokens]`, `past_key_values.{i}.{key,value}`
    `[batch, kv_heads, past, head_dim]`; outputs `logits`, `present.{i}.{key,value}`.
    """

    model: ir.Model
    views: dict[str, View] = field(default_factory=dict)

    @property
    def layer_heads(self) -> tuple[LayerHeads, ...]:
        """Of each layer's attention, in order."""
        found = []
        for node in self.model.graph:
            if node.op_type not in _ATTENTIONS:
                continue
            key, cache = _ATTENTIONS[node.op_type]
            past = node.inputs[cache]
            assert past is not None and past.shape is not None  # it has a cache
            query, kv = (node.attributes[name].as_int() for name in (key, "kv_num_heads"))
            found.append(LayerHeads(query, kv, int(past.shape[3])))  # type: ignore[arg-type]
        return tuple(found)


@dataclass(frozen=True)
class Rotation:
    """cos and sin of the positions at hand, and how much of each head they rotate (0: all)."""

    cos: ir.Value
    sin: ir.Value
    width: int


@dataclass(frozen=True)
class _Stored:
    """A linear layer's tensors in the checkpoint, where they are not its own."""

    weight: View
    bias: View | None


class DecoderBuilder:
    """Appends nodes. Weights are initialisers without a value under their checkpoint names.

    Args:
        width: of the hidden state.
    """

    def __init__(self, width: int) -> None:
        self._width = width
        self._tape = Tape()
        self._initializers: dict[str, ir.Value] = {}
        self._views: dict[str, View] = {}
        self._caches: list[ir.Value] = []
        self._presents: list[ir.Value] = []
        self.input_ids = graph_input("input_ids", ["batch", "tokens"], ir.DataType.INT64)
        self.position_ids = graph_input("position_ids", ["batch", "tokens"], ir.DataType.INT64)

    def layers(
        self, hidden: ir.Value, count: int, layer: Callable[[int, ir.Value], ir.Value]
    ) -> ir.Value:
        """Stacks layers on the embedded tokens.

        Args:
            layer: appends a layer (from 0), given the hidden state before it; returns the next.
        """
        _as_hidden(hidden, self._width)
        for index in range(count):
            before = len(self._tape.nodes)
            hidden = _as_hidden(layer(index, hidden), self._width)
            for node in self._tape.nodes[before:]:
                node.metadata_props[SCOPES_KEY] = f"['layers.{index}']"
        return hidden

    def op(self, op_type: str, *inputs: ir.Value | None, **attributes: _Attribute) -> ir.Value:
        """A node with one output."""
        return self._tape.op(op_type, list(inputs), attributes=attributes or None)

    def weight(self, name: str, shape: tuple[int, ...], view: View | None = None) -> ir.Value:
        """A checkpoint tensor; the same name is the same one."""
        if name not in self._initializers:
            self._initializers[name] = graph_input(name, list(shape))
            if view is not None:
                self._views[name] = view
        return self._initializers[name]

    def embedding(self, name: str, shape: tuple[int, int]) -> ir.Value:
        """Rows of the token table."""
        return self.op("Gather", self.weight(name, shape), self.input_ids)

    def add_positions(
        self, hidden: ir.Value, name: str, shape: tuple[int, int], offset: int, positions: int
    ) -> ir.Value:
        """Adds learned positions; rows before `offset` and those out of reach are left out."""
        view = View(name, shape, rows=(offset, offset + positions))
        table = self.weight(name, (positions, shape[1]), view)
        return self.op("Add", hidden, self.op("Gather", table, self.position_ids))

    def linear(
        self,
        value: ir.Value,
        name: str,
        shape: tuple[int, int],
        *,
        bias: bool = False,
        stored: _Stored | None = None,
    ) -> ir.Value:
        """`value @ weightᵀ (+ bias)`, weight `[out, in]`."""
        weight = self.weight(f"{name}.weight", shape, stored.weight if stored else None)
        result = self.op("MatMul", value, self.op("Transpose", weight, perm=[1, 0]))
        if not bias:
            return result
        added = self.weight(f"{name}.bias", shape[:1], stored.bias if stored else None)
        return self.op("Add", result, added)

    def linear_rows(
        self,
        value: ir.Value,
        name: str,
        fused: str,
        rows: tuple[int, int],
        shape: tuple[int, int],
        *,
        bias: bool = False,
        conv1d: bool = False,
    ) -> ir.Value:
        """Some rows of a fused linear layer `fused` of this shape, as a layer of their own.

        Args:
            conv1d: the weight is stored as `[in, out]`.
        """
        stored_shape = (shape[1], shape[0]) if conv1d else shape
        weight = View(f"{fused}.weight", stored_shape, transposed=conv1d, rows=rows)
        stored = _Stored(weight, View(f"{fused}.bias", shape[:1], rows=rows))
        own = (rows[1] - rows[0], shape[1])
        return self.linear(value, name, own, bias=bias, stored=stored)

    def linear_heads(
        self,
        value: ir.Value,
        name: str,
        fused: str,
        heads: Heads,
        shape: tuple[int, int],
        *,
        bias: bool,
    ) -> ir.Value:
        """One part of every head of a fused linear layer `fused` of this shape."""
        weight = View(f"{fused}.weight", shape, heads=heads)
        stored = _Stored(weight, View(f"{fused}.bias", shape[:1], heads=heads))
        own = (shape[0] // heads.parts, shape[1])
        return self.linear(value, name, own, bias=bias, stored=stored)

    def conv1d(self, value: ir.Value, name: str, shape: tuple[int, int]) -> ir.Value:
        """A linear layer with a bias whose weight is stored as `[in, out]`."""
        return self.linear_rows(value, name, name, (0, shape[0]), shape, bias=True, conv1d=True)

    def rms_norm(
        self, value: ir.Value, name: str, width: int, epsilon: float, *, add: float = 0.0
    ) -> ir.Value:
        """Root mean square norm; `add` is added to the stored weight (Gemma keeps it minus 1)."""
        stored = f"{name}.weight"
        view = View(stored, (width,), add=add) if add else None
        weight = self.weight(stored, (width,), view)
        return self.op("RMSNormalization", value, weight, axis=-1, epsilon=epsilon)

    def layer_norm(self, value: ir.Value, name: str, width: int, epsilon: float) -> ir.Value:
        """Layer norm with a bias."""
        weight, bias = (self.weight(f"{name}.{part}", (width,)) for part in ("weight", "bias"))
        return self.op("LayerNormalization", value, weight, bias, axis=-1, epsilon=epsilon)

    def head_norm(
        self, value: ir.Value, name: str, head_dim: int, epsilon: float, *, add: float = 0.0
    ) -> ir.Value:
        """Root mean square norm of every head of `[batch, tokens, heads · head_dim]`."""
        heads = self.op("Reshape", value, self.ints([0, 0, -1, head_dim]))
        normed = self.rms_norm(heads, name, head_dim, epsilon, add=add)
        return self.op("Reshape", normed, self.ints([0, 0, -1]))

    def activation(self, value: ir.Value, name: str) -> ir.Value:
        """A feed-forward network's activation under its transformers name.

        Raises:
            UnsupportedError: it is not known here.
        """
        if name in ("silu", "swish"):
            return self.op("Mul", value, self.op("Sigmoid", value))
        if name not in _ACTIVATIONS:
            known = ", ".join(sorted([*_ACTIVATIONS, "silu"]))
            raise UnsupportedError(f"activation {name!r} is not supported (supported: {known})")
        op_type, attributes = _ACTIVATIONS[name]
        return self.op(op_type, value, **attributes)

    def rotation(self, name: str, tables: Tables, head_dim: int) -> Rotation:
        """Rotary rows of the positions, from tables `[positions, rotary width / 2]`."""
        cos, sin = (
            self.op("Gather", self.constant(f"{name}.{part}_cache", table), self.position_ids)
            for part, table in (("cos", tables.cos), ("sin", tables.sin))
        )
        width = 2 * tables.cos.shape[1]
        return Rotation(cos, sin, 0 if width == head_dim else width)

    def attention(
        self,
        query: ir.Value,
        key: ir.Value,
        value: ir.Value,
        *,
        heads: tuple[int, int],
        head_dim: int,
        scale: float,
        softcap: float = 0.0,
        rotation: Rotation | None = None,
    ) -> ir.Value:
        """Causal attention of `[batch, tokens, heads · head_dim]` over the layer's own cache.

        Args:
            heads: of queries, and of keys and values.
            softcap: logits are kept within ± this by tanh; 0: not.
        """
        index = len(self._caches) // 2
        query_heads, kv_heads = heads
        if rotation is not None:
            query = self._rotate(query, rotation, query_heads)
            key = self._rotate(key, rotation, kv_heads)
        shape: list[int | str] = ["batch", kv_heads, "past", head_dim]
        pasts = [graph_input(f"past_key_values.{index}.{p}", shape) for p in ("key", "value")]
        result, *presents = self._tape.op_multi_out(
            "Attention",
            [query, key, value, None, *pasts],
            num_outputs=3,
            attributes={
                "q_num_heads": query_heads,
                "kv_num_heads": kv_heads,
                "scale": float(scale),
                "softcap": float(softcap),
                "is_causal": 1,
            },
        )
        for part, present in zip(("key", "value"), presents, strict=True):
            present.name = f"present.{index}.{part}"
            present.type = ir.TensorType(ir.DataType.FLOAT)
            present.shape = ir.Shape(["batch", kv_heads, "total", head_dim])
        self._caches += pasts
        self._presents += presents
        return result

    def soft_cap(self, value: ir.Value, cap: float) -> ir.Value:
        """`cap · tanh(value / cap)`."""
        limit = self.constant("cap", np.array(cap, np.float32))
        return self.op("Mul", self.op("Tanh", self.op("Div", value, limit)), limit)

    def constant(self, name: str, array: np.ndarray) -> ir.Value:
        """An initialiser with a value; the same name is the same one."""
        if name not in self._initializers:
            value = self._tape.initializer(ir.tensor(array, name=name), name=name)
            self._initializers[name] = value
        return self._initializers[name]

    def ints(self, values: list[int]) -> ir.Value:
        """An int64 initialiser; equal ones are the same."""
        return self.constant("ints_" + "_".join(map(str, values)), np.array(values, np.int64))

    def finish(self, logits: ir.Value, vocab_size: int) -> Decoder:
        """The decoder; what comes after the last layer ends in `logits`."""
        logits.name, logits.type = "logits", ir.TensorType(ir.DataType.FLOAT)
        logits.shape = ir.Shape(["batch", "tokens", vocab_size])
        graph = ir.Graph(
            [self.input_ids, self.position_ids, *self._caches],
            [logits, *self._presents],
            nodes=self._tape.nodes,
            initializers=list(self._initializers.values()),
            opset_imports={"": _OPSET},
            name="decoder",
        )
        return Decoder(ir.Model(graph, ir_version=_IR_VERSION), self._views)

    def _rotate(self, value: ir.Value, rotation: Rotation, heads: int) -> ir.Value:
        return self.op(
            "RotaryEmbedding",
            value,
            rotation.cos,
            rotation.sin,
            num_heads=heads,
            rotary_embedding_dim=rotation.width,
            interleaved=0,
        )


def _as_hidden(value: ir.Value, width: int) -> ir.Value:
    value.type = ir.TensorType(ir.DataType.FLOAT)
    value.shape = ir.Shape(["batch", "tokens", width])
    return value
