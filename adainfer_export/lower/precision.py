"""How weights are stored: one record per precision, and the one place that decides per tensor."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import onnx_ir as ir

from adainfer_runtime.manifest import CacheType

from ..quantise import Blocks

__all__ = [
    "PRECISIONS",
    "STORED_WIDE_ROWS",
    "KvCache",
    "Precision",
    "Prefill",
    "Rounding",
    "layer_of_tensor",
    "with_half_activations",
]

KvCache = Literal["auto", "int8"]
Prefill = Literal["stored", "int8"]
Rounding = Literal["nearest", "gptq"]
_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")
_DOWN = re.compile(r"(?:down_proj|fc2|mlp\.c_proj|dense_4h_to_h)\.weight$")


@dataclass(frozen=True)
class Precision:
    """Weight storage of a precision.

    Attributes:
        bits: of integers, in the linear layers and the LM head; None where they have none.
        down_block_size: of the products that end feed-forward networks, where it is another.
        accuracy_level: MatMulNBits' least accuracy of activations; 4 is int8, 0 float32.
        wide_rows: positions from which on the wide form of stages is faster. Of `stored` weights
            that is float32 arithmetic, which unpacks weights once for all positions. On AVX-512,
            int4: 0.94 of int8's time at 32, 0.74 at 64, 0.68 at 128; with 8-bit weights never (1.5
            at 128): theirs keeps the products, and is for caches in int8 alone.
        prefill: what the wide form multiplies: the stored weights, or a second copy in 8 bits by
            8-bit activations (see `lower.int8_products`).
        kv_cache: what K and V are kept in: as activations are, or 8 bits (see `lower.int8_caches`).
        int8_layers: sensitive layers (1-based) that have 8 bits whatever `bits` says.
        int8_head: the same for the LM head, and the embedding where it is the head.
        rounding: of 4-bit weights.
        float8: linear layers multiply 8-bit floats (see `lower.float8`); the head does not.
        activations: element type of activations, KV and unquantised weights.
        kept: tensors of the checkpoint whose own blocks are stored, of precision `keep`.
    """

    name: Literal["fp32", "fp16", "bf16", "fp8", "int8", "int4", "keep"]
    bits: Literal[4, 8] | None
    block_size: int = 32
    down_block_size: int | None = None
    accuracy_level: int = 4
    wide_rows: int | None = None
    prefill: Prefill = "stored"
    kv_cache: KvCache = "auto"
    int8_layers: frozenset[int] = frozenset()
    int8_head: bool = False
    rounding: Rounding = "nearest"
    float8: bool = False
    activations: Literal["float32", "float16", "bfloat16"] = "float32"
    kept: Mapping[str, Blocks] = field(default_factory=dict, hash=False)

    @property
    def activation_type(self) -> ir.DataType:
        """`activations` as ONNX knows it."""
        types = {"float16": ir.DataType.FLOAT16, "bfloat16": ir.DataType.BFLOAT16}
        return types.get(self.activations, ir.DataType.FLOAT)

    @property
    def cache_type(self) -> CacheType:
        """Element type of K and V."""
        return "int8" if self.kv_cache == "int8" else self.activations

    @property
    def layer_bits(self) -> float:
        """Of a linear layer's weight on a GPU, with its share of the scales."""
        if self.float8:
            return 8.0
        return self.bits + 0.5 if self.bits else 16.0

    def storage(self, name: str) -> Blocks | None:
        """Blocks of the linear layer or head with this weight; None where it is float32."""
        if self.bits is None:
            return self.kept.get(name)
        layer = layer_of_tensor(name)
        high = self.int8_head if layer is None else layer in self.int8_layers
        down = self.down_block_size if _DOWN.search(name) else None
        return Blocks(8 if high else self.bits, down or self.block_size)

    def embedding(self, name: str, *, tied: bool) -> Blocks | None:
        """Of the token embedding. A tied head reads the same copy; else 8 bits lose nothing."""
        if tied or self.bits is None:
            return self.storage(name)
        return Blocks(8, self.block_size)


def layer_of_tensor(name: str) -> int | None:
    """1-based decoder layer of a checkpoint tensor; None outside layers."""
    found = _LAYER.search(name)
    return int(found.group(1)) + 1 if found else None


STORED_WIDE_ROWS = 48  # of wide forms on the stored weights

PRECISIONS: dict[str, Precision] = {
    "fp32": Precision("fp32", None),
    "fp16": Precision("fp16", None, activations="float16"),
    "bf16": Precision("bf16", None, activations="bfloat16"),
    "fp8": Precision("fp8", None, float8=True, activations="float16"),
    "int8": Precision("int8", 8),
    "int4": Precision("int4", 4, wide_rows=STORED_WIDE_ROWS),
    "keep": Precision("keep", None, accuracy_level=0),
}


def with_half_activations(precision: Precision) -> Precision:
    """The precision on a GPU: quantised weights with float16 activations, one graph per stage."""
    if precision.bits is None:
        return precision
    return replace(precision, activations="float16", accuracy_level=0, wide_rows=None)
