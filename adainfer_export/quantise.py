"""Symmetric block-wise weight quantisation, in the layout of ONNX Runtime's MatMulNBits.

A matrix `W [out, in]` is cut along `in` into blocks of `block_size` values that share a scale `s`:
`w ≈ (q - 2**(bits-1)) * s`, with q unsigned. The block's extreme value takes the code that only
the negative side has, and is kept exactly (s is negative where the extreme is positive).
4-bit values are packed two to a byte, low half first.

Searching scales with less squared error was tried and gave a larger divergence from the fp32 model
on SmolLM2 (KL .37-.46 against .34): large weights matter more than their share of the error.

Blocks that a checkpoint holds already have the same form with one more number, a shift per block:
`w = (q - 2**(bits-1)) * s + shift`.

(Operator: com.microsoft.MatMulNBits, `B [out, in/block, block*bits/8]`, `scales [out, in/block]`.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from .gptq import ErrorFeedback, inverse_scales

__all__ = [
    "BlockRows",
    "Blocks",
    "QuantisedRows",
    "dequantise_blocks",
    "pack",
    "quantise_blocks",
]

_VALUES_AT_ONCE = 1 << 18  # what is worked on at once stays in the cache


@dataclass(frozen=True)
class Blocks:
    """How a matrix `[out, in]` is stored in blocks along `in`.

    Attributes:
        bits: of a code.
        block_size: values that share a scale.
        kept: the blocks are the checkpoint's own, as they are; else they are made from its values.
        shifted: of kept blocks: a shift stands beside the scale.
    """

    bits: Literal[4, 8]
    block_size: int
    kept: bool = False
    shifted: bool = False


@dataclass(frozen=True)
class BlockRows:
    """Rows of a checkpoint's own blocks.

    Attributes:
        codes: uint8 `[rows, blocks, block_size]`, with `2**(bits-1)` for zero.
        scales: float32 `[rows, blocks]`.
        shifts: float32 `[rows, blocks]`, or None for zeros.
    """

    codes: npt.NDArray[np.uint8]
    scales: npt.NDArray[np.float32]
    shifts: npt.NDArray[np.float32] | None = None

    @classmethod
    def join(cls, parts: Sequence[BlockRows]) -> BlockRows:
        """Rows of one matrix, one part after the other."""
        if len(parts) == 1:
            return parts[0]
        shifts = [part.shifts for part in parts if part.shifts is not None]
        return cls(
            np.concatenate([part.codes for part in parts]),
            np.concatenate([part.scales for part in parts]),
            np.concatenate(shifts) if shifts else None,
        )


@dataclass(frozen=True)
class QuantisedRows:
    """Rows as they are stored, and what they lost.

    Attributes:
        packed: uint8 `[rows, blocks, block_size*bits/8]`.
        scales: float32 `[rows, blocks]`.
        squared_error: sum of (stored - true)².
        squared: sum of true².
    """

    packed: npt.NDArray[np.uint8]
    scales: npt.NDArray[np.float32]
    squared_error: float
    squared: float


def quantise_blocks(
    weight: npt.NDArray[np.float32],
    bits: Literal[4, 8],
    block_size: int,
    feedback: ErrorFeedback | None = None,
) -> QuantisedRows:
    """Quantises `[out, in]` (in divisible by `block_size`).

    Args:
        feedback: how rounding errors are made up for; None: every value goes to its nearest code.
    """
    out_features, in_features = weight.shape
    blocks = in_features // block_size
    packed = np.empty((out_features, blocks, block_size * bits // 8), np.uint8)
    scales = np.empty((out_features, blocks), np.float32)
    squared_error = squared = 0.0
    # Feedback reads a matrix of in x in for every step: as few as there are.
    step = max(1, _VALUES_AT_ONCE // in_features) if feedback is None else max(1, out_features)
    for start in range(0, out_features, step):
        rows = slice(start, start + step)
        values = weight[rows].reshape(-1, block_size)
        scale = _scales(values, bits)
        if feedback is None:
            codes = _nearest(values, scale, bits)
        else:
            half = 2 ** (bits - 1)
            codes = feedback.round(weight[rows], scale.reshape(-1, blocks), -half, half - 1)
            codes = codes.reshape(values.shape)
        packed[rows] = pack(_unsigned(codes, bits), bits).reshape(-1, blocks, packed.shape[2])
        scales[rows] = scale.reshape(-1, blocks)
        codes *= scale
        codes -= values
        squared_error += float(np.vdot(codes, codes))
        squared += float(np.vdot(values, values))
    return QuantisedRows(packed, scales, squared_error, squared)


def dequantise_blocks(
    packed: npt.NDArray[np.uint8], scales: npt.NDArray[np.float32], bits: Literal[4, 8]
) -> npt.NDArray[np.float32]:
    """The inverse: float32 `[out, in]`."""
    codes = packed if bits == 8 else np.stack([packed & 15, packed >> 4], axis=-1)
    codes = codes.reshape(*scales.shape, -1).astype(np.float32)
    values: npt.NDArray[np.float32] = (codes - 2 ** (bits - 1)) * scales[..., None]
    return values.reshape(scales.shape[0], -1)


def pack(codes: npt.NDArray[np.uint8], bits: Literal[4, 8]) -> npt.NDArray[np.uint8]:
    """`[…, block_size]` codes, two to a byte where they have 4 bits, low half first."""
    if bits == 8:
        return codes
    return (codes[..., 0::2] | (codes[..., 1::2] << 4)).astype(np.uint8)


def _scales(values: npt.NDArray[np.float32], bits: Literal[4, 8]) -> npt.NDArray[np.float32]:
    """Of blocks `[blocks, block_size]`: `[blocks, 1]`."""
    highest, lowest = values.max(axis=1, keepdims=True), values.min(axis=1, keepdims=True)
    extreme: npt.NDArray[np.float32] = np.where(highest >= -lowest, highest, lowest)
    return extreme / np.float32(-(2 ** (bits - 1)))


def _nearest(
    values: npt.NDArray[np.float32], scale: npt.NDArray[np.float32], bits: Literal[4, 8]
) -> npt.NDArray[np.float32]:
    """Signed codes as floats `[blocks, block_size]`."""
    half = 2 ** (bits - 1)
    codes = values * inverse_scales(scale)
    np.rint(codes, out=codes)
    np.clip(codes, -half, half - 1, out=codes)
    return codes


def _unsigned(codes: npt.NDArray[np.float32], bits: Literal[4, 8]) -> npt.NDArray[np.uint8]:
    return (codes + np.float32(2 ** (bits - 1))).astype(np.uint8)
