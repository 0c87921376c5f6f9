"""Rotary tables, with frequencies from transformers' own functions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import UnsupportedError

__all__ = ["Tables", "head_dim_of", "rotary_tables"]

# "dynamic" frequencies change with the length of the text: keys in the cache would go stale.
_KINDS = ("default", "linear", "llama3", "longrope", "yarn")


@dataclass(frozen=True)
class Tables:
    """cos and sin `[positions, rotary width / 2]`, the attention's scaling factor in them."""

    cos: npt.NDArray[np.float32]
    sin: npt.NDArray[np.float32]


def head_dim_of(config: Any) -> int:
    """Width of an attention head."""
    return int(
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )


def rotary_tables(config: Any, max_seq_len: int, layer_type: str | None = None) -> Tables:
    """Tables for positions 0 … max_seq_len - 1.

    With `longrope`, `max_seq_len` decides: an engine that goes beyond the length of the original
    training has the long factors at all positions, else the short ones. (transformers changes
    over in the middle of a text, where keys with the short factors are in the cache already.)

    Args:
        layer_type: where the configuration has parameters per kind of layer.

    Raises:
        UnsupportedError: another kind of scaling, where the message names those that are
            supported, or values that give no frequencies.
    """
    import torch
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = config.rope_parameters
    if layer_type is not None:
        parameters = parameters[layer_type]
    kind = parameters.get("rope_type", "default")
    if kind not in _KINDS:
        raise UnsupportedError(
            f"rotary type {kind!r} is not supported (supported: {', '.join(_KINDS)})"
        )
    if kind == "default":
        width = int(head_dim_of(config) * parameters.get("partial_rotary_factor", 1.0))
        exponents = torch.arange(0, width, 2, dtype=torch.float32) / width
        frequencies, scaling = 1.0 / (parameters["rope_theta"] ** exponents), 1.0
    else:
        compute = ROPE_INIT_FUNCTIONS[kind]
        named = {} if layer_type is None else {"layer_type": layer_type}
        frequencies, scaling = compute(config, torch.device("cpu"), seq_len=max_seq_len, **named)
    if not torch.isfinite(frequencies).all():
        raise UnsupportedError(f"rope_parameters that give no finite frequencies: {parameters}")
    angles = torch.outer(torch.arange(max_seq_len, dtype=torch.float32), frequencies)
    return Tables((angles.cos() * scaling).numpy(), (angles.sin() * scaling).numpy())
