"""Phi-3: fused Q, K and V, fused gate and up, long-rope scaling.

mobius 0.1.0 wants Q, K and V split by its loader, and chooses between short and long rotary
factors in the graph, from the positions of one call: in a chain whose cache was filled with the
short ones, later layers would disagree with earlier ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir

from .builder import Decoder, DecoderBuilder, Rotation
from .rotary import head_dim_of, rotary_tables

__all__ = ["build"]


def build(config: Any, max_seq_len: int, layers: Sequence[Any]) -> Decoder:
    """Builds the decoder of a `Phi3Config`."""
    width, vocab_size, epsilon = config.hidden_size, config.vocab_size, config.rms_norm_eps
    graph = DecoderBuilder(width)
    hidden = graph.embedding("model.embed_tokens.weight", (vocab_size, width))
    tables = rotary_tables(config, max_seq_len)
    rotation = graph.rotation("model.rotary_emb", tables, head_dim_of(config))
    hidden = graph.layers(
        hidden,
        config.num_hidden_layers,
        lambda index, before: _layer(
            graph, layers[index], f"model.layers.{index}", before, rotation
        ),
    )
    hidden = graph.rms_norm(hidden, "model.norm", width, epsilon)
    head = "model.embed_tokens" if config.tie_word_embeddings else "lm_head"
    return graph.finish(graph.linear(hidden, head, (vocab_size, width)), vocab_size)


def _layer(
    graph: DecoderBuilder, config: Any, name: str, hidden: ir.Value, rotation: Rotation
) -> ir.Value:
    width, epsilon, inner = config.hidden_size, config.rms_norm_eps, config.intermediate_size
    source = graph.rms_norm(hidden, f"{name}.input_layernorm", width, epsilon)
    attended = _attention(graph, config, f"{name}.self_attn", source, rotation)
    hidden = graph.op("Add", hidden, attended)
    source = graph.rms_norm(hidden, f"{name}.post_attention_layernorm", width, epsilon)
    gate, up = (
        graph.linear_rows(
            source,
            f"{name}.mlp.{part}_proj",
            f"{name}.mlp.gate_up_proj",
            (number * inner, (number + 1) * inner),
            (2 * inner, width),
        )
        for number, part in enumerate(("gate", "up"))
    )
    product = graph.op("Mul", graph.activation(gate, config.hidden_act), up)
    return graph.op("Add", hidden, graph.linear(product, f"{name}.mlp.down_proj", (width, inner)))


def _attention(
    graph: DecoderBuilder, config: Any, name: str, source: ir.Value, rotation: Rotation
) -> ir.Value:
    width, head_dim = config.hidden_size, head_dim_of(config)
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    ends = [0, heads, heads + kv_heads, heads + 2 * kv_heads]
    query, key, value = (
        graph.linear_rows(
            source,
            f"{name}.{part}_proj",
            f"{name}.qkv_proj",
            (first * head_dim, last * head_dim),
            (ends[-1] * head_dim, width),
        )
        for part, first, last in zip("qkv", ends, ends[1:], strict=False)
    )
    mixed = graph.attention(
        query,
        key,
        value,
        heads=(heads, kv_heads),
        head_dim=head_dim,
        scale=head_dim**-0.5,
        rotation=rotation,
    )
    return graph.linear(mixed, f"{name}.o_proj", (width, heads * head_dim))
