"""What every source becomes: a configuration, tensors read one at a time, and a tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from adainfer_runtime.manifest import SourceSpec

from ..errors import CheckpointError, NonFiniteWeightError
from ..quantise import BlockRows, Blocks

__all__ = ["Checkpoint", "end_tokens", "require_finite"]


class Checkpoint(Protocol):
    """A decoder-only model on disk. Nothing is loaded before it is asked for, by any thread."""

    @property
    def config(self) -> Any:
        """The `transformers.PretrainedConfig`."""

    @property
    def source(self) -> SourceSpec:
        """Identity: kind, id, revision, and sha256 of each file."""

    @property
    def source_name(self) -> str:
        """What messages call it: a path or a name. Unlike `source`, it costs nothing."""

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Tokens that end a text."""

    @property
    def tied_head(self) -> bool:
        """True where the LM head is the token embedding."""

    def decoder(self) -> Any | None:
        """The decoder's graph (`onnx_ir.Model`) where the source holds one: it is split as it is.

        Raises:
            UnsupportedError: it holds one of another form than can be split.
        """

    def unused(self, read: frozenset[str]) -> tuple[str, ...]:
        """Tensors that belong to the model, but are not among those that were read."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor under its Hugging Face name; nothing is read but headers.

        Raises:
            CheckpointError: missing, or not as long as its header says.
            UnsupportedError: stored in a type that cannot be read.
        """

    def read(self, name: str, rows: slice | None = None) -> npt.NDArray[np.float32]:
        """A tensor, or rows `start … stop` of it, as float32.

        Raises:
            CheckpointError: missing, damaged or not finite.
        """

    def blocks(self, name: str) -> Blocks | None:
        """How the tensor can be kept as it is stored; None where it is no such matrix."""

    def read_blocks(self, name: str, rows: slice) -> BlockRows:
        """Rows `start … stop` of a matrix that has `blocks`.

        Raises:
            CheckpointError: missing, damaged or not finite.
        """

    def write_tokenizer(self, folder: Path) -> bool:
        """Writes `tokenizer.json` and what belongs to it; False where there is none."""


def end_tokens(found: Any, path: Path) -> tuple[int, ...]:
    """The value of `eos_token_id` in the file `path`: nothing, a token id or a list of them.

    Raises:
        CheckpointError: it is something else.
    """
    if found is None:
        return ()
    tokens = found if isinstance(found, list) else [found]
    if not all(type(token) is int for token in tokens):
        raise CheckpointError(f"{path}: eos_token_id is {found!r}, no token id or list of them")
    return tuple(tokens)


def require_finite(
    name: str, tensor: npt.NDArray[np.float32], where: str
) -> npt.NDArray[np.float32]:
    """The tensor itself.

    Raises:
        NonFiniteWeightError: it holds NaN or infinity.
    """
    # The sum is finite unless a value is not, or it overflows: only then look at each.
    if not np.isfinite(tensor.sum(dtype=np.float64)):
        bad = int(tensor.size - np.isfinite(tensor).sum())
        if bad:
            raise NonFiniteWeightError(
                f"{where}: tensor {name} holds {bad} NaN or infinite values of {tensor.size}; "
                "the checkpoint is damaged: download it again"
            )
    return tensor
