"""GGUF's quantised blocks taken apart into codes, scales and shifts, without any loss.

llama.cpp's formats (ggml-common.h, `block_q4_0` …), for a row of bytes:

    Q4_0  32 values: d f16, 16 bytes of codes: values 0-15 in the low halves, 16-31 in the high
    Q4_1  the same with m f16 after d: w = d q + m
    Q8_0  32 values: d f16, 32 codes int8
    Q4_K  256 values in 8 sub-blocks: d, dmin f16, 12 bytes of 6-bit scales and minima, 128 of codes
    Q6_K  256 values in 16 sub-blocks: 128 bytes of low, 64 of high bits, 16 scales int8, d f16
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from ..quantise import BlockRows, Blocks

__all__ = ["KEPT_TYPES", "read_rows"]

_Bytes = npt.NDArray[np.uint8]
_Float = npt.NDArray[np.float32]


def read_rows(type_name: str, raw: _Bytes) -> BlockRows:
    """`[rows, bytes]` of a type in `KEPT_TYPES`."""
    _, block_bytes, take_apart = KEPT_TYPES[type_name]
    rows = raw.shape[0]
    codes, scales, shifts = take_apart(raw.reshape(-1, block_bytes))
    size = codes.shape[-1]
    return BlockRows(
        np.ascontiguousarray(codes).reshape(rows, -1, size),
        np.ascontiguousarray(scales).reshape(rows, -1),
        None if shifts is None else np.ascontiguousarray(shifts).reshape(rows, -1),
    )


def _f16(raw: _Bytes) -> _Float:
    """`[n, 2]` bytes to `[n]`."""
    return np.ascontiguousarray(raw).view(np.float16)[:, 0].astype(np.float32)


def _nibbles(raw: _Bytes) -> _Bytes:
    """`[n, bytes]` to `[n, 2*bytes]`: all low halves, then all high ones."""
    return np.concatenate([raw & 15, raw >> 4], axis=1)


def _q4_0(raw: _Bytes) -> tuple[_Bytes, _Float, None]:
    return _nibbles(raw[:, 2:]), _f16(raw[:, :2]), None


def _q4_1(raw: _Bytes) -> tuple[_Bytes, _Float, _Float]:
    scales = _f16(raw[:, :2])
    return _nibbles(raw[:, 4:]), scales, _f16(raw[:, 2:4]) + 8 * scales


def _q8_0(raw: _Bytes) -> tuple[_Bytes, _Float, None]:
    return raw[:, 2:] ^ np.uint8(128), _f16(raw[:, :2]), None  # int8 to unsigned with 128 for zero


def _q4_k(raw: _Bytes) -> tuple[_Bytes, _Float, _Float]:
    packed = raw[:, 4:16].reshape(-1, 3, 4)
    first, second, high = packed[:, 0], packed[:, 1], packed[:, 2]
    scale = np.concatenate([first & 63, (high & 15) | ((first >> 2) & 48)], axis=1)
    least = np.concatenate([second & 63, (high >> 4) | ((second >> 2) & 48)], axis=1)
    scales = _f16(raw[:, :2])[:, None] * scale.astype(np.float32)
    minima = _f16(raw[:, 2:4])[:, None] * least.astype(np.float32)
    halves = raw[:, 16:].reshape(-1, 4, 32)
    codes = np.stack([halves & 15, halves >> 4], axis=2).reshape(-1, 8, 32)
    return codes, scales, 8 * scales - minima


def _q6_k(raw: _Bytes) -> tuple[_Bytes, _Float, None]:
    low, high = raw[:, :128].reshape(-1, 2, 64), raw[:, 128:192].reshape(-1, 2, 1, 32)
    nibbles = np.concatenate([low & 15, low >> 4], axis=2).reshape(-1, 2, 4, 32)
    shift = np.arange(0, 8, 2, dtype=np.uint8).reshape(1, 1, 4, 1)
    codes = nibbles | (((high >> shift) & 3) << 4)
    factors = np.ascontiguousarray(raw[:, 192:208]).view(np.int8).astype(np.float32)
    scales = _f16(raw[:, 208:])[:, None] * factors
    return codes.reshape(-1, 16, 16) + np.uint8(96), scales, None  # 32 stands for zero, here 128


# name: how it is kept, bytes of a block of GGUF, how it is taken apart
KEPT_TYPES: dict[str, tuple[Blocks, int, Callable[[_Bytes], tuple[Any, ...]]]] = {
    "Q4_0": (Blocks(4, 32, kept=True), 18, _q4_0),
    "Q4_1": (Blocks(4, 32, kept=True, shifted=True), 20, _q4_1),
    "Q8_0": (Blocks(8, 32, kept=True), 34, _q8_0),
    "Q4_K": (Blocks(4, 32, kept=True, shifted=True), 144, _q4_k),
    "Q6_K": (Blocks(8, 16, kept=True), 210, _q6_k),
}
