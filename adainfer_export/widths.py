"""Layers of different widths in one model, as pruning tools (LLM-Pruner and others) leave them.

Configurations cannot say it: the tensors' shapes do.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .decoders.rotary import head_dim_of
from .errors import CheckpointError

__all__ = ["LayerWidths", "Shape", "layer_configs", "layer_widths"]

Shape = Callable[[str], tuple[int, ...]]


@dataclass(frozen=True)
class LayerWidths:
    """Query heads, heads of K and V, and the feed-forward network's inner width of a layer."""

    heads: int
    kv_heads: int
    intermediate: int


def layer_widths(config: Any, shape: Shape) -> tuple[LayerWidths, ...] | None:
    """Widths of each layer, from the shapes of a Llama-like checkpoint, fused or not.

    None where all layers are alike: the configuration's widths then hold, and weights that have
    others belong to another configuration. Layers that are not consistent count as configured.

    Args:
        shape: of a stored tensor; raises where it is missing.
    """
    heads = int(config.num_attention_heads)
    expected = LayerWidths(
        heads,
        int(getattr(config, "num_key_value_heads", None) or heads),
        int(config.intermediate_size),
    )
    head_dim = head_dim_of(config)
    found = [
        _of_layer(shape, f"model.layers.{index}", int(config.hidden_size), head_dim) or expected
        for index in range(config.num_hidden_layers)
    ]
    return tuple(found) if len(set(found)) > 1 else None


def layer_configs(config: Any, widths: Sequence[LayerWidths] | None) -> tuple[Any, ...]:
    """The configuration of each layer: the model's, but for widths of the layer's own."""
    if widths is None:
        return (config,) * int(config.num_hidden_layers)
    found = []
    for layer in widths:
        own = copy.copy(config)
        own.head_dim = head_dim_of(config)  # not of the layer's fewer heads
        own.num_attention_heads, own.num_key_value_heads = layer.heads, layer.kv_heads
        own.intermediate_size = layer.intermediate
        found.append(own)
    return tuple(found)


def _of_layer(shape: Shape, name: str, width: int, head_dim: int) -> LayerWidths | None:
    """None where the tensors of a layer do not fit together, or are not all there."""
    found = _of_separate(shape, name, width, head_dim) or _of_fused(shape, name, width, head_dim)
    if found is None or found.kv_heads <= 0 or found.heads % found.kv_heads:
        return None
    return found


def _of_separate(shape: Shape, name: str, width: int, head_dim: int) -> LayerWidths | None:
    try:
        query, key, value, out = (shape(f"{name}.self_attn.{p}_proj.weight") for p in "qkvo")
        gate, up, down = (shape(f"{name}.mlp.{p}_proj.weight") for p in ("gate", "up", "down"))
    except CheckpointError:
        return None
    widths = LayerWidths(query[0] // head_dim, key[0] // head_dim, gate[0])
    fits = (
        query == (widths.heads * head_dim, width)
        and key == value == (widths.kv_heads * head_dim, width)
        and out == query[::-1]
        and gate == up == (widths.intermediate, width)
        and down == gate[::-1]
    )
    return widths if fits else None


def _of_fused(shape: Shape, name: str, width: int, head_dim: int) -> LayerWidths | None:
    """Of Phi-3's layers, whose Q, K, V and gate, up are one matrix each."""
    try:
        fused, out = (shape(f"{name}.self_attn.{p}_proj.weight") for p in ("qkv", "o"))
        gate_up, down = (shape(f"{name}.mlp.{p}_proj.weight") for p in ("gate_up", "down"))
    except CheckpointError:
        return None
    heads = out[-1] // head_dim
    widths = LayerWidths(heads, (fused[0] // head_dim - heads) // 2, down[-1])
    fits = (
        fused == ((widths.heads + 2 * widths.kv_heads) * head_dim, width)
        and out == (width, widths.heads * head_dim)
        and gate_up == (2 * widths.intermediate, width)
        and down == (width, widths.intermediate)
    )
    return widths if fits else None
