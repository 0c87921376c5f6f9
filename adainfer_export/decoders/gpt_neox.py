"""GPT-NeoX and Pythia: parallel residual, LayerNorm, part of each head rotated, fused Q, K and V.

mobius 0.1.0 builds it under tensor names of its own; its loader takes the fused matrix apart in
memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir

from .builder import Decoder, DecoderBuilder, Rotation
from .rotary import rotary_tables
from .views import Heads

__all__ = ["build"]


def build(config: Any, max_seq_len: int, layers: Sequence[Any]) -> Decoder:
    """Builds the decoder of a `GPTNeoXConfig`."""
    width, vocab_size = config.hidden_size, config.vocab_size
    graph = DecoderBuilder(width)
    hidden = graph.embedding("gpt_neox.embed_in.weight", (vocab_size, width))
    head_dim = width // config.num_attention_heads
    tables = rotary_tables(config, max_seq_len)
    rotation = graph.rotation("gpt_neox.rotary_emb", tables, head_dim)
    hidden = graph.layers(
        hidden,
        config.num_hidden_layers,
        lambda index, before: _layer(
            graph, layers[index], f"gpt_neox.layers.{index}", before, rotation
        ),
    )
    hidden = graph.layer_norm(hidden, "gpt_neox.final_layer_norm", width, config.layer_norm_eps)
    head = "gpt_neox.embed_in" if config.tie_word_embeddings else "lm_head"
    return graph.finish(graph.linear(hidden, head, (vocab_size, width)), vocab_size)


def _layer(
    graph: DecoderBuilder, config: Any, name: str, hidden: ir.Value, rotation: Rotation
) -> ir.Value:
    width, epsilon, inner_width = (
        config.hidden_size,
        config.layer_norm_eps,
        config.intermediate_size,
    )
    source = graph.layer_norm(hidden, f"{name}.input_layernorm", width, epsilon)
    attended = _attention(graph, config, f"{name}.attention", source, rotation)
    summed = graph.op("Add", hidden, attended)
    between = hidden if config.use_parallel_residual else summed
    source = graph.layer_norm(between, f"{name}.post_attention_layernorm", width, epsilon)
    inner = graph.linear(source, f"{name}.mlp.dense_h_to_4h", (inner_width, width), bias=True)
    inner = graph.activation(inner, config.hidden_act)
    outer = graph.linear(inner, f"{name}.mlp.dense_4h_to_h", (width, inner_width), bias=True)
    return graph.op("Add", summed, outer)


def _attention(
    graph: DecoderBuilder, config: Any, name: str, source: ir.Value, rotation: Rotation
) -> ir.Value:
    width, heads, biased = config.hidden_size, config.num_attention_heads, config.attention_bias
    query, key, value = (
        graph.linear_heads(
            source,
            f"{name}.{part}_proj",
            f"{name}.query_key_value",
            Heads(heads, 3, number),
            (3 * width, width),
            bias=biased,
        )
        for number, part in enumerate("qkv")
    )
    head_dim = width // heads
    mixed = graph.attention(
        query,
        key,
        value,
        heads=(heads, heads),
        head_dim=head_dim,
        scale=head_dim**-0.5,
        rotation=rotation,
    )
    return graph.linear(mixed, f"{name}.dense", (width, width), bias=biased)
