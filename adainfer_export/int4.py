"""Symmetric block-wise int4 weights in the layout of ONNX's DequantizeLinear.

A matrix `W [out, in]` is stored transposed, `[in, out]`, as the second operand of a product. Blocks
of `block_size` values along `in` share a scale: `w ≈ q · s` with q in −8 … 7 and no zero point.
TensorRT takes positive scales only, so s is the least that clips neither end:
`max(max(w) / 7, −min(w) / 8)`. Values are packed two to a byte along `out`, low half first.

KL divergence of SmolLM2's next tokens from the float model's, 187 tokens of six texts, linear
layers alone in blocks of 32: 0.44, as with the scales of either sign that `quantise` makes (0.44).
±7 gives 0.48; the scale of least squared error 0.51, with errors weighted by w² 0.43. Blocks of 16,
which TensorRT does not take, give 0.38; layers 1–2 and 29–30 left alone 0.32.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from .gptq import ErrorFeedback

__all__ = ["dequantise_int4", "quantise_int4"]

_COLUMNS_AT_ONCE = 1024


def quantise_int4(
    weight: npt.NDArray[np.float32],
    block_size: int,
    dtype: npt.DTypeLike = np.float16,
    feedback: ErrorFeedback | None = None,
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.generic]]:
    """Quantises `[out, in]` (out even, in divisible by `block_size`).

    Codes are chosen for the scale as it is stored, rounded to `dtype`.

    Args:
        feedback: how rounding errors are made up for; None: every value goes to its nearest code.

    Returns:
        packed codes uint8 `[in, out / 2]` and scales `[in / block_size, out]`.
    """
    out_features, in_features = weight.shape
    blocks = in_features // block_size
    packed = np.empty((in_features, out_features // 2), np.uint8)
    scales = np.empty((blocks, out_features), dtype)
    tiny = np.float32(6e-5)  # the least normal float16: smaller scales lose their digits
    for start in range(0, out_features, _COLUMNS_AT_ONCE):
        columns = slice(start, min(start + _COLUMNS_AT_ONCE, out_features))
        values = weight[columns].T.reshape(blocks, block_size, -1)
        needed = np.maximum(values.max(axis=1) / 7.0, values.min(axis=1) / -8.0)
        scale = np.maximum(needed, tiny).astype(dtype)
        steps = scale.astype(np.float32)
        if feedback is None:
            codes = np.clip(np.rint(values / steps[:, None]), -8, 7).reshape(in_features, -1)
        else:
            codes = feedback.round(weight[columns], steps.T, -8, 7).T
        nibbles = codes.astype(np.int8) & 15
        low, high = nibbles[:, 0::2].view(np.uint8), nibbles[:, 1::2].view(np.uint8)
        packed[:, columns.start // 2 : columns.stop // 2] = low | (high << 4)
        scales[:, columns] = scale
    return packed, scales


def dequantise_int4(
    packed: npt.NDArray[np.uint8], scales: npt.NDArray[np.generic]
) -> npt.NDArray[np.float32]:
    """The inverse: float32 `[out, in]`."""
    nibbles = np.stack([packed & 15, packed >> 4], axis=-1).reshape(packed.shape[0], -1)
    codes = (nibbles.astype(np.int8) ^ 8) - 8  # sign of four bits
    blocks = codes.reshape(scales.shape[0], -1, scales.shape[1]).astype(np.float32)
    values = blocks * scales.astype(np.float32)[:, None]
    return np.ascontiguousarray(values.reshape(packed.shape[0], -1).T)
