"""Where a folder's model comes from, and its geometry."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from .record import CacheType, Count, Layers, Length, Record, Width

__all__ = ["KvGeometry", "ModelSpec", "Quantisation", "SourceFile", "SourceSpec"]


class SourceFile(Record):
    """One file of the checkpoint that was exported."""

    name: str
    bytes: Count
    sha256: str


class SourceSpec(Record):
    """Where the weights came from."""

    kind: Literal["huggingface", "folder", "gguf", "onnx"]
    id: str
    revision: str | None = None
    files: tuple[SourceFile, ...] = ()


class ModelSpec(Record):
    """The decoder's shape. `num_layers` counts decoder blocks; widths are in elements.

    `layer_attention_heads` are each layer's query heads where layers differ, else empty.
    """

    architecture: str
    num_layers: Layers
    hidden_size: Width
    vocab_size: Width
    num_attention_heads: Width
    layer_attention_heads: tuple[Width, ...] = ()
    eos_token_ids: tuple[int, ...] = ()

    @model_validator(mode="after")
    def _ends_are_tokens(self) -> ModelSpec:
        for token in self.eos_token_ids:
            if not 0 <= token < self.vocab_size:
                raise ValueError(f"eos_token_ids: {token} is no token of {self.vocab_size}")
        return self

    def attention_heads(self, layer: int) -> int:
        """Query heads of a layer (1-based)."""
        heads = self.layer_attention_heads
        return heads[layer - 1] if heads else self.num_attention_heads


class KvGeometry(Record):
    """One K and one V buffer per layer.

    `bnsh`: `[1, heads, max_length, head_dim]`, which a stage reads whole and writes in place.
    `prefix`: `[1, 1 + max_length, row_elements]`, position after position, so that what is filled
    is contiguous: a stage reads a view of it as its past, and writes the new rows right behind,
    where the runtime points its output to. Row 0 is a sink of zeros that masks hide: no view is
    ever empty. Rows are padded from `num_heads * head_dim` elements to a multiple of 256 bytes.

    `layer_heads` are each layer's heads where layers differ; else empty: `num_heads` in all.
    `scales` is the file of what a code of int8 stands for (see `backends.kv_scales`).
    """

    layout: Literal["bnsh", "prefix"] = "bnsh"
    dtype: CacheType = "float32"
    num_heads: Width
    layer_heads: tuple[Width, ...] = ()
    head_dim: Width
    max_length: Length
    row_elements: Width | None = None
    scales: str | None = None

    @model_validator(mode="after")
    def _padded(self) -> KvGeometry:
        width = self.num_heads * self.head_dim
        if (self.layout == "prefix") != (self.row_elements is not None):
            raise ValueError("row_elements belongs to the layout prefix, and to no other")
        if self.row_elements is not None and self.row_elements < width:
            raise ValueError(f"row_elements {self.row_elements} is less than {width}")
        if (self.dtype == "int8") != (self.scales is not None):
            raise ValueError("scales belong to caches of int8, and to no others")
        if max(self.layer_heads, default=0) > self.num_heads:
            raise ValueError(f"layer_heads has more than the {self.num_heads} of num_heads")
        return self

    def heads(self, layer: int) -> int:
        """Heads of K and V of a layer (1-based)."""
        return self.layer_heads[layer - 1] if self.layer_heads else self.num_heads


class Quantisation(Record):
    """Block-wise symmetric weight quantisation of the linear operators.

    From `wide_rows` positions in one pass on, a stage's wide graph is the faster one; None where
    stages have none. `down_block_size` is that of the products which end feed-forward networks, if
    it is another. `int8_layers` (1-based) and the head, if `int8_head`, have 8 bits instead.
    `rounding` is of 4-bit weights: to the nearest code, or GPTQ's (arXiv 2210.17323). `prefill`
    says what wide graphs multiply: the weights as they are stored, or a second copy of the
    checkpoint's in 8 bits, by 8-bit activations (W8A8).
    """

    bits: Literal[4, 8]
    block_size: Width
    down_block_size: Width | None = None
    accuracy_level: int | None = None  # of MatMulNBits alone
    wide_rows: Length | None = None
    int8_layers: tuple[Layers, ...] = ()
    int8_head: bool = False
    rounding: Literal["nearest", "gptq"] = "nearest"
    prefill: Literal["stored", "int8"] = "stored"
