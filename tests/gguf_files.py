"""Tiny GGUF files of a checkpoint's weights, written with the gguf package's own writer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type
from gguf import TokenType, quants
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

NOTHING: Mapping[str, Any] = MappingProxyType({})

# gguf quantises no K types: their blocks are drawn at random, with scales of a usual size.
_HALVES = {Type.Q4_K: (0, 2), Type.Q6_K: (208,), Type.Q5_K: (0, 2)}


def quantised(values: np.ndarray, kind: Type) -> np.ndarray:
    """Bytes `[rows, …]` in a type."""
    if kind not in _HALVES:
        return quants.quantize(values.astype(np.float32), kind)
    block, size = gguf.GGML_QUANT_SIZES[kind]
    random = np.random.default_rng(values.size)
    raw = random.integers(0, 256, (values.size // block, size), np.uint8)
    for at in _HALVES[kind]:
        scale = random.uniform(0.2, 1.0, len(raw)).astype(np.float32) * 0.2 / (16 * 32)
        raw[:, at : at + 2] = scale.astype(np.float16).view(np.uint8).reshape(-1, 2)
    return raw.reshape(values.shape[0], -1)


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's `permute` of convert_hf_to_gguf.py."""
    shape = weight.shape
    return (
        weight.reshape(heads, 2, shape[0] // heads // 2, *shape[1:]).swapaxes(1, 2).reshape(shape)
    )


def add_key(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    """In the type that converters choose for such a value."""
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32,
           str: writer.add_string, list: writer.add_array}  # fmt: skip
    add[type(value)](key, value)


def sentencepiece_keys(**changes: Any) -> dict[str, Any]:
    """Keys of a tokenizer as Llama 2 has it, 320 tokens, those of bytes included.

    `changes` are further keys, or others' values; a key whose value is None is left out.
    """
    tokens = [("<unk>", 0.0, TokenType.UNKNOWN)]
    tokens += [(name, 0.0, TokenType.CONTROL) for name in ("<s>", "</s>")]
    tokens += [(f"<0x{byte:02X}>", 0.0, TokenType.BYTE) for byte in range(256)]
    merged = ["▁t", "he", "▁the", "▁▁", "in", "▁a", "er", "▁in", "on", "▁there", "▁▁▁▁", "re", "an"]
    tokens += [(piece, -float(rank), TokenType.NORMAL) for rank, piece in enumerate(merged)]
    letters = "▁abcdefghijklmnopqrstuvwxyzTé日.,!<>s/"
    for letter in dict.fromkeys(letters):
        tokens.append((letter, -float(len(tokens)), TokenType.NORMAL))
    tokens.append(("<tool>", -1000.0, TokenType.USER_DEFINED))
    while len(tokens) < 320:
        tokens.append((f"[PAD{len(tokens)}]", -1000.0, TokenType.UNUSED))
    names, scores, kinds = (list(column) for column in zip(*tokens, strict=True))
    found = {
        "model": "llama",
        "tokens": names,
        "scores": scores,
        "token_type": [int(kind) for kind in kinds],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
        **changes,
    }
    return {f"tokenizer.ggml.{k}": value for k, value in found.items() if value is not None}


def rotary_factors(config: Any) -> np.ndarray:
    """What llama.cpp's converter stores of Llama-3's scaling: plain over scaled frequencies."""
    parameters = config.rope_parameters
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    exponents = np.arange(0, config.head_dim, 2) / config.head_dim
    return (parameters["rope_theta"] ** -exponents / scaled.numpy()).astype(np.float32)


def write_gguf(
    path: Path,
    model: Any,
    types: dict[str, Type],
    default: Type,
    *,
    keys: Mapping[str, Any] = NOTHING,
    tensors: Mapping[str, np.ndarray] = NOTHING,
) -> None:
    """A llama file of a transformers model.

    Args:
        types: by a part of the Hugging Face name; the first that matches; else `default`.
        keys, tensors: further ones, under GGUF's names.
    """
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if "tokenizer.ggml.eos_token_id" not in keys:
        writer.add_eos_token_id(1)
    for key, value in keys.items():
        add_key(writer, key, value)
    if config.rope_parameters["rope_type"] == "llama3":
        tensors = {"rope_freqs.weight": rotary_factors(config), **tensors}
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values = tensor.float().numpy()
        if "q_proj" in name or "k_proj" in name:
            values = interleaved(values, values.shape[0] // config.head_dim)
        kind = next((kind for part, kind in types.items() if part in name), default)
        if values.ndim == 1:
            kind = Type.F32
        stem, _, suffix = name.rpartition(".")
        mapped = f"{names.get_name(stem)}.{suffix}"
        if kind == Type.F32:
            writer.add_tensor(mapped, np.ascontiguousarray(values))
        else:
            writer.add_tensor(mapped, quantised(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
