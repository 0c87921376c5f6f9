"""The graphs of a folder, and its files."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from .record import Count, ElementType, Record, Width

__all__ = ["FileRecord", "StageSpec", "TensorSpec", "TokenizerSpec"]


class TensorSpec(Record):
    """A tensor that the stage `positions` computes once per pass for all layer stages.

    Dimensions are numbers, `rows` (positions of the pass) or `keys` (positions that it attends to,
    the sink included).
    """

    name: str
    dtype: ElementType | Literal["bool"]
    shape: tuple[Width | Literal["rows", "keys"], ...]


class FileRecord(Record):
    """Size in bytes and sha256 of one file of the folder."""

    bytes: Count
    sha256: str


class StageSpec(Record):
    """One graph. Layer numbers are 1-based and inclusive; 0 for stages that hold no layer.

    `positions` is there where layer stages share tensors that depend on the positions of a pass:
    masks, rotary rows. `probe` is final norm and LM head with AdaInfer's features, `candidates` the
    same over some of the head's rows, `kv_fill` one layer's K and V from the hidden state of a
    position that skipped the layer.

    `wide_file` is the same stage on the same weights, for passes of many positions; `logits_file`
    the probe without its features, for runtimes that compute them from the logits.
    `multiply_adds` counts one position through the stage's weight matrices.
    """

    name: str
    kind: Literal["embed", "positions", "layers", "probe", "candidates", "kv_fill"]
    file: str
    wide_file: str | None = None
    logits_file: str | None = None
    first_layer: Count = 0
    last_layer: Count = 0
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    multiply_adds: Count

    @model_validator(mode="after")
    def _weighs(self) -> StageSpec:
        if self.kind in ("layers", "probe") and self.multiply_adds == 0:
            raise ValueError(f"stage {self.name} without multiply-adds")  # costs are shares of them
        return self


class TokenizerSpec(Record):
    """Files of the Hugging Face tokenizer."""

    file: str
    files: tuple[str, ...]
