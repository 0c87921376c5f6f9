"""What an initialiser of a stage is made of: expressions over checkpoint tensors.

Graphs are lowered before any weight is read. Lowering only notes, per initialiser, the expression
that will give its value; the writer evaluates them one at a time and writes equal ones once.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

import ml_dtypes
import numpy as np
import numpy.typing as npt

from .errors import UnsupportedError
from .int4 import quantise_int4
from .quantise import quantise_blocks
from .sources.checkpoint import Checkpoint

__all__ = ["Dense", "ElementName", "Int4Blocks", "Quantised", "WeightExpr", "evaluate"]

ElementName = Literal["float32", "float16", "bfloat16"]
_DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


@dataclass(frozen=True)
class Dense:
    """Checkpoint tensors concatenated along axis 0, then transposed if asked, as `dtype`."""

    parts: tuple[str, ...]
    transpose: bool = False
    dtype: ElementName = "float32"


@dataclass(frozen=True)
class Quantised:
    """One of the two tensors of a block-quantised matrix `[out, in]` (see `quantise`).

    `dtype` is the scales'.
    """

    parts: tuple[str, ...]
    bits: Literal[4, 8]
    block_size: int
    field: Literal["packed", "scales"]
    dtype: ElementName = "float32"


@dataclass(frozen=True)
class Int4Blocks:
    """One of the two tensors of an int4 matrix (see `int4`); `dtype` is the scales'."""

    parts: tuple[str, ...]
    block_size: int
    field: Literal["packed", "scales"]
    dtype: ElementName = "float32"


WeightExpr = Dense | Quantised | Int4Blocks


def evaluate(
    checkpoint: Checkpoint, exprs: tuple[WeightExpr, ...]
) -> dict[WeightExpr, npt.NDArray[np.generic]]:
    """Values of expressions over the same parts, each part read once.

    Raises:
        CheckpointError: a tensor is missing, damaged or not finite.
    """
    tensors = [checkpoint.read(name) for name in exprs[0].parts]
    dense = tensors[0] if len(tensors) == 1 else np.concatenate(tensors, axis=0)
    values: dict[WeightExpr, npt.NDArray[np.generic]] = {}
    for expr in exprs:
        if isinstance(expr, Dense):
            values[expr] = _as_type(dense.T if expr.transpose else dense, expr.dtype)
        elif isinstance(expr, Int4Blocks):
            packed4, scales4 = quantise_int4(dense, expr.block_size, _DTYPES[expr.dtype])
            values[expr] = packed4 if expr.field == "packed" else scales4
        elif expr not in values:
            packed, scales = quantise_blocks(dense, expr.bits, expr.block_size)
            values[replace(expr, field="packed")] = packed
            for dtype in get_args(ElementName):
                key = replace(expr, field="scales", dtype=dtype)
                values[key] = _as_type(scales, dtype)
    return {expr: values[expr] for expr in exprs}


def _as_type(dense: npt.NDArray[np.float32], dtype: ElementName) -> npt.NDArray[np.generic]:
    with np.errstate(over="ignore"):
        converted = np.ascontiguousarray(dense).astype(_DTYPES[dtype], copy=False)
    if dtype == "float16" and not np.isfinite(converted).all():
        raise UnsupportedError(
            "a weight leaves the range of float16: export with --precision bf16 or fp32"
        )
    return converted
