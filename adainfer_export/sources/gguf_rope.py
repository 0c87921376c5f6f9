"""Rotary parameters from what a GGUF file says of them.

llama.cpp's converter does not name the scaling of Llama 3. It stores what that comes to: a tensor
of numbers, one per frequency, by which the frequencies are divided. transformers has the same form
in `longrope`, whose factors are given here for long and for short texts alike.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import CheckpointError, UnsupportedError

__all__ = ["FACTORS", "rope_parameters"]

FACTORS = "rope_freqs.weight"
_ELSE = "export from the Hugging Face folder instead"


def rope_parameters(
    optional: Callable[[str], Any],
    factors: npt.NDArray[np.float32] | None,
    head_dim: int,
    positions: int,
    where: str,
) -> dict[str, Any]:
    """The `rope_parameters` of a transformers configuration.

    Args:
        optional: the value of a key below the architecture's `rope.`, or None.
        factors: the tensor `FACTORS`, where the file has it.
        positions: the model's longest text.

    Raises:
        UnsupportedError: rotary positions of another kind than can be computed.
        CheckpointError: the factors are not those of this model's heads.
    """
    if (rotated := optional("dimension_count")) not in (None, head_dim):
        raise UnsupportedError(
            f"{where}: rotary positions in {rotated} of each head's {head_dim} values are not "
            f"supported in GGUF; {_ELSE}"
        )
    divisors = np.full(head_dim // 2, _scaling(optional, where), np.float32)
    if factors is not None:
        divisors *= _checked(factors, head_dim, where)
    parameters: dict[str, Any] = {"rope_theta": float(optional("freq_base") or 10000.0)}
    if (divisors == 1.0).all():
        return parameters | {"rope_type": "default"}
    given = divisors.tolist()
    return parameters | {
        "rope_type": "longrope",
        "short_factor": given,
        "long_factor": given,
        "factor": 1.0,
        "attention_factor": 1.0,
        "original_max_position_embeddings": positions,
    }


def _scaling(optional: Callable[[str], Any], where: str) -> float:
    """What all positions are divided by; llama.cpp takes a factor without a kind as linear."""
    kind = optional("scaling.type") or "linear"
    attention = optional("scaling.attn_factor")
    if kind not in ("none", "linear") or attention not in (None, 1.0):
        scaled = "" if attention in (None, 1.0) else f" with attention factor {attention:g}"
        raise UnsupportedError(
            f"{where}: rope scaling {kind!r}{scaled} in GGUF is not supported "
            f"(supported: none, linear, and the factors in {FACTORS}); {_ELSE}"
        )
    if kind == "none":
        return 1.0
    return float(optional("scaling.factor") or optional("scale_linear") or 1.0)


def _checked(
    factors: npt.NDArray[np.float32], head_dim: int, where: str
) -> npt.NDArray[np.float32]:
    if factors.shape != (head_dim // 2,) or not (np.isfinite(factors) & (factors > 0)).all():
        raise CheckpointError(
            f"{where}: {FACTORS} must hold {head_dim // 2} positive numbers, found shape "
            f"{list(factors.shape)}; the file is damaged: download it again"
        )
    return factors
