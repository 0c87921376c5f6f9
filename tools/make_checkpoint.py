"""A random checkpoint of a real model's shape, to measure exports at full size.

    python tools/make_checkpoint.py llama2-7b build/llama2-7b
    python tools/make_checkpoint.py opt-6.7b build/opt --layers 4 --dtype bfloat16

Names, shapes and config.json are transformers' own (on the meta device: no weights in memory). The
same name, seed and options give the same bytes on every machine. Values are normal with the usual
deviation of 0.02 (norms: around 1), cut for every tensor at another place from one random tape of a
prime length, so that no two tensors and no two rows are alike; drawing 7 billion values anew would
take ten times as long.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM

_TAPE = 8_388_593  # the largest prime below 2**23
_WRITE_VALUES = 1 << 22


def _llama(**changes: object) -> tuple[str, dict[str, object]]:
    return "llama", {"tie_word_embeddings": False, "rms_norm_eps": 1e-5} | changes


def _opt(hidden: int, layers: int, heads: int) -> tuple[str, dict[str, object]]:
    return "opt", {
        "hidden_size": hidden,
        "word_embed_proj_dim": hidden,
        "ffn_dim": 4 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_position_embeddings": 2048,
        "vocab_size": 50272,
        "do_layer_norm_before": True,
    }


def _sizes(hidden: int, inner: int, layers: int, heads: int, kv_heads: int) -> dict[str, object]:
    return {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
    }


SHAPES: dict[str, tuple[str, dict[str, object]]] = {
    "smollm2-135m": _llama(
        **_sizes(576, 1536, 30, 9, 3),
        vocab_size=49152,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    ),
    "tinyllama-1.1b": _llama(
        **_sizes(2048, 5632, 22, 32, 4), vocab_size=32000, max_position_embeddings=2048
    ),
    "llama2-7b": _llama(
        **_sizes(4096, 11008, 32, 32, 32), vocab_size=32000, max_position_embeddings=4096
    ),
    "llama2-13b": _llama(
        **_sizes(5120, 13824, 40, 40, 40), vocab_size=32000, max_position_embeddings=4096
    ),
    "llama3-8b": _llama(
        **_sizes(4096, 14336, 32, 32, 8), vocab_size=128256, max_position_embeddings=8192
    ),
    "mistral-7b": (
        "mistral",
        {
            **_sizes(4096, 14336, 32, 32, 8),
            "vocab_size": 32768,
            "max_position_embeddings": 32768,
            "sliding_window": None,
            "tie_word_embeddings": False,
        },
    ),
    "llama2-70b": _llama(
        **_sizes(8192, 28672, 80, 64, 8), vocab_size=32000, max_position_embeddings=4096
    ),
    "qwen3-0.6b": (
        "qwen3",
        {
            **_sizes(1024, 3072, 28, 16, 8),
            "head_dim": 128,
            "vocab_size": 151936,
            "max_position_embeddings": 40960,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
            "tie_word_embeddings": True,
        },
    ),
    "gemma3-270m": (
        "gemma3_text",
        {
            **_sizes(640, 2048, 18, 4, 1),
            "head_dim": 256,
            "vocab_size": 262144,
            "max_position_embeddings": 32768,
            "sliding_window": 512,
        },
    ),
    "phi3-mini": (
        "phi3",
        {
            **_sizes(3072, 8192, 32, 32, 32),
            "vocab_size": 32064,
            "max_position_embeddings": 4096,
            "sliding_window": 2047,
        },
    ),
    "opt-1.3b": _opt(2048, 24, 32),
    "opt-6.7b": _opt(4096, 32, 32),
    "opt-13b": _opt(5120, 40, 40),
}


@dataclass(frozen=True)
class Layout:
    """How a checkpoint is stored."""

    dtype: str
    shard_bytes: int
    seed: int


def main() -> None:
    """Writes the checkpoint."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int, help="fewer layers than the model has")
    parser.add_argument("--dtype", choices=["float16", "bfloat16", "float32"], default="float16")
    parser.add_argument("--shard-gb", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-tokenizer", action="store_true")
    args = parser.parse_args()
    if args.out.exists() and any(args.out.iterdir()):
        sys.exit(f"{args.out} exists and is not empty")
    layout = Layout(args.dtype, int(args.shard_gb * 1e9), args.seed)
    size = write_checkpoint(args.out, args.shape, layout, layers=args.layers)
    if not args.no_tokenizer:
        write_byte_tokenizer(args.out)
    print(f"{args.out}: {size / 1e9:.2f} GB")


def write_checkpoint(out: Path, shape: str, layout: Layout, *, layers: int | None = None) -> int:
    """Writes config.json, shards and their index; returns the bytes of all tensors."""
    model_type, settings = SHAPES[shape]
    if layers is not None:
        settings = settings | {"num_hidden_layers": layers}
    config = AutoConfig.for_model(model_type, **settings)
    config.architectures = None
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    config.architectures = [type(model).__name__]
    config.dtype = layout.dtype
    out.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(out)
    tied = set(getattr(model, "_tied_weights_keys", None) or ()) if _is_tied(config) else set()
    shapes = {n: tuple(t.shape) for n, t in model.state_dict().items() if n not in tied}
    shards = list(_shards(shapes, layout))
    tape = _tape(layout)
    weight_map, total = {}, 0
    for number, names in enumerate(shards, 1):
        file = "model.safetensors"
        if len(shards) > 1:
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        total += _write_shard(out / file, {name: shapes[name] for name in names}, tape, layout)
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")
    return total


def _is_tied(config: Any) -> bool:
    return bool(getattr(config, "tie_word_embeddings", False))


def _shards(shapes: dict[str, tuple[int, ...]], layout: Layout) -> Iterator[list[str]]:
    names: list[str] = []
    used = 0
    for name, shape in shapes.items():
        size = int(np.prod(shape)) * (4 if layout.dtype == "float32" else 2)
        if names and used + size > layout.shard_bytes:
            yield names
            names, used = [], 0
        names.append(name)
        used += size
    yield names


def _tape(layout: Layout) -> npt.NDArray[Any]:
    """Normal values with deviation 1, in float32."""
    return np.random.default_rng(layout.seed).standard_normal(_TAPE, np.float32)


def _write_shard(
    path: Path, shapes: dict[str, tuple[int, ...]], tape: npt.NDArray[Any], layout: Layout
) -> int:
    width = 4 if layout.dtype == "float32" else 2
    kind = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}[layout.dtype]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + int(np.prod(shape)) * width
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [start, end]}
    content = json.dumps(header).encode()
    content += b" " * (-len(content) % 8)
    # Two kinds of values are all that is needed: the tape is converted once for each.
    plain, around_one = _stored(tape * 0.02, layout), _stored(1 + tape * 0.1, layout)
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", len(content)) + content)
        for name, shape in shapes.items():
            is_norm = "norm" in name and name.endswith("weight")
            _write_tensor(stream, around_one if is_norm else plain, name, int(np.prod(shape)))
    return end


def _stored(values: npt.NDArray[Any], layout: Layout) -> npt.NDArray[Any]:
    tensor = torch.from_numpy(values).to(getattr(torch, layout.dtype))
    return tensor.view(torch.int32 if layout.dtype == "float32" else torch.int16).numpy()


def _write_tensor(stream: Any, tape: npt.NDArray[Any], name: str, count: int) -> None:
    position = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") % _TAPE
    while count:
        values = tape[position : position + min(count, _WRITE_VALUES)]
        stream.write(values.data)
        count -= len(values)
        position = (position + len(values)) % _TAPE


def write_byte_tokenizer(folder: Path) -> None:
    """A tokenizer of single bytes: ids 0 to 2 are special."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2}
    vocabulary |= {character: index + 3 for index, character in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(vocabulary)[:3])
    tokenizer.save(str(folder / "tokenizer.json"))


if __name__ == "__main__":
    main()
