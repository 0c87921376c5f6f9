"""The architectures that the compiler supports: one entry each, nothing else to touch."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from .decoders import gemma, gpt2, gpt_neox, opt, phi3
from .decoders.builder import Decoder
from .errors import UnsupportedError

__all__ = ["ARCHITECTURES", "Architecture", "find_architecture", "sliding_windows"]


@dataclass(frozen=True)
class Architecture:
    """A decoder family.

    Attributes:
        model_type: `model_type` of the Hugging Face configuration.
        frontend_name: the frontend library's name for it, where it builds the decoder.
        build: what builds it instead, from the configuration, the engine's maximum length, and the
            configuration of each layer.
        aliases: (prefix, other prefix) of tensor names, see `sources.viewed`.
        wrapped_in: `model_type` of models that hold this decoder beside others (of images).
        others: prefixes of those others' tensors, which are not read.
        windows: which layers have the configuration's `sliding_window`: none, whatever it says,
            all, or those that `layer_types` names. (transformers reads the keys of a
            configuration that its modelling code of the family reads, and no others.)
        prunable: layers may differ in heads and feed-forward width.
        gguf_name: `general.architecture` of GGUF files, where they are supported. Several
            families may share one: such files are read as the first of them.
        gguf_permuted_rope: llama.cpp's converter interleaves the rows of Q and K of this
            family (its rotary rotates neighbouring pairs); reading undoes that.
    """

    model_type: str
    frontend_name: str | None = None
    build: Callable[[Any, int, Sequence[Any]], Decoder] | None = None
    aliases: tuple[tuple[str, str], ...] = ()
    wrapped_in: str | None = None
    others: tuple[str, ...] = ()
    windows: Literal["none", "all", "layer_types"] = "none"
    prunable: bool = False
    gguf_name: str | None = None
    gguf_permuted_rope: bool = False


ARCHITECTURES: tuple[Architecture, ...] = (
    Architecture("llama", "llama", prunable=True, gguf_name="llama", gguf_permuted_rope=True),
    Architecture(
        "mistral",
        "mistral",
        windows="all",
        prunable=True,
        gguf_name="llama",
        gguf_permuted_rope=True,
    ),
    Architecture("qwen2", "qwen2", windows="layer_types", prunable=True, gguf_name="qwen2"),
    Architecture("qwen3", "qwen3", windows="layer_types", prunable=True, gguf_name="qwen3"),
    Architecture("opt", build=opt.build, aliases=(("model.decoder.", "decoder."),)),
    Architecture("gemma2", build=gemma.build, windows="layer_types", prunable=True),
    Architecture(
        "gemma3_text",
        build=gemma.build,
        aliases=(
            ("model.", "model.language_model."),
            ("model.", "language_model.model."),
            ("lm_head.", "language_model.lm_head."),
        ),
        wrapped_in="gemma3",
        others=(
            "vision_tower.",
            "multi_modal_projector.",
            "model.vision_tower.",
            "model.multi_modal_projector.",
        ),
        windows="layer_types",
        prunable=True,
    ),
    Architecture("phi3", build=phi3.build, windows="all", prunable=True),
    Architecture("gpt2", build=gpt2.build, aliases=(("transformer.", ""),)),
    Architecture("gpt_neox", build=gpt_neox.build, aliases=(("lm_head.", "embed_out."),)),
)


def find_architecture(model_type: str) -> Architecture:
    """The entry for a Hugging Face `model_type`.

    Raises:
        UnsupportedError: no such entry; the message names what is supported, and near names.
    """
    names = [entry.model_type for entry in ARCHITECTURES]
    for entry in ARCHITECTURES:
        if model_type in (entry.model_type, entry.wrapped_in):
            return entry
    near = difflib.get_close_matches(model_type, names, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise UnsupportedError(
        f"architecture {model_type!r} is not supported (supported: {', '.join(names)}){hint}"
    )


def sliding_windows(
    architecture: Architecture, config: Any, max_seq_len: int
) -> tuple[int | None, ...]:
    """Of each layer, the tokens that a position attends to, itself included; None for all.

    Raises:
        UnsupportedError: layers of another kind, or a window that holds no position.
    """
    layers = int(config.num_hidden_layers)
    window: int | None = getattr(config, "sliding_window", None)
    if architecture.windows == "none":
        return (None,) * layers
    if architecture.windows == "all":
        kinds = ["full_attention" if window is None else "sliding_attention"] * layers
    else:  # of Qwen the configuration has no window unless `use_sliding_window` says so
        kinds = list(config.layer_types)
    if strange := set(kinds) - {"sliding_attention", "full_attention"}:
        raise UnsupportedError(f"layers of type {sorted(strange)[0]!r} are not supported")
    if "sliding_attention" in kinds and (window is None or window < 1):
        raise UnsupportedError(
            f"layers with a sliding window, and sliding_window is {window}: a position attends to "
            "at least itself"
        )
    reached = window is not None and window < max_seq_len
    return tuple(window if reached and kind == "sliding_attention" else None for kind in kinds)
