"""How weights are stored: one record per precision."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import onnx_ir as ir

__all__ = ["PRECISIONS", "Precision", "with_half_activations"]


@dataclass(frozen=True)
class Precision:
    """Weight storage of a precision.

    Attributes:
        bits: of the linear layers and the LM head; None keeps float32.
        accuracy_level: MatMulNBits' least accuracy of activations; 4 is int8.
        wide_rows: positions from which on float32 arithmetic (unpacking weights once for all of
            them) beats int8's. On AVX-512, int4: 0.94 of its time at 32, 0.74 at 64, 0.68 at 128;
            with 8-bit weights never (1.5 at 128).
        activations: element type of activations, KV and unquantised weights.
    """

    name: Literal["fp32", "fp16", "bf16", "int8", "int4"]
    bits: Literal[4, 8] | None
    block_size: int = 32
    accuracy_level: int = 4
    wide_rows: int | None = None
    activations: Literal["float32", "float16", "bfloat16"] = "float32"

    @property
    def activation_type(self) -> ir.DataType:
        """`activations` as ONNX knows it."""
        types = {"float16": ir.DataType.FLOAT16, "bfloat16": ir.DataType.BFLOAT16}
        return types.get(self.activations, ir.DataType.FLOAT)

    def embedding_bits(self, *, tied: bool) -> Literal[4, 8] | None:
        """Bits of the token embedding. A tied head reads the same copy; else 8 lose nothing."""
        return self.bits if tied or self.bits is None else 8


PRECISIONS: dict[str, Precision] = {
    "fp32": Precision("fp32", None),
    "fp16": Precision("fp16", None, activations="float16"),
    "bf16": Precision("bf16", None, activations="bfloat16"),
    "int8": Precision("int8", 8),
    "int4": Precision("int4", 4, wide_rows=48),
}


def with_half_activations(precision: Precision) -> Precision:
    """The precision on a GPU: quantised weights with float16 activations, one graph per stage."""
    if precision.bits is None:
        return precision
    return replace(precision, activations="float16", accuracy_level=0, wide_rows=None)
