"""Weights in 8-bit floating point (E4M3), one scale per output of a linear layer.

A matrix `W [out, in]` is stored transposed, `[in, out]`, as the second operand of a product:
`w ≈ c · FLOAT8_UNIT · s`, with codes c of four significant digits in ±448 and s the largest
magnitude of an output's weights over `448 · FLOAT8_UNIT`. Codes are rounded to the nearest, ties to
even, and saturate: E4M3 has no infinity.

The unit is a power of two, so that it changes no digit in any type. It brings codes to about ±1:
then a product of thousands of them stays within float16.

(Format: Micikevicius et al. 2022, "FP8 Formats for Deep Learning"; ONNX's FLOAT8E4M3FN.)
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import numpy.typing as npt

__all__ = ["FLOAT8_UNIT", "dequantise_float8", "quantise_float8"]

FLOAT8_UNIT = 2.0**-8
_LARGEST = float(ml_dtypes.finfo(ml_dtypes.float8_e4m3fn).max)  # 448
_TINY = 6e-5  # the least normal float16: smaller scales lose their digits


def quantise_float8(
    weight: npt.NDArray[np.float32], dtype: npt.DTypeLike = np.float16
) -> tuple[npt.NDArray[np.generic], npt.NDArray[np.generic]]:
    """Quantises `[out, in]`.

    Codes are chosen for the scale as it is stored, rounded to `dtype`.

    Returns:
        codes float8_e4m3fn `[in, out]` and scales `[1, out]`.
    """
    values = weight.T
    needed = np.abs(values).max(axis=0, keepdims=True) / np.float32(_LARGEST * FLOAT8_UNIT)
    scales = np.maximum(needed, np.float32(_TINY)).astype(dtype)
    codes = values / (scales.astype(np.float32) * np.float32(FLOAT8_UNIT))
    np.clip(codes, -_LARGEST, _LARGEST, out=codes)
    return codes.astype(ml_dtypes.float8_e4m3fn), scales


def dequantise_float8(
    codes: npt.NDArray[np.generic], scales: npt.NDArray[np.generic]
) -> npt.NDArray[np.float32]:
    """The inverse: float32 `[out, in]`."""
    values = codes.astype(np.float32) * np.float32(FLOAT8_UNIT) * scales.astype(np.float32)
    return np.ascontiguousarray(values.T)
