"""A GGUF file: tensors dequantised one at a time, configuration and tokenizer from its keys."""

from __future__ import annotations

import json
import re
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from adainfer_runtime.engine_folder import file_sha256
from adainfer_runtime.manifest import SourceFile, SourceSpec

from ..architectures import ARCHITECTURES, Architecture
from ..errors import CheckpointError, SourceError, UnsupportedError
from ..quantise import BlockRows, Blocks
from .checkpoint import require_finite
from .gguf_blocks import KEPT_TYPES, read_rows
from .gguf_plain import require_plain
from .gguf_rope import FACTORS, rope_parameters
from .gguf_tokenizer import build_tokenizer, special_tokens

__all__ = ["GgufFile"]

READABLE_TYPES = ("F32", "F16", "BF16", *KEPT_TYPES, "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q5_K")
# What a configuration says of biases that the file has.
_BIASES = {"attention_bias": "blk.0.attn_output.bias", "mlp_bias": "blk.0.ffn_gate.bias"}
_QUERY_OR_KEY = re.compile(r"[qk]_proj\.(weight|bias)$")


class GgufFile:
    """A llama.cpp checkpoint. Reading undoes the converter's interleaving of Q and K rows."""

    def __init__(self, path: Path, *, id: str | None = None, revision: str | None = None) -> None:
        self._path = path
        self._id = id or path.name
        self._revision = revision

    @cached_property
    def config(self) -> Any:
        """A transformers configuration made from the file's keys."""
        from transformers import AutoConfig

        key = self._architecture.gguf_name
        heads = self._by_layer(f"{key}.attention.head_count")
        hidden = int(self._field(f"{key}.embedding_length"))
        first = next(filter(None, heads))  # of the first layer that has any
        head_dim = int(self._optional(f"{key}.attention.key_length") or hidden // first)
        positions = int(self._field(f"{key}.context_length"))
        where = str(self._path)
        require_plain(lambda name: self._optional(f"{key}.{name}"), head_dim, positions, where)
        return AutoConfig.for_model(
            self._architecture.model_type,
            hidden_size=hidden,
            intermediate_size=max(self._by_layer(f"{key}.feed_forward_length")),
            num_hidden_layers=int(self._field(f"{key}.block_count")),
            num_attention_heads=max(heads),
            num_key_value_heads=max(self._by_layer(f"{key}.attention.head_count_kv", heads)),
            head_dim=head_dim,
            max_position_embeddings=positions,
            rms_norm_eps=float(self._field(f"{key}.attention.layer_norm_rms_epsilon")),
            rope_parameters=rope_parameters(
                lambda name: self._optional(f"{key}.rope.{name}"),
                self._rotary_factors(),
                head_dim,
                positions,
                where,
            ),
            vocab_size=int(self._tensor("token_embd.weight").shape[1]),
            tie_word_embeddings=self.tied_head,
            bos_token_id=self._optional("tokenizer.ggml.bos_token_id"),
            eos_token_id=self._optional("tokenizer.ggml.eos_token_id"),
            **{name: True for name, tensor in _BIASES.items() if tensor in self._tensors},
        )

    @cached_property
    def source(self) -> SourceSpec:
        """Identity with the file's sha256."""
        size = self._path.stat().st_size
        file = SourceFile(name=self._path.name, bytes=size, sha256=file_sha256(self._path))
        return SourceSpec(kind="gguf", id=self._id, revision=self._revision, files=(file,))

    @property
    def source_name(self) -> str:
        """The file."""
        return str(self._path)

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The end-of-text token and, where the file names one, the end-of-turn token."""
        keys = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id")
        found = [self._optional(key) for key in keys]
        return tuple(dict.fromkeys(int(token) for token in found if token is not None))

    @property
    def tied_head(self) -> bool:
        """A file without an output matrix uses the token embedding."""
        return "output.weight" not in self._tensors

    def decoder(self) -> None:
        """None: the source holds weights."""

    def unused(self, read: frozenset[str]) -> tuple[str, ...]:
        """Under their GGUF names; rotary factors went into the configuration."""
        return tuple(sorted(self._tensors.keys() - {self._mapped(n) for n in read} - {FACTORS}))

    def shape(self, name: str) -> tuple[int, ...]:
        """From the file's tensor table."""
        mapped = self._mapped(name)
        tensor = self._tensor(mapped)
        if tensor.tensor_type.name not in READABLE_TYPES:
            raise UnsupportedError(
                f"{self._path}: tensor {mapped} has type {tensor.tensor_type.name}, which is not "
                f"supported (supported: {', '.join(READABLE_TYPES)})"
            )
        return tuple(int(size) for size in reversed(tensor.shape))

    def read(self, name: str, rows: slice | None = None) -> npt.NDArray[np.float32]:
        """One tensor under its Hugging Face name, dequantised to float32."""
        from gguf.quants import dequantize

        shape = self.shape(name)
        rows = rows or slice(0, shape[0])
        kind = self._tensor(self._mapped(name)).tensor_type
        array = np.asarray(dequantize(self._raw_rows(name, rows), kind), np.float32)
        array = array.reshape(rows.stop - rows.start, *shape[1:])
        return require_finite(name, array, str(self._path))

    def blocks(self, name: str) -> Blocks | None:
        """By the tensor's type."""
        if len(self.shape(name)) != 2:
            return None
        kept = KEPT_TYPES.get(self._tensor(self._mapped(name)).tensor_type.name)
        return kept[0] if kept else None

    def read_blocks(self, name: str, rows: slice) -> BlockRows:
        """The file's own codes and scales."""
        kind = self._tensor(self._mapped(name)).tensor_type.name
        found = read_rows(kind, self._raw_rows(name, rows))
        require_finite(name, found.scales, str(self._path))
        if found.shifts is not None:
            require_finite(name, found.shifts, str(self._path))
        return found

    def _raw_rows(self, name: str, rows: slice) -> npt.NDArray[np.uint8]:
        """`[rows, bytes]`, in Hugging Face's order. Read, not mapped: what is mapped and was
        touched counts as this process's memory.
        """
        tensor, count = self._tensor(self._mapped(name)), self.shape(name)[0]
        order = np.arange(count)
        if self._architecture.gguf_permuted_rope and _QUERY_OR_KEY.search(name):
            order = self._interleaving(count)
        wanted = order[rows]
        first, last = int(wanted.min()), int(wanted.max()) + 1
        width = int(tensor.n_bytes) // count
        with self._path.open("rb") as stream:
            stream.seek(int(tensor.data_offset) + first * width)
            raw = np.fromfile(stream, np.uint8, (last - first) * width)
        return raw.reshape(last - first, width)[wanted - first]

    def write_tokenizer(self, folder: Path) -> bool:
        """Builds tokenizer.json from the file's vocabulary and its merges or scores."""
        tokens = self._optional("tokenizer.ggml.tokens")
        if not tokens:
            return False
        keys = {key: field.contents() for key, field in self._reader.fields.items()}
        tokenizer = build_tokenizer(keys, str(self._path))
        folder.mkdir(parents=True, exist_ok=True)
        tokenizer.save(str(folder / "tokenizer.json"))
        template = self._optional("tokenizer.chat_template")
        if template:
            (folder / "chat_template.jinja").write_text(str(template), encoding="utf-8")
        settings = {"eos_token_id": list(self.eos_token_ids)}
        (folder / "generation_config.json").write_text(json.dumps(settings), encoding="utf-8")
        names = json.dumps(special_tokens(keys, str(self._path)), ensure_ascii=False)
        (folder / "special_tokens_map.json").write_text(names, encoding="utf-8")
        return True

    def _rotary_factors(self) -> npt.NDArray[np.float32] | None:
        from gguf.quants import dequantize

        if (tensor := self._tensors.get(FACTORS)) is None:
            return None
        return np.asarray(dequantize(tensor.data, tensor.tensor_type), np.float32)

    def _interleaving(self, rows: int) -> npt.NDArray[np.int64]:
        """Where the file has each row: its converter put the halves of a head alternately."""
        pairs = np.arange(rows).reshape(-1, self.config.head_dim // 2, 2)
        return pairs.swapaxes(1, 2).reshape(rows)

    def _mapped(self, name: str) -> str:
        stem, dot, suffix = name.rpartition(".")
        mapped = self._names.get_name(stem)
        if mapped is None:
            raise CheckpointError(f"{self._path}: no GGUF name is known for tensor {name}")
        return f"{mapped}{dot}{suffix}"

    @cached_property
    def _reader(self) -> Any:
        try:
            import gguf
        except ImportError:
            raise SourceError(
                "reading GGUF needs the `gguf` package: pip install 'adainfer-export[gguf]'"
            ) from None
        try:
            reader = gguf.GGUFReader(self._path)
        except FileNotFoundError:
            raise SourceError(f"{self._path} does not exist") from None
        except (ValueError, IndexError, OSError, OverflowError) as error:
            raise CheckpointError(
                f"{self._path} cannot be read as GGUF ({error}); the file is truncated or "
                "damaged: download it again"
            ) from error
        self._require_one_part(reader)
        self._require_whole(reader)
        return reader

    def _require_one_part(self, reader: Any) -> None:
        field = reader.fields.get("split.count")
        if field is not None and (parts := int(field.contents())) > 1:
            raise UnsupportedError(
                f"{self._path} is one of {parts} parts of a split model; put them together with "
                "`llama-gguf-split --merge FIRST_PART WHOLE.gguf`, and export WHOLE.gguf"
            )

    def _require_whole(self, reader: Any) -> None:
        end = max((int(t.data_offset + t.n_bytes) for t in reader.tensors), default=0)
        size = self._path.stat().st_size
        if size < end:
            raise CheckpointError(
                f"{self._path} has {size} bytes, its tensors need {end}; the file is truncated: "
                "download it again"
            )

    @cached_property
    def _architecture(self) -> Architecture:
        name = self._field("general.architecture")
        for entry in ARCHITECTURES:
            if entry.gguf_name == name:
                return entry
        names = dict.fromkeys(entry.gguf_name for entry in ARCHITECTURES)
        known = ", ".join(name for name in names if name)
        raise UnsupportedError(
            f"{self._path}: GGUF architecture {name!r} is not supported (supported: {known})"
        )

    @cached_property
    def _names(self) -> Any:
        import gguf

        arch = next(
            key
            for key, name in gguf.MODEL_ARCH_NAMES.items()
            if name == self._architecture.gguf_name
        )
        return gguf.get_tensor_name_map(arch, self.config.num_hidden_layers)

    @cached_property
    def _tensors(self) -> dict[str, Any]:
        return {tensor.name: tensor for tensor in self._reader.tensors}

    def _tensor(self, name: str) -> Any:
        try:
            return self._tensors[name]
        except KeyError:
            raise CheckpointError(f"{self._path}: tensor {name} is missing") from None

    def _field(self, key: str) -> Any:
        value = self._optional(key)
        if value is None:
            raise CheckpointError(f"{self._path}: key {key} is missing")
        return value

    def _by_layer(self, key: str, default: list[int] | None = None) -> list[int]:
        """A number of all layers, or one of each: of models with layers of different widths."""
        value = self._field(key) if default is None else self._optional(key)
        numbers = [int(n) for n in value] if isinstance(value, list) else [int(value or 0)]
        if any(numbers):
            return numbers
        if default is None:
            raise CheckpointError(f"{self._path}: key {key} is {value}, expected a number")
        return default

    def _optional(self, key: str) -> Any:
        field = self._reader.fields.get(key)
        return None if field is None else field.contents()
