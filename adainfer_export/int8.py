"""Weights in 8-bit integers, one scale per output of a linear layer.

A matrix `W [out, in]` is stored transposed, `[in, out]`, as the second operand of a product:
`w ≈ c · s`, with codes c in ±127 and s the largest magnitude of an output's weights over 127.

(Operator: com.microsoft.MatMulIntegerToFloat, `B [in, out]`, `b_scale [out]`.)
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["LARGEST_CODE", "dequantise_int8", "quantise_int8"]

LARGEST_CODE = 127
_TINY = 1e-30  # of outputs whose weights are all zero


def quantise_int8(
    weight: npt.NDArray[np.float32],
) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    """Quantises `[out, in]`; codes int8 `[in, out]` and scales float32 `[1, out]`."""
    values = weight.T
    largest = np.abs(values).max(axis=0, keepdims=True)
    scales = np.maximum(largest / np.float32(LARGEST_CODE), np.float32(_TINY))
    return np.rint(values / scales).astype(np.int8), scales


def dequantise_int8(
    codes: npt.NDArray[np.int8], scales: npt.NDArray[np.float32]
) -> npt.NDArray[np.float32]:
    """The inverse: float32 `[out, in]`."""
    return np.ascontiguousarray((codes * scales).T)
