"""The safetensors of a folder, one file or shards with an index: headers first, rows on demand."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, SourceError

__all__ = ["TensorFiles", "TensorInfo", "Tensors"]

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"


@dataclass(frozen=True)
class TensorInfo:
    """What a header says. `dtype` is safetensors' name: F16, BF16, I32 …"""

    file: str
    dtype: str
    shape: tuple[int, ...]


class Tensors(ABC):
    """The tensors of a folder under the names of a transformers model."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    @abstractmethod
    def table(self) -> dict[str, TensorInfo]:
        """Every tensor."""

    @property
    @abstractmethod
    def files(self) -> tuple[str, ...]:
        """Names of the weight files."""

    @abstractmethod
    def read(self, name: str, *index: slice) -> Any:
        """A `torch.Tensor`, or a part of it."""

    def info(self, name: str) -> TensorInfo:
        """Of one tensor.

        Raises:
            CheckpointError: there is none of this name.
        """
        try:
            return self.table[name]
        except KeyError:
            raise CheckpointError(self._missing(name)) from None

    @abstractmethod
    def _missing(self, name: str) -> str:
        """What is said of a tensor that is not there."""


class TensorFiles(Tensors):
    """The safetensors of a folder; see `Tensors`.

    Files are opened anew for every read: what stayed mapped would count as this process's memory.
    """

    @cached_property
    def table(self) -> dict[str, TensorInfo]:
        """Every tensor, from the headers of all files: a file that is cut short is found here.

        Raises:
            SourceError: there are no safetensors.
            CheckpointError: a file is missing or damaged, or the index names what no file holds.
        """
        shards = self._indexed()
        if shards is None:
            if not (self.folder / _SINGLE).is_file():
                raise SourceError(f"{self.folder} holds no {_SINGLE} or {_INDEX}{self._instead()}")
            return self._header(_SINGLE)
        found: dict[str, TensorInfo] = {}
        for file in sorted(set(shards.values())):
            found |= self._header(file)
        for name, file in shards.items():
            if name not in found or found[name].file != file:
                raise CheckpointError(
                    f"{self.folder / file} does not hold tensor {name}, which {_INDEX} names; "
                    "the shards belong to different checkpoints: download them again"
                )
        return {name: found[name] for name in shards}

    @property
    def files(self) -> tuple[str, ...]:
        """Names of the weight files."""
        return tuple(sorted({info.file for info in self.table.values()}))

    def read(self, name: str, *index: slice) -> Any:
        """A `torch.Tensor`, or a part of it."""
        from safetensors import SafetensorError, safe_open

        path = self.folder / self.info(name).file
        try:
            with safe_open(path, framework="pt") as handle:
                return handle.get_slice(name)[index] if index else handle.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise _damaged(path, error) from error

    def _missing(self, name: str) -> str:
        return (
            f"{self.folder}: tensor {name} is missing from the weights; "
            "the checkpoint does not match its config.json"
        )

    def _instead(self) -> str:
        """What to do, by what the folder holds instead."""
        if others := sorted(path.name for path in self.folder.glob("*.safetensors")):
            return (
                f", but {others[0]}: call one file that holds the whole model {_SINGLE}, add the "
                "index of several; an adapter must be merged into its model"
            )
        return "; pickled weights (.bin) are not read: convert them to safetensors"

    def _indexed(self) -> dict[str, str] | None:
        index = self.folder / _INDEX
        if not index.is_file():
            return None
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            shards = {str(key): str(value) for key, value in weight_map.items()}
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise CheckpointError(f"{index} is no weight index: {error}") from error
        for shard in set(shards.values()):
            # A name in the index is data from the checkpoint: it may not leave the folder.
            if Path(shard).name != shard or not shard.endswith(".safetensors"):
                raise CheckpointError(f"{index}: {shard!r} is no safetensors file name")
            if not (self.folder / shard).is_file():
                raise CheckpointError(f"{self.folder / shard} is missing")
        return shards

    def _header(self, file: str) -> dict[str, TensorInfo]:
        from safetensors import SafetensorError, safe_open

        path = self.folder / file
        try:
            with safe_open(path, framework="pt") as handle:
                slices = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118
                return {
                    name: TensorInfo(file, str(part.get_dtype()), tuple(part.get_shape()))
                    for name, part in slices.items()
                }
        except (OSError, SafetensorError) as error:
            raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{path} cannot be read ({error}); the file is truncated or damaged: download it again"
    )
