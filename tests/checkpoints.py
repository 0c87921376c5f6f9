"""Tiny random checkpoints, made on the spot: one maker per architecture."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM

TINY = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 320,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}

MIXED = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
# OPT counts feed-forward width under another name, and ties its head.
OPT = {"ffn_dim": 96, "word_embed_proj_dim": 64, "tie_word_embeddings": True}
GEMMA = {
    "head_dim": 32,  # not hidden / heads
    "sliding_window": 12,
    "query_pre_attn_scalar": 24,
    "layer_types": MIXED,
    "tie_word_embeddings": True,
}
GEMMA3_ROPE = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
    "full_attention": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
}
PARTIAL_ROPE = {"rope_type": "default", "rope_theta": 1000.0, "partial_rotary_factor": 0.25}


def longrope(original: int) -> dict[str, object]:
    """Phi-3's scaling, trained on `original` of the model's 128 positions."""
    parameters = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "long_factor": [1.0 + index for index in range(8)],
        "short_factor": [1.0 + 0.1 * index for index in range(8)],
        "original_max_position_embeddings": original,
    }
    return {"rope_parameters": parameters, "original_max_position_embeddings": original}


# name: (model_type, what differs from TINY). Keys that transformers ignores in a family stand in
# one of its variants: the engine must ignore them as well.
VARIANTS: dict[str, tuple[str, dict[str, object]]] = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-own-head": ("llama", {}),
    "llama-mha": ("llama", {"num_key_value_heads": 4, "sliding_window": 5}),
    "llama-mqa": ("llama", {"num_key_value_heads": 1}),
    "llama3-rope": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
    ),
    "llama-bias": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-pruned": ("llama", {}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral-window": ("mistral", {"sliding_window": 12, "use_sliding_window": False}),
    "qwen2": ("qwen2", {}),
    "qwen2-mixed-window": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 12, "max_window_layers": 2},
    ),
    "qwen3": ("qwen3", {}),
    "qwen3-pruned": ("qwen3", {}),
    "opt": ("opt", {**OPT, "sliding_window": 5}),
    "opt-350m": ("opt", {**OPT, "do_layer_norm_before": False, "word_embed_proj_dim": 32}),
    "gemma2": ("gemma2", {**GEMMA, "attn_logit_softcapping": 4.0, "final_logit_softcapping": 3.0}),
    "gemma2-pruned": ("gemma2", {**GEMMA}),
    "gemma3": (
        "gemma3_text",
        {**GEMMA, "rope_parameters": GEMMA3_ROPE, "attn_logit_softcapping": 2.0},
    ),
    "phi3": ("phi3", {"sliding_window": 12, "layer_types": MIXED, **longrope(16)}),
    "phi3-pruned": ("phi3", {"sliding_window": None}),
    "phi3-short": ("phi3", {**longrope(128), "tie_word_embeddings": True}),
    "gpt2": ("gpt2", {"n_inner": 96, "tie_word_embeddings": True}),
    "gpt_neox": ("gpt_neox", {"rope_parameters": PARTIAL_ROPE, "sliding_window": 5}),
    "gpt_neox-serial": (
        "gpt_neox",
        {
            "rope_parameters": PARTIAL_ROPE | {"partial_rotary_factor": 0.5},
            "use_parallel_residual": False,
            "attention_bias": False,
            "hidden_act": "gelu_new",
            "num_attention_heads": 2,
        },
    ),
}
# Layers (from 0) that a pruning tool made narrower: heads, heads of K and V, feed-forward width.
PRUNED = {
    "llama-pruned": {1: (2, 1, 64), 2: (4, 2, 32)},
    "qwen3-pruned": {2: (2, 1, 96)},
    "gemma2-pruned": {1: (3, 1, 64)},
    "phi3-pruned": {2: (2, 1, 64)},
}
# A head of their own beside a configuration that ties it to the embedding.
TIED_BY_NAME = ("llama-own-head",)


def write_tokenizer(folder: Path, vocab_size: int = 320) -> None:
    """Byte-level tokenizer: ids 0, 1 are special, then one id per byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<s>": 0, "</s>": 1} | {c: i + 2 for i, c in enumerate(alphabet)}
    assert len(vocabulary) <= vocab_size
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.save(str(folder / "tokenizer.json"))


def make_checkpoint(
    folder: Path,
    variant: str = "llama",
    *,
    tokenizer: bool = True,
    shard: str = "10GB",
    seed: int = 0,
    **further: object,
) -> torch.nn.Module:
    """Writes a checkpoint in Hugging Face's layout and returns the reference model.

    `further` changes the variant's configuration.
    """
    model_type, changes = VARIANTS[variant]
    settings = {**TINY, "tie_word_embeddings": False, **changes, **further}
    config = AutoConfig.for_model(model_type, **settings)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    for index, (heads, kv_heads, intermediate) in PRUNED.get(variant, {}).items():
        narrow = copy.deepcopy(config)
        narrow.num_attention_heads, narrow.num_key_value_heads = heads, kv_heads
        narrow.intermediate_size = intermediate
        model.model.layers[index] = type(model.model.layers[index])(narrow, index)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Larger than the usual initialisation, so that layers and biases matter.
            scale = 0.3 if "norm" in name else 0.12
            parameter.add_(torch.randn_like(parameter) * scale)
    model.float().eval()
    model.save_pretrained(folder, max_shard_size=shard)
    if variant in TIED_BY_NAME:
        edit_config(folder, tie_word_embeddings=True)
    if tokenizer:
        write_tokenizer(folder)
    return model


def edit_config(folder: Path, **changes: object) -> None:
    """Changes keys of config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
