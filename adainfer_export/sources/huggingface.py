"""A Hugging Face folder: config.json, safetensors (one or sharded), tokenizer files."""

from __future__ import annotations

import json
import shutil
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from adainfer_runtime.engine_folder import file_sha256
from adainfer_runtime.manifest import SourceFile, SourceSpec

from ..errors import CheckpointError, SourceError
from .checkpoint import require_finite

__all__ = ["HuggingFaceFolder"]

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)
# Files of the older forms that transformers converts: SentencePiece, byte-level BPE (OPT).
_SLOW_TOKENIZERS = (("tokenizer.model",), ("vocab.json", "merges.txt"))
# Computed from the configuration; old checkpoints store them all the same.
_BUFFERS = (
    ".rotary_emb.inv_freq",
    ".attn.bias",
    ".attn.masked_bias",
    ".attention.bias",
    ".attention.masked_bias",
)
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"


class HuggingFaceFolder:
    """A local checkpoint in Hugging Face's layout. Never runs code from it, never unpickles."""

    def __init__(self, folder: Path, *, id: str | None = None, revision: str | None = None) -> None:
        self._folder = folder
        self._id = id
        self._revision = revision
        self._headers: dict[str, dict[str, tuple[int, ...]]] = {}

    @cached_property
    def config(self) -> Any:
        """The `transformers.PretrainedConfig` of config.json."""
        from transformers import AutoConfig

        path = self._folder / "config.json"
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise SourceError(
                f"{self._folder} holds no config.json; give a Hugging Face model folder"
            ) from None
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from error
        model_type = data.get("model_type") if isinstance(data, dict) else None
        if not isinstance(model_type, str):
            raise CheckpointError(f"{path}: no model_type; this is no transformers model")
        from ..architectures import find_architecture

        # Refused by name before transformers tries to import it.
        architecture = find_architecture(model_type)
        try:
            config = AutoConfig.from_pretrained(self._folder, trust_remote_code=False)
            return config.get_text_config() if model_type == architecture.wrapped_in else config
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path} is no valid configuration: {error}") from error

    @cached_property
    def source(self) -> SourceSpec:
        """Identity with the sha256 of config and weight files."""
        names = ["config.json", *sorted(set(self._shards.values()))]
        files = tuple(
            SourceFile(
                name=name,
                bytes=(self._folder / name).stat().st_size,
                sha256=file_sha256(self._folder / name),
            )
            for name in names
        )
        if self._id is not None:
            return SourceSpec(kind="huggingface", id=self._id, revision=self._revision, files=files)
        return SourceSpec(kind="folder", id=self._folder.name, files=files)

    @property
    def source_name(self) -> str:
        """The repository, or the folder."""
        return self._id or str(self._folder)

    @cached_property
    def eos_token_ids(self) -> tuple[int, ...]:
        """From generation_config.json, else from the configuration."""
        found: Any = None
        path = self._folder / "generation_config.json"
        if path.is_file():
            try:
                found = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
            except (OSError, UnicodeDecodeError, json.JSONDecodeError, AttributeError) as error:
                raise CheckpointError(f"{path} cannot be read: {error}") from error
        if found is None:
            found = getattr(self.config, "eos_token_id", None)
        if found is None:
            return ()
        return tuple(found) if isinstance(found, list) else (int(found),)

    @property
    def tied_head(self) -> bool:
        """As the configuration says."""
        return bool(getattr(self.config, "tie_word_embeddings", False))

    def shape(self, name: str) -> tuple[int, ...]:
        """From the shard's header."""
        from safetensors import SafetensorError, safe_open

        shard = self._shard(name)
        if shard not in self._headers:
            try:
                with safe_open(self._folder / shard, framework="pt") as handle:
                    shapes = {key: handle.get_slice(key).get_shape() for key in handle.keys()}  # noqa: SIM118 - no mapping
            except (OSError, SafetensorError) as error:
                raise CheckpointError(
                    f"{self._folder / shard} cannot be read ({error}); the file is truncated or "
                    "damaged: download it again"
                ) from error
            self._headers[shard] = {key: tuple(shape) for key, shape in shapes.items()}
        try:
            return self._headers[shard][name]
        except KeyError:
            raise self._missing(name) from None

    def unused(self, read: frozenset[str]) -> tuple[str, ...]:
        """Of every shard, leaving out buffers and a second copy of a tied head."""
        tied = {"lm_head.weight"} if self.tied_head else set()
        left = self._shards.keys() - read - tied
        return tuple(sorted(name for name in left if not name.endswith(_BUFFERS)))

    def read(self, name: str) -> npt.NDArray[np.float32]:
        """One tensor as float32, memory-mapped from its shard."""
        import torch
        from safetensors import SafetensorError, safe_open

        shard = self._shard(name)
        try:
            with safe_open(self._folder / shard, framework="pt") as handle:
                tensor = handle.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"{self._folder / shard}: tensor {name} cannot be read ({error}); the file is "
                "truncated or damaged: download it again"
            ) from error
        array: npt.NDArray[np.float32] = tensor.to(torch.float32).numpy()
        return require_finite(name, array, str(self._folder / shard))

    def write_tokenizer(self, folder: Path) -> bool:
        """Copies the tokenizer, converting a slow one where that is all there is."""
        has_fast = (self._folder / "tokenizer.json").is_file()
        has_slow = any(
            all((self._folder / name).is_file() for name in names) for names in _SLOW_TOKENIZERS
        )
        if not has_fast and not has_slow:
            return False
        folder.mkdir(parents=True, exist_ok=True)
        if not has_fast:
            self._convert_slow_tokenizer(folder)
        for name in _TOKENIZER_FILES:
            if (self._folder / name).is_file():
                shutil.copyfile(self._folder / name, folder / name)
        return True

    def _shard(self, name: str) -> str:
        try:
            return self._shards[name]
        except KeyError:
            raise self._missing(name) from None

    def _missing(self, name: str) -> CheckpointError:
        return CheckpointError(
            f"{self._folder}: tensor {name} is missing from the weights; "
            "the checkpoint does not match its config.json"
        )

    def _convert_slow_tokenizer(self, folder: Path) -> None:
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(self._folder, use_fast=True)
            tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
        except (OSError, ValueError, ImportError, AttributeError) as error:
            raise CheckpointError(
                f"{self._folder}: the tokenizer cannot be converted to tokenizer.json "
                f"({error}); put a tokenizer.json beside it"
            ) from error

    @cached_property
    def _shards(self) -> dict[str, str]:
        """Tensor name to file name."""
        from safetensors import SafetensorError, safe_open

        index = self._folder / _INDEX
        if index.is_file():
            try:
                weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
                shards = {str(key): str(value) for key, value in weight_map.items()}
            except (OSError, ValueError, KeyError, AttributeError) as error:
                raise CheckpointError(f"{index} is no weight index: {error}") from error
            for shard in set(shards.values()):
                # A name in the index is data from the checkpoint: it may not leave the folder.
                if Path(shard).name != shard or not shard.endswith(".safetensors"):
                    raise CheckpointError(f"{index}: {shard!r} is no safetensors file name")
                if not (self._folder / shard).is_file():
                    raise CheckpointError(f"{self._folder / shard} is missing")
            return shards
        single = self._folder / _SINGLE
        if not single.is_file():
            raise SourceError(
                f"{self._folder} holds no {_SINGLE} or {_INDEX}; pickled weights (.bin) are not "
                "read: convert them to safetensors"
            )
        try:
            with safe_open(single, framework="pt") as handle:
                return dict.fromkeys(handle.keys(), _SINGLE)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"{single} cannot be read ({error}); the file is truncated or damaged: "
                "download it again"
            ) from error
