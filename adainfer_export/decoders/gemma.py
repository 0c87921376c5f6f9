"""Gemma 2 and 3: norms before and behind each half of a layer, local and global layers, soft caps.

mobius 0.1.0 rounds the embedding's scale (Gemma 2: two decimals, Gemma 3: fp16), takes Gemma 2's
even layers for the global ones, and adds 1 to every norm's weight each time that it runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from ..errors import UnsupportedError
from .builder import Decoder, DecoderBuilder, Rotation
from .rotary import head_dim_of, rotary_tables

__all__ = ["build"]

# Stored are the differences of the norms' weights from 1.
_ONE = 1.0


def build(config: Any, max_seq_len: int, layers: Sequence[Any]) -> Decoder:
    """Builds the decoder of a `Gemma2Config` or `Gemma3TextConfig`.

    Raises:
        UnsupportedError: attention that looks ahead.
    """
    if getattr(config, "use_bidirectional_attention", False):
        raise UnsupportedError("Gemma 3 with bidirectional attention")
    width, vocab_size = config.hidden_size, config.vocab_size
    graph = DecoderBuilder(width)
    hidden = graph.embedding("model.embed_tokens.weight", (vocab_size, width))
    scale = graph.constant("embed_scale", np.array(width**0.5, np.float32))
    hidden = graph.op("Mul", hidden, scale)
    rotations = _rotations(graph, config, max_seq_len)
    hidden = graph.layers(
        hidden,
        config.num_hidden_layers,
        lambda index, before: _layer(
            graph,
            layers[index],
            f"model.layers.{index}",
            before,
            rotations[config.layer_types[index]],
        ),
    )
    hidden = graph.rms_norm(hidden, "model.norm", width, config.rms_norm_eps, add=_ONE)
    head = "model.embed_tokens" if config.tie_word_embeddings else "lm_head"
    logits = graph.linear(hidden, head, (vocab_size, width))
    if config.final_logit_softcapping:
        logits = graph.soft_cap(logits, config.final_logit_softcapping)
    return graph.finish(logits, vocab_size)


def _rotations(graph: DecoderBuilder, config: Any, max_seq_len: int) -> Mapping[str, Rotation]:
    """By kind of layer: Gemma 3's local layers have a base of their own."""
    head_dim, kinds = head_dim_of(config), sorted(set(config.layer_types))
    if any(kind in config.rope_parameters for kind in kinds):
        return {
            kind: graph.rotation(
                f"model.rotary_emb.{kind}", rotary_tables(config, max_seq_len, kind), head_dim
            )
            for kind in kinds
        }
    shared = graph.rotation("model.rotary_emb", rotary_tables(config, max_seq_len), head_dim)
    return dict.fromkeys(kinds, shared)


def _layer(
    graph: DecoderBuilder, config: Any, name: str, hidden: ir.Value, rotation: Rotation
) -> ir.Value:
    width, inner_width = config.hidden_size, config.intermediate_size

    def norm(value: ir.Value, part: str) -> ir.Value:
        return graph.rms_norm(value, f"{name}.{part}", width, config.rms_norm_eps, add=_ONE)

    source = norm(hidden, "input_layernorm")
    attended = _attention(graph, config, f"{name}.self_attn", source, rotation)
    hidden = graph.op("Add", hidden, norm(attended, "post_attention_layernorm"))
    source = norm(hidden, "pre_feedforward_layernorm")
    gate, up = (
        graph.linear(source, f"{name}.mlp.{part}_proj", (inner_width, width))
        for part in ("gate", "up")
    )
    product = graph.op("Mul", graph.activation(gate, config.hidden_activation), up)
    outer = graph.linear(product, f"{name}.mlp.down_proj", (width, inner_width))
    return graph.op("Add", hidden, norm(outer, "post_feedforward_layernorm"))


def _attention(
    graph: DecoderBuilder, config: Any, name: str, source: ir.Value, rotation: Rotation
) -> ir.Value:
    width, head_dim, biased = config.hidden_size, head_dim_of(config), config.attention_bias
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    query, key, value = (
        graph.linear(source, f"{name}.{part}_proj", (count * head_dim, width), bias=biased)
        for part, count in (("q", heads), ("k", kv_heads), ("v", kv_heads))
    )
    softcap = 0.0
    if config.model_type == "gemma2":
        softcap = config.attn_logit_softcapping or 0.0
    else:  # Gemma 3 keeps that key of its configuration, and no code of it reads it
        query, key = (
            graph.head_norm(
                projected, f"{name}.{part}_norm", head_dim, config.rms_norm_eps, add=_ONE
            )
            for part, projected in (("q", query), ("k", key))
        )
    mixed = graph.attention(
        query,
        key,
        value,
        heads=(heads, kv_heads),
        head_dim=head_dim,
        scale=config.query_pre_attn_scalar**-0.5,
        softcap=softcap,
        rotation=rotation,
    )
    return graph.linear(mixed, f"{name}.o_proj", (width, heads * head_dim), bias=biased)
