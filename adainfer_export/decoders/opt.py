"""OPT: learned positions, LayerNorm, biases; OPT-350m also norms behind the layers.

mobius 0.1.0 builds it as GPT-2, under GPT-2's tensor names and for pre-norm models without
projections alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir

from ..errors import UnsupportedError
from .builder import Decoder, DecoderBuilder

__all__ = ["build"]

_EPSILON = 1e-5
# Rows 0 and 1 of the position table are for padding.
_OFFSET = 2


def build(config: Any, max_seq_len: int, layers: Sequence[Any]) -> Decoder:
    """Builds the decoder of an `OPTConfig`.

    Raises:
        UnsupportedError: norms without weights (Galactica).
    """
    if not config.layer_norm_elementwise_affine:
        raise UnsupportedError("OPT with norms that have no weights")
    hidden_size, vocab_size = config.hidden_size, config.vocab_size
    graph = DecoderBuilder(hidden_size)
    embedded, root = config.word_embed_proj_dim, "model.decoder"
    hidden = graph.embedding(f"{root}.embed_tokens.weight", (vocab_size, embedded))
    if embedded != hidden_size:
        hidden = graph.linear(hidden, f"{root}.project_in", (hidden_size, embedded))
    table = (config.max_position_embeddings + _OFFSET, hidden_size)
    hidden = graph.add_positions(
        hidden, f"{root}.embed_positions.weight", table, _OFFSET, max_seq_len
    )
    hidden = graph.layers(
        hidden,
        config.num_hidden_layers,
        lambda index, before: _layer(graph, layers[index], f"{root}.layers.{index}", before),
    )
    if config.do_layer_norm_before and not config._remove_final_layer_norm:
        hidden = graph.layer_norm(hidden, f"{root}.final_layer_norm", hidden_size, _EPSILON)
    if embedded != hidden_size:
        hidden = graph.linear(hidden, f"{root}.project_out", (embedded, hidden_size))
    head = f"{root}.embed_tokens" if config.tie_word_embeddings else "lm_head"
    logits = graph.linear(hidden, head, (vocab_size, embedded))
    return graph.finish(logits, vocab_size)


def _layer(graph: DecoderBuilder, config: Any, name: str, hidden: ir.Value) -> ir.Value:
    width, biased = config.hidden_size, config.enable_bias
    before = config.do_layer_norm_before

    def norm(value: ir.Value, part: str) -> ir.Value:
        return graph.layer_norm(value, f"{name}.{part}", width, _EPSILON)

    source = norm(hidden, "self_attn_layer_norm") if before else hidden
    hidden = graph.op("Add", hidden, _attention(graph, config, f"{name}.self_attn", source))
    if not before:
        hidden = norm(hidden, "self_attn_layer_norm")
    source = norm(hidden, "final_layer_norm") if before else hidden
    inner = graph.linear(source, f"{name}.fc1", (config.ffn_dim, width), bias=biased)
    inner = graph.activation(inner, config.activation_function)
    outer = graph.linear(inner, f"{name}.fc2", (width, config.ffn_dim), bias=biased)
    hidden = graph.op("Add", hidden, outer)
    return hidden if before else norm(hidden, "final_layer_norm")


def _attention(graph: DecoderBuilder, config: Any, name: str, source: ir.Value) -> ir.Value:
    width, heads, biased = config.hidden_size, config.num_attention_heads, config.enable_bias
    query, key, value = (
        graph.linear(source, f"{name}.{part}_proj", (width, width), bias=biased) for part in "qkv"
    )
    head_dim = width // heads
    mixed = graph.attention(
        query, key, value, heads=(heads, heads), head_dim=head_dim, scale=head_dim**-0.5
    )
    return graph.linear(mixed, f"{name}.out_proj", (width, width), bias=biased)
