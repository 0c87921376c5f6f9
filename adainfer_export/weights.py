"""What an initialiser of a stage is made of: expressions over checkpoint tensors.

Graphs are lowered before any weight is read. Lowering only notes, per initialiser, the expression
that will give its value; the writer evaluates them one at a time and writes equal ones once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from .quantise import quantise_blocks
from .sources.checkpoint import Checkpoint

__all__ = ["Dense", "Quantised", "Rows", "Stored", "WeightExpr", "evaluate"]


@dataclass(frozen=True)
class Dense:
    """Float32: checkpoint tensors concatenated along axis 0, then transposed if asked."""

    parts: tuple[str, ...]
    transpose: bool = False


@dataclass(frozen=True)
class Quantised:
    """One of the two tensors of a block-quantised matrix `[out, in]` (see `quantise`)."""

    parts: tuple[str, ...]
    bits: Literal[4, 8]
    block_size: int
    field: Literal["packed", "scales"]


@dataclass(frozen=True)
class Rows:
    """Rows `start … end-1` of `total` of what is stored already: a reference into it."""

    whole: Dense | Quantised
    start: int
    end: int
    total: int


Stored = Dense | Quantised
WeightExpr = Stored | Rows


def evaluate(
    checkpoint: Checkpoint, exprs: tuple[Stored, ...]
) -> dict[Stored, npt.NDArray[np.generic]]:
    """Values of expressions over the same parts, each part read once.

    Raises:
        CheckpointError: a tensor is missing, damaged or not finite.
    """
    tensors = [checkpoint.read(name) for name in exprs[0].parts]
    dense = tensors[0] if len(tensors) == 1 else np.concatenate(tensors, axis=0)
    values: dict[Stored, npt.NDArray[np.generic]] = {}
    for expr in exprs:
        if isinstance(expr, Dense):
            values[expr] = np.ascontiguousarray(dense.T) if expr.transpose else dense
        elif expr not in values:
            packed, scales = quantise_blocks(dense, expr.bits, expr.block_size)
            values[Quantised(expr.parts, expr.bits, expr.block_size, "packed")] = packed
            values[Quantised(expr.parts, expr.bits, expr.block_size, "scales")] = scales
    return {expr: values[expr] for expr in exprs}
