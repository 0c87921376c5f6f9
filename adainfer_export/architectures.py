"""The architectures that the compiler supports: one entry each, nothing else to touch."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Any

from .errors import UnsupportedError

__all__ = ["ARCHITECTURES", "Architecture", "find_architecture", "sliding_window"]


@dataclass(frozen=True)
class Architecture:
    """A decoder family.

    Attributes:
        model_type: `model_type` of the Hugging Face configuration.
        frontend_name: the frontend's name for it.
        gguf_name: `general.architecture` of GGUF files, where they are supported.
        gguf_permuted_rope: llama.cpp's converter interleaves the rows of Q and K of this
            family (its rotary rotates neighbouring pairs); reading undoes that.
    """

    model_type: str
    frontend_name: str
    gguf_name: str | None = None
    gguf_permuted_rope: bool = False


ARCHITECTURES: tuple[Architecture, ...] = (
    Architecture("llama", "llama", gguf_name="llama", gguf_permuted_rope=True),
    Architecture("mistral", "mistral"),
    Architecture("qwen2", "qwen2", gguf_name="qwen2"),
    Architecture("qwen3", "qwen3", gguf_name="qwen3"),
)


def find_architecture(model_type: str) -> Architecture:
    """The entry for a Hugging Face `model_type`.

    Raises:
        UnsupportedError: no such entry; the message names what is supported, and near names.
    """
    names = [entry.model_type for entry in ARCHITECTURES]
    for entry in ARCHITECTURES:
        if entry.model_type == model_type:
            return entry
    near = difflib.get_close_matches(model_type, names, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise UnsupportedError(
        f"architecture {model_type!r} is not supported (supported: {', '.join(names)}){hint}"
    )


def sliding_window(config: Any, max_seq_len: int) -> int | None:
    """Window of the attention in tokens if it is shorter than the engine's maximum length."""
    if not getattr(config, "use_sliding_window", True):
        return None
    window: int | None = getattr(config, "sliding_window", None)
    if window is None or window >= max_seq_len:
        return None
    types = getattr(config, "layer_types", None)
    if types and len(set(types)) > 1:
        raise UnsupportedError("layers with and without a sliding window in one model")
    return window
