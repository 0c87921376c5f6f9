"""GPT-2: learned positions, LayerNorm, fused Q, K and V, weights stored as `[in, out]`.

mobius 0.1.0 builds it under tensor names of its own, for weights that its loader has split and
transposed in memory; here they are read from where they lie.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir

from ..errors import UnsupportedError
from .builder import Decoder, DecoderBuilder

__all__ = ["build"]


def build(config: Any, max_seq_len: int, layers: Sequence[Any]) -> Decoder:
    """Builds the decoder of a `GPT2Config`.

    Raises:
        UnsupportedError: cross-attention.
    """
    if config.add_cross_attention:
        raise UnsupportedError("GPT-2 with cross-attention")
    width, vocab_size = config.hidden_size, config.vocab_size
    graph = DecoderBuilder(width)
    hidden = graph.embedding("transformer.wte.weight", (vocab_size, width))
    table = (config.max_position_embeddings, width)
    hidden = graph.add_positions(hidden, "transformer.wpe.weight", table, 0, max_seq_len)
    hidden = graph.layers(
        hidden,
        config.num_hidden_layers,
        lambda index, before: _layer(graph, layers[index], index, before),
    )
    hidden = graph.layer_norm(hidden, "transformer.ln_f", width, config.layer_norm_epsilon)
    head = "transformer.wte" if config.tie_word_embeddings else "lm_head"
    return graph.finish(graph.linear(hidden, head, (vocab_size, width)), vocab_size)


def _layer(graph: DecoderBuilder, config: Any, index: int, hidden: ir.Value) -> ir.Value:
    name, width, epsilon = f"transformer.h.{index}", config.hidden_size, config.layer_norm_epsilon
    source = graph.layer_norm(hidden, f"{name}.ln_1", width, epsilon)
    hidden = graph.op("Add", hidden, _attention(graph, config, index, source))
    source = graph.layer_norm(hidden, f"{name}.ln_2", width, epsilon)
    inner_width = config.n_inner or 4 * width
    inner = graph.conv1d(source, f"{name}.mlp.c_fc", (inner_width, width))
    inner = graph.activation(inner, config.activation_function)
    return graph.op("Add", hidden, graph.conv1d(inner, f"{name}.mlp.c_proj", (width, inner_width)))


def _attention(graph: DecoderBuilder, config: Any, index: int, source: ir.Value) -> ir.Value:
    name, width, heads = (
        f"transformer.h.{index}.attn",
        config.hidden_size,
        config.num_attention_heads,
    )
    query, key, value = (
        graph.linear_rows(
            source,
            f"{name}.{part}_proj",
            f"{name}.c_attn",
            (number * width, (number + 1) * width),
            (3 * width, width),
            bias=True,
            conv1d=True,
        )
        for number, part in enumerate("qkv")
    )
    head_dim = width // heads
    scale = head_dim**-0.5 if config.scale_attn_weights else 1.0
    if config.scale_attn_by_inverse_layer_idx:
        scale /= index + 1
    mixed = graph.attention(query, key, value, heads=(heads, heads), head_dim=head_dim, scale=scale)
    return graph.conv1d(mixed, f"{name}.c_proj", (width, width))
