"""Where every weight of an engine folder stands, decided from shapes before any weight is read.

Graphs are written at once; what the data files are to hold becomes a plan per file, which the
writer carries out one by one: that is what makes an export resumable at the file where it stopped.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from adainfer_runtime.backends.kv_scales import KV_SCALES, KvScales
from adainfer_runtime.engine_folder import record_file
from adainfer_runtime.manifest import FileRecord

from .errors import LoweringError
from .weights import FIELDS, Blocked, Columns, Dense, Rows, Stored, WeightExpr

__all__ = ["ALIGNMENT", "LOGITS", "WIDE", "DataPlan", "StageLayout"]

ALIGNMENT = 4096  # page size: ONNX Runtime maps external data
WIDE = "wide"  # the variant of a stage for many positions
LOGITS = "logits"  # the probe's without features
_INLINE_BYTES = 1024
_SHARED = "shared.data"


@dataclass(frozen=True)
class _Place:
    file: str
    offset: int
    length: int


@dataclass
class DataPlan:
    """One data file: groups of expressions over the same tensors, or finished tables.

    Attributes:
        file: path relative to the engine folder.
        bytes: of the whole file.
    """

    file: str
    groups: list[tuple[Stored, ...]] = field(default_factory=list)
    tables: list[npt.NDArray[Any]] = field(default_factory=list)
    bytes: int = 0

    def reserve(self, length: int) -> _Place:
        """The next place of so many bytes."""
        offset = self.bytes + -self.bytes % ALIGNMENT
        self.bytes = offset + length
        return _Place(Path(self.file).name, offset, length)


class StageLayout:
    """The layout of one engine folder.

    Every weight stands in one file: an expression that was placed before (the tied embedding, a
    rotary table) is referred to by file, offset and length instead of placed again, and so are
    rows of it.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._folder = root / "stages"
        self._folder.mkdir(parents=True, exist_ok=True)
        self._places: dict[Any, _Place] = {}
        self._plans: dict[str, DataPlan] = {}
        self._records: dict[str, FileRecord] = {}

    def add(self, model: ir.Model, weights: dict[str, WeightExpr]) -> str:
        """Places a stage's weights and writes its graph; the path relative to the folder."""
        return self._add(model, str(model.graph.name), weights)

    def add_variant(self, model: ir.Model, variant: str, weights: dict[str, WeightExpr]) -> str:
        """Writes a changed graph of a stage that was added, on the same weights and some of its
        own.
        """
        return self._add(model, f"{model.graph.name}.{variant}", weights)

    def add_kv_scales(self, scales: KvScales) -> str:
        """Writes what the runtime reads of them; the path relative to the folder."""
        self._records[KV_SCALES] = record_file(scales.save(self.root))
        return KV_SCALES

    @property
    def plans(self) -> tuple[DataPlan, ...]:
        """The data files, in the order of their stages."""
        return tuple(self._plans.values())

    @property
    def records(self) -> dict[str, FileRecord]:
        """What was written, graphs and scales of caches, by relative path."""
        return dict(self._records)

    def _add(self, model: ir.Model, name: str, weights: dict[str, WeightExpr]) -> str:
        initializers = model.graph.initializers
        for key in sorted(initializers):  # one order, whatever order the split found them in
            value = initializers.pop(key)
            initializers[key] = value
            if value.const_value is None:
                self._place_weight(f"{name}.data", value, weights, initializers)
            elif isinstance(value.const_value, ir.ExternalTensor):
                continue  # of a variant: placed with its stage
            elif value.const_value.nbytes > _INLINE_BYTES:
                self._place_table(value)
        return self._save(model, name)

    def _save(self, model: ir.Model, name: str) -> str:
        relative = f"stages/{name}.onnx"
        ir.save(model, self.root / relative)
        self._records[relative] = record_file(self.root / relative)
        return relative

    def _place_weight(
        self, file: str, value: ir.Value, weights: dict[str, WeightExpr], initializers: Any
    ) -> None:
        assert value.name is not None  # initialisers are keyed by name
        expr = weights.get(value.name, Dense((value.name,)))
        if isinstance(expr, Rows):
            value.const_value = self._reference(value, self._place_of_rows(expr))
            return
        if expr not in self._places:
            plan = self._plan(file)
            group: dict[str, Stored] = {value.name: expr}
            if isinstance(expr, Blocked | Columns):  # its fields come from one read of the matrix
                group = _fields(expr, weights)
            for name, member in group.items():
                holder = value if name == value.name else initializers[name]
                self._places[member] = plan.reserve(_nbytes(holder))
            plan.groups.append(tuple(group.values()))
        value.const_value = self._reference(value, self._places[expr])

    def _place_of_rows(self, expr: Rows) -> _Place:
        whole = self._places.get(expr.whole)
        if whole is None:
            raise LoweringError(f"rows of {'+'.join(expr.whole.parts)}, which no stage holds")
        row = whole.length // expr.total
        return _Place(whole.file, whole.offset + expr.start * row, (expr.end - expr.start) * row)

    def _place_table(self, value: ir.Value) -> None:
        tensor = value.const_value
        assert tensor is not None
        array = np.ascontiguousarray(tensor.numpy())
        key = (value.name, array.shape)
        if key not in self._places:
            plan = self._plan(_SHARED)
            self._places[key] = plan.reserve(array.nbytes)
            plan.tables.append(array)
        value.const_value = self._reference(value, self._places[key])

    def _plan(self, file: str) -> DataPlan:
        return self._plans.setdefault(file, DataPlan(f"stages/{file}"))

    def _reference(self, value: ir.Value, place: _Place) -> ir.ExternalTensor:
        assert value.shape is not None and value.dtype is not None and value.name is not None
        return ir.ExternalTensor(
            place.file,
            place.offset,
            place.length,
            value.dtype,
            shape=value.shape,
            name=value.name,
            base_dir=str(self._folder),
        )


def _fields(expr: Blocked | Columns, weights: dict[str, WeightExpr]) -> dict[str, Stored]:
    """The stage's initialisers that hold the same matrix, in the order of `FIELDS`."""
    found = [
        (FIELDS.index(member.field), name, member)
        for name, member in weights.items()
        if isinstance(member, type(expr))
        and (member.parts, member.blocks) == (expr.parts, expr.blocks)
    ]
    return {name: member for _, name, member in sorted(found, key=lambda item: item[0])}


def _nbytes(value: ir.Value) -> int:
    assert value.shape is not None and value.dtype is not None  # weights have static shapes
    return math.ceil(math.prod(value.shape.numpy()) * value.dtype.itemsize)  # int4: half a byte
