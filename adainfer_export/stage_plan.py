"""An export that is planned to the last byte: graphs written, weights still to come."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from adainfer_runtime.manifest import (
    SCHEMA_VERSION,
    FileRecord,
    KvGeometry,
    Manifest,
    ModelSpec,
    Quantisation,
    StageSpec,
    TensorSpec,
    TokenizerSpec,
)

from .layout import WIDE, StageLayout
from .lower import Precision
from .sources import Checkpoint

__all__ = ["StagePlan"]


@dataclass(frozen=True)
class StagePlan:
    """All stages of a folder, and where every weight will stand.

    Attributes:
        checkpoint: the weights, under the names that the layout's expressions use.
    """

    stages: tuple[StageSpec, ...]
    layout: StageLayout
    checkpoint: Checkpoint
    exporter: dict[str, str]
    model: ModelSpec
    target: str
    precision: Precision
    layers_per_engine: int | None
    max_seq_len: int
    kv: KvGeometry
    pass_tensors: tuple[TensorSpec, ...] = ()
    batched: bool = False
    most_layers_per_engine: int | None = None

    def settings(self) -> dict[str, Any]:
        """What the user chose, as the manifest says it."""
        quantisation = _quantisation(self.precision)
        return {
            "target": self.target,
            "precision": self.precision.name,
            "quantisation": None if quantisation is None else quantisation.model_dump(mode="json"),
            "layers_per_engine": self.layers_per_engine,
            "max_seq_len": self.max_seq_len,
        }

    def progress_of(self, file: str) -> str:
        """What a display says once a data file is written: which of the model's layers it was."""
        name = PurePosixPath(file).stem.removesuffix(f".{WIDE}")
        for stage in self.stages:
            if stage.name == name and stage.kind == "layers":
                first, last = stage.first_layer, stage.last_layer
                which = f"layer {last}" if first == last else f"layers {first}-{last}"
                return f"{which}/{self.model.num_layers}"
        return name

    def identity(self) -> dict[str, Any]:
        """What must be equal for two exports to write the same bytes."""
        files = [file.model_dump() for file in self.checkpoint.source.files]
        return {
            **self.settings(),
            "kv_cache": self.kv.dtype,
            "source": files,
            "exporter": self.exporter,
        }

    def manifest(
        self,
        tokenizer: TokenizerSpec | None,
        files: Mapping[str, FileRecord],
    ) -> Manifest:
        """The manifest, once everything is written."""
        return Manifest(
            schema_version=SCHEMA_VERSION,
            exporter=self.exporter,
            source=self.checkpoint.source,
            model=self.model,
            target=self.target,
            precision=self.precision.name,
            quantisation=_quantisation(self.precision),
            layers_per_engine=self.layers_per_engine,
            most_layers_per_engine=self.most_layers_per_engine,
            max_seq_len=self.max_seq_len,
            kv=self.kv,
            stages=self.stages,
            pass_tensors=self.pass_tensors,
            batched=self.batched,
            tokenizer=tokenizer,
            files=dict(files),
        )


def _quantisation(precision: Precision) -> Quantisation | None:
    if precision.bits is None:
        return None
    return Quantisation(
        bits=precision.bits,
        block_size=precision.block_size,
        down_block_size=precision.down_block_size,
        accuracy_level=precision.accuracy_level if precision.activations == "float32" else None,
        wide_rows=precision.wide_rows,
        int8_layers=tuple(sorted(precision.int8_layers)),
        int8_head=precision.int8_head,
        rounding=precision.rounding,
        prefill=precision.prefill,
    )
