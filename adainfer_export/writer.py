"""Writes stages: graphs as ONNX, weights into data files, one tensor in memory at a time."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from adainfer_runtime.engine_folder import record_file
from adainfer_runtime.manifest import FileRecord

from .sources.checkpoint import Checkpoint
from .weights import Dense, WeightExpr, evaluate

__all__ = ["StageWriter"]

_ALIGNMENT = 4096  # page size: ONNX Runtime maps external data
_INLINE_BYTES = 1024
_SHARED = "shared.data"


@dataclass(frozen=True)
class _Place:
    file: str
    offset: int
    length: int


class StageWriter:
    """Writes the stages of one engine folder.

    Every weight stands in one file: an expression that was written before (the tied embedding, a
    rotary table) is referred to by file, offset and length instead of written again.
    """

    def __init__(self, root: Path, checkpoint: Checkpoint) -> None:
        self._root = root
        self._folder = root / "stages"
        self._folder.mkdir(parents=True)
        self._checkpoint = checkpoint
        self._places: dict[Any, _Place] = {}
        self._data: dict[str, _DataFile] = {}
        self._records: dict[str, FileRecord] = {}

    def write(self, model: ir.Model, weights: dict[str, WeightExpr]) -> str:
        """Writes one stage and its weights; returns its path relative to the engine folder."""
        name = model.graph.name
        initializers = model.graph.initializers
        for key in sorted(initializers):  # one order, whatever order the split found them in
            value = initializers.pop(key)
            initializers[key] = value
            if value.const_value is None:
                self._place_weight(f"{name}.data", value, weights)
            elif value.const_value.nbytes > _INLINE_BYTES:
                self._place_table(value)
        return self._save(model, str(name))

    def write_variant(self, model: ir.Model, variant: str) -> str:
        """Writes a changed graph of a stage that was written, on the same weights."""
        return self._save(model, f"{model.graph.name}.{variant}")

    @property
    def read(self) -> frozenset[str]:
        """Checkpoint tensors that went into what was written."""
        exprs = (key for key in self._places if isinstance(key, WeightExpr))
        return frozenset(part for expr in exprs for part in expr.parts)

    def close(self) -> dict[str, FileRecord]:
        """Closes the data files; size and sha256 of everything written, by relative path."""
        for name, file in self._data.items():
            self._records[f"stages/{name}"] = file.close()
        return dict(sorted(self._records.items()))

    def _save(self, model: ir.Model, name: str) -> str:
        path = self._folder / f"{name}.onnx"
        ir.save(model, path)
        relative = f"stages/{name}.onnx"
        self._records[relative] = record_file(path)
        return relative

    def _place_weight(self, file: str, value: ir.Value, weights: dict[str, WeightExpr]) -> None:
        assert value.name is not None  # initialisers are keyed by name
        expr = weights.get(value.name, Dense((value.name,)))
        if expr not in self._places:
            # Both tensors of a quantised matrix come from one read of it.
            siblings = tuple(e for e in weights.values() if e.parts == expr.parts)
            wanted = tuple(e for e in (expr, *siblings) if e not in self._places)
            for key, array in evaluate(self._checkpoint, tuple(dict.fromkeys(wanted))).items():
                self._places[key] = self._append(file, array)
        value.const_value = self._reference(value, self._places[expr])

    def _place_table(self, value: ir.Value) -> None:
        tensor = value.const_value
        assert tensor is not None
        array = tensor.numpy()
        key = (value.name, array.shape)
        if key not in self._places:
            self._places[key] = self._append(_SHARED, array)
        value.const_value = self._reference(value, self._places[key])

    def _append(self, file: str, array: npt.NDArray[np.generic]) -> _Place:
        if file not in self._data:
            self._data[file] = _DataFile(self._folder / file)
        return self._data[file].append(array)

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


class _DataFile:
    def __init__(self, path: Path) -> None:
        self._path = path
        self._stream = path.open("wb")
        self._digest = hashlib.sha256()

    def append(self, array: npt.NDArray[np.generic]) -> _Place:
        self._write(b"\0" * (-self._stream.tell() % _ALIGNMENT))
        offset = self._stream.tell()
        content = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
        self._write(content)
        return _Place(self._path.name, offset, content.nbytes)

    def close(self) -> FileRecord:
        size = self._stream.tell()
        self._stream.close()
        return FileRecord(bytes=size, sha256=self._digest.hexdigest())

    def _write(self, content: bytes | memoryview) -> None:
        self._stream.write(content)
        self._digest.update(content)
