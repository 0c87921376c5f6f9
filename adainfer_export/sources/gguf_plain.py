"""Whether a GGUF file's keys ask for more than its family computes in transformers.

Such files are another model under the family's name: llama.cpp's derived architectures use the
same tensors with scales, caps or experts, which a plain graph would silently leave out.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from ..errors import UnsupportedError

__all__ = ["require_plain"]

# Below the architecture's name: the values that change nothing.
_PLAIN: dict[str, tuple[float, ...]] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0,),
    "attention.max_alibi_bias": (0,),
    "attention.output_scale": (0, 1),
    "attention.temperature_length": (0,),
    "attn_logit_softcapping": (0,),
    "embedding_scale": (0, 1),
    "expert_count": (0,),
    "final_logit_softcapping": (0,),
    "logit_scale": (0, 1),
    "residual_scale": (0, 1),
    "use_parallel_residual": (False,),
}


def require_plain(
    optional: Callable[[str], Any], head_dim: int, positions: int, where: str
) -> None:
    """Nothing, where a plain decoder is what the file describes.

    Args:
        optional: the value of a key below the architecture's name, or None.
        positions: the model's longest text.

    Raises:
        UnsupportedError: a key changes the computation.
    """
    for name, plain in _PLAIN.items():
        if (value := optional(name)) is not None and value not in plain:
            shown = f"{value:g}" if isinstance(value, float) else value
            raise _unsupported(f"{name} {shown}", where)
    scale = optional("attention.scale")
    if scale and not math.isclose(scale, head_dim**-0.5, rel_tol=1e-6):
        raise _unsupported(f"attention.scale {scale:g}", where)
    window = optional("attention.sliding_window")
    if window and int(window) < positions:
        raise _unsupported(f"a sliding window ({window} of {positions} positions)", where)


def _unsupported(what: str, where: str) -> UnsupportedError:
    return UnsupportedError(
        f"{where}: {what} in GGUF is not supported; export from the Hugging Face folder instead"
    )
