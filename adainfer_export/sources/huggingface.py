"""A Hugging Face folder: config.json, safetensors (one or sharded), tokenizer files."""

from __future__ import annotations

import copy
import json
import shutil
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from adainfer_runtime.engine_folder import file_sha256
from adainfer_runtime.manifest import SourceFile, SourceSpec

from ..errors import CheckpointError, SourceError, UnsupportedError, one_line
from ..quantise import BlockRows, Blocks
from .checkpoint import end_tokens, require_finite
from .packed import PackedLinears
from .stored_heads import equal_tensors, find_embedding, find_heads
from .tensor_files import TensorFiles, Tensors

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
_FLOATS = ("F32", "F16", "BF16", "F64")
# What transformers lets be zero or less, and no model can be built of.
_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "max_position_embeddings",
)


class HuggingFaceFolder:
    """A local checkpoint in Hugging Face's layout. Never runs code from it, never unpickles.

    Args:
        tensors: the weights, where they are no safetensors.
    """

    def __init__(
        self,
        folder: Path,
        *,
        id: str | None = None,
        revision: str | None = None,
        tensors: Tensors | None = None,
    ) -> None:
        self._folder = folder
        self._files = tensors or TensorFiles(folder)
        self._id = id
        self._revision = revision

    @cached_property
    def config(self) -> Any:
        """The `transformers.PretrainedConfig` of config.json, as if nothing were quantised.

        A head that is stored, and is another matrix than the embedding, is not tied to it,
        whatever config.json says: so does transformers.
        """
        config = copy.deepcopy(self._full_config)
        if self._has_head_of_its_own:
            config.tie_word_embeddings = False
        if self._packed:  # refuses what cannot be read
            del config.quantization_config
        return config

    @cached_property
    def _full_config(self) -> Any:
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
        except Exception as error:  # transformers' checks, and what divides by zero before them
            reason = one_line(error)
            raise CheckpointError(f"{path} is no valid configuration: {reason}") from error
        if model_type == architecture.wrapped_in:
            text = config.get_text_config()
            if (packed := getattr(config, "quantization_config", None)) is not None:
                text.quantization_config = packed  # said of the whole model
            config = text
        _require_sizes(config, path)
        return config

    @cached_property
    def source(self) -> SourceSpec:
        """Identity with the sha256 of config and weight files."""
        names = ["config.json", *self._files.files]
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
        return SourceSpec(kind="folder", id=self._folder.resolve().name, files=files)

    @property
    def source_name(self) -> str:
        """The repository, or the folder."""
        return self._id or str(self._folder)

    @cached_property
    def eos_token_ids(self) -> tuple[int, ...]:
        """From generation_config.json, else from the configuration."""
        path = self._folder / "generation_config.json"
        if path.is_file():
            try:
                found = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
            except (OSError, UnicodeDecodeError, json.JSONDecodeError, AttributeError) as error:
                raise CheckpointError(f"{path} cannot be read: {error}") from error
            if found is not None:
                return end_tokens(found, path)
        found = getattr(self.config, "eos_token_id", None)
        return end_tokens(found, self._folder / "config.json")

    @property
    def tied_head(self) -> bool:
        """As the configuration says, unless another head is stored."""
        return bool(getattr(self.config, "tie_word_embeddings", False))

    def decoder(self) -> None:
        """None: the source holds weights."""

    def unused(self, read: frozenset[str]) -> tuple[str, ...]:
        """Of every shard, leaving out buffers and a second copy of a tied head."""
        copies = find_heads(self._files.table) if self.tied_head else ()
        used = {stored for name in read for stored in self._stored(name)}
        left = self._files.table.keys() - used - set(copies)
        return tuple(
            sorted(n for n in left if not n.endswith(_BUFFERS) and not self._is_empty_bias(n))
        )

    def shape(self, name: str) -> tuple[int, ...]:
        """From the headers."""
        if self._packed and self._packed.holds(name):
            return self._packed.shape(name)
        info = self._files.info(name)
        if info.dtype not in _FLOATS:
            raise UnsupportedError(
                f"{self._folder / info.file}: tensor {name} has dtype {info.dtype}, which is no "
                f"weight that can be read (supported: {', '.join(_FLOATS)}, GPTQ and AWQ)"
            )
        return info.shape

    def read(self, name: str, rows: slice | None = None) -> npt.NDArray[np.float32]:
        """One tensor or rows of it as float32; packed ones are dequantised."""
        import torch

        rows = rows or slice(0, self.shape(name)[0])
        if self._packed and self._packed.holds(name):
            array = self._packed.read(name, rows)
        else:
            array = self._files.read(name, rows).to(torch.float32).numpy()
        return require_finite(name, array, str(self._folder / self._file_of(name)))

    def blocks(self, name: str) -> Blocks | None:
        """Of packed layers.

        Raises:
            UnsupportedError: a packed layer whose blocks cannot be kept.
        """
        if not self._packed or not self._packed.holds(name):
            return None
        found = self._packed.blocks(name)
        if found is None:
            raise UnsupportedError(
                f"{self._folder}: {name} has its columns in an order of its own (act-order), or "
                "groups that are no multiple of 16: its blocks cannot be kept; export with "
                "--precision int4, int8 or fp32"
            )
        return found

    def read_blocks(self, name: str, rows: slice) -> BlockRows:
        """Of packed layers."""
        assert self._packed is not None  # only they have blocks
        found = self._packed.read_blocks(name, rows)
        require_finite(name, found.scales, str(self._folder / self._file_of(name)))
        return found

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

    def _convert_slow_tokenizer(self, folder: Path) -> None:
        from transformers import AutoTokenizer

        try:
            # Said outright: left open, transformers asks on standard input, and runs it on a `y`.
            tokenizer = AutoTokenizer.from_pretrained(self._folder, trust_remote_code=False)
            tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
        except Exception as error:  # whatever foreign files make of transformers' converters
            raise CheckpointError(
                f"{self._folder}: the tokenizer cannot be converted to tokenizer.json "
                f"({self._why_not_converted(error)}); put a tokenizer.json beside it"
            ) from error

    def _why_not_converted(self, error: Exception) -> str:
        if self._tokenizer_is_code:
            return "it is code of the checkpoint's own, which is never run"
        if (self._folder / "tokenizer.model").is_file():
            # Where SentencePiece cannot read it, transformers takes it for tiktoken's and asks for
            # that package.
            if find_spec("sentencepiece") is None:
                return (
                    "reading tokenizer.model needs the `sentencepiece` package: "
                    "pip install 'adainfer-export[export]'"
                )
            if "tiktoken" in str(error):
                return "tokenizer.model is no SentencePiece model"
        return one_line(error)

    @property
    def _tokenizer_is_code(self) -> bool:
        path = self._folder / "tokenizer_config.json"
        try:
            return "auto_map" in json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, TypeError):
            return False

    @cached_property
    def _packed(self) -> PackedLinears | None:
        settings = getattr(self._full_config, "quantization_config", None)
        if settings is None:
            return None
        settings = settings if isinstance(settings, dict) else settings.to_dict()
        return PackedLinears(self._files, settings)

    @cached_property
    def _has_head_of_its_own(self) -> bool:
        if not getattr(self._full_config, "tie_word_embeddings", False):
            return False
        embedding = find_embedding(self._files.table)
        if embedding is None:
            return False
        shape = self.shape(embedding)
        return any(
            self.shape(head) != shape or not equal_tensors(self.read, head, embedding, shape)
            for head in find_heads(self._files.table)
        )

    def _stored(self, name: str) -> tuple[str, ...]:
        if self._packed and self._packed.holds(name):
            return self._packed.tensors(name)
        return (name,)

    def _file_of(self, name: str) -> str:
        return self._files.info(self._stored(name)[0]).file

    def _is_empty_bias(self, name: str) -> bool:
        """AutoGPTQ stores biases of zeros for layers that have none."""
        stem = name.removesuffix(".bias")
        if not self._packed or stem == name or not self._packed.holds(f"{stem}.weight"):
            return False
        return not self.read(name).any()


def _require_sizes(config: Any, path: Path) -> None:
    for name in _SIZES:
        size = getattr(config, name, None)
        if isinstance(size, int) and size < 1:
            raise CheckpointError(f"{path} is no valid configuration: {name} is {size}")
