"""What the codes of an int8 KV cache stand for.

    code = clip(round(x / scale), -128, 127)        x = code * scale

Scales are fixed at export, one for each channel of each head (the same for all of a layer where
that is as good), so that a position's codes do not depend on other positions: GroupQueryAttention's
`k_scale` and `v_scale` with `PER_CHANNEL` or `PER_TENSOR`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ..errors import StageError, one_line
from ..manifest import Manifest
from .base import Float32

__all__ = ["KV_SCALES", "LARGEST_CODE", "KvScales", "load_kv_scales"]

KV_SCALES = "stages/kv_scales.npy"
LARGEST_CODE = 127

Codes = npt.NDArray[np.int8]


@dataclass(frozen=True)
class KvScales:
    """The steps between codes.

    Attributes:
        values: float32 `[layers, 2, heads, head_dim]`, of keys (after rotary) and values, positive;
            ones for heads that a layer does not have.
    """

    values: Float32

    def save(self, folder: Path) -> Path:
        """Writes them into an engine folder's stages; where."""
        path = folder / KV_SCALES
        path.parent.mkdir(exist_ok=True)
        np.save(path, self.values)
        return path

    def of(self, layer: int, heads: int) -> Float32:
        """A layer's (1-based) `[2, heads, head_dim]`."""
        return self.values[layer - 1, :, :heads]

    def quantise(self, layer: int, key: Float32, value: Float32) -> tuple[Codes, Codes]:
        """`[heads, rows, head_dim]` each."""
        pairs = zip((key, value), self.of(layer, len(key)), strict=True)
        keys, values = (_codes(part, scales[:, None]) for part, scales in pairs)
        return keys, values

    def dequantise(self, layer: int, key: Codes, value: Codes) -> tuple[Float32, Float32]:
        """The inverse of `quantise`, but for what rounding took away."""
        key_scales, value_scales = self.of(layer, len(key))
        return key * key_scales[:, None], value * value_scales[:, None]


def load_kv_scales(folder: Path, manifest: Manifest) -> KvScales | None:
    """The folder's scales; None where its caches hold floats.

    Raises:
        StageError: the file does not hold what the manifest says.
    """
    kv = manifest.kv
    if kv.scales is None:
        return None
    expected = (manifest.model.num_layers, 2, kv.num_heads, kv.head_dim)
    try:
        values = np.load(folder / kv.scales, allow_pickle=False)
    except Exception as error:  # a damaged header is parsed as Python: of whatever kind
        reason = one_line(error)
        raise StageError(
            f"{folder / kv.scales} cannot be read: {reason}; export the model again"
        ) from error
    fits = isinstance(values, np.ndarray) and (values.dtype, values.shape) == (np.float32, expected)
    if not fits or not np.all(np.isfinite(values) & (values > 0)):
        raise StageError(
            f"{folder / kv.scales} does not hold the scales of caches {list(expected)}; "
            "export the model again"
        )
    return KvScales(values)


def _codes(values: Float32, scales: Float32) -> Codes:
    codes: Float32 = np.rint(values / scales).clip(-LARGEST_CODE - 1, LARGEST_CODE)
    return codes.astype(np.int8)
