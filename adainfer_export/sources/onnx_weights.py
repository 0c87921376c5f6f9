"""The weights of a decoder that torch's ONNX exporter wrote, as optimum calls it.

Such a graph computes attention with small operators over a cache that grows, so it cannot be
split as it is; but it holds every weight, and names say which is which. Parameters keep their
names; of a linear layer, whose matrix the exporter transposes, the name is left in the node:
`/model/layers.0/mlp/up_proj/MatMul`. Equal tensors are stored once, others are `Identity` of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from ..errors import UnsupportedError
from .onnx_files import load_graph, read_rows, require_inside
from .tensor_files import TensorInfo, Tensors

__all__ = ["OnnxWeights", "find_onnx_weights"]

# With and without a past, merged, and where transformers.js keeps them.
_FILES = ("model.onnx", "decoder_model.onnx", "decoder_model_merged.onnx")
_FOLDERS = ("", "onnx/")
_ANONYMOUS = "onnx::"
_FLOATS = {
    ir.DataType.FLOAT: "F32",
    ir.DataType.FLOAT16: "F16",
    ir.DataType.BFLOAT16: "BF16",
    ir.DataType.DOUBLE: "F64",
}
_QUANTISED = {
    "DequantizeLinear",
    "DynamicQuantizeLinear",
    "MatMulInteger",
    "QLinearMatMul",
    "QuantizeLinear",
}


@dataclass(frozen=True)
class _Stored:
    """Where a parameter is; `minus` is what the exporter added to it (Gemma's norms: 1)."""

    tensor: Any
    transposed: bool = False
    minus: float = 0.0


def find_onnx_weights(folder: Path) -> str | None:
    """The decoder's graph in a folder that optimum wrote, relative to it; None: there is none."""
    names = (f"{place}{file}" for place in _FOLDERS for file in _FILES)
    return next((name for name in names if (folder / name).is_file()), None)


class OnnxWeights(Tensors):
    """See `Tensors`. Names are those of the transformers model.

    Args:
        file: the graph, relative to `folder`.
    """

    def __init__(self, folder: Path, file: str) -> None:
        super().__init__(folder)
        self._path = folder / file

    @cached_property
    def table(self) -> dict[str, TensorInfo]:
        """Every parameter.

        Raises:
            CheckpointError: the graph cannot be read, or its data is missing or cut short.
            UnsupportedError: it was quantised or optimised: weights have no names in it.
        """
        return {
            name: TensorInfo(self._file_of(stored), *_header(stored))
            for name, stored in self._stored.items()
        }

    @cached_property
    def files(self) -> tuple[str, ...]:
        """The graph, and its data."""
        graph = str(self._path.relative_to(self.folder))
        return tuple(sorted({graph, *(self._file_of(stored) for stored in self._stored.values())}))

    def read(self, name: str, *index: slice) -> Any:
        """A `torch.Tensor`, or a part of it."""
        import torch

        self.info(name)
        stored = self._stored[name]
        if stored.transposed:
            # All of it: its rows lie across the file.
            array = read_rows(self._path.parent, name, stored.tensor, slice(None)).T[index or ...]
        else:
            rows, *others = index or (slice(None),)
            array = read_rows(self._path.parent, name, stored.tensor, rows)
            array = array[(slice(None), *others)]
        if array.dtype.kind != "f":
            array = array.astype(np.float32)  # bfloat16, which torch cannot take from numpy
        found = torch.from_numpy(np.array(array, order="C"))
        return found.float() - stored.minus if stored.minus else found

    def _missing(self, name: str) -> str:
        return (
            f"{self._path}: weight {name} is not found in the graph; either it belongs to "
            "another config.json, or was not written by torch's exporter as optimum calls it: "
            "export from the checkpoint instead"
        )

    @cached_property
    def _stored(self) -> dict[str, _Stored]:
        graph = load_graph(self._path).graph
        found: dict[str, _Stored] = {}
        for node in ir.traversal.RecursiveGraphIterator(graph):
            self._require_plain(node)
            for name, stored in _parameters(node):
                found.setdefault(name, stored)
        for stored in found.values():
            require_inside(self._path.parent, stored.tensor)
        return found

    def _require_plain(self, node: ir.Node) -> None:
        if node.domain not in ("", "ai.onnx") or node.op_type in _QUANTISED:
            raise UnsupportedError(
                f"{self._path} holds operator {node.op_type}: read are decoders that optimum "
                "neither quantised nor optimised; export from the checkpoint instead (targets and "
                "--precision are chosen here)"
            )

    def _file_of(self, stored: _Stored) -> str:
        if not isinstance(stored.tensor, ir.ExternalTensor):
            return str(self._path.relative_to(self.folder))
        return str((self._path.parent / str(stored.tensor.location)).relative_to(self.folder))


def _parameters(node: ir.Node) -> Iterator[tuple[str, _Stored]]:
    """The parameters that a node reads, with their names."""
    for place, value in enumerate(node.inputs):
        tensor = _constant(value)
        if value is None or tensor is None:
            continue
        name, scope = str(value.name), _scope(node)
        if not name.startswith(_ANONYMOUS):
            if "/" not in name:  # those are the exporter's own
                yield name, _Stored(tensor)
        elif node.op_type == "MatMul" and place == 1 and len(tensor.shape) == 2:
            yield f"{scope}.weight", _Stored(tensor, transposed=True)
        elif node.op_type == "Mul" and len(tensor.shape) == 1:
            yield f"{scope}.weight", _Stored(tensor, minus=1.0)


def _constant(value: ir.Value | None) -> Any | None:
    """A floating-point initialiser, through any number of `Identity`."""
    while value is not None and (node := value.producer()) is not None:
        if node.op_type != "Identity":
            return None
        value = node.inputs[0]
    tensor = None if value is None else value.const_value
    return tensor if tensor is not None and tensor.dtype in _FLOATS else None


def _scope(node: ir.Node) -> str:
    """The module that a node belongs to: `/model/norm/Mul_1` is of `model.norm`."""
    return ".".join(str(node.name).strip("/").split("/")[:-1])


def _header(stored: _Stored) -> tuple[str, tuple[int, ...]]:
    shape = tuple(int(size) for size in stored.tensor.shape.numpy())
    return _FLOATS[stored.tensor.dtype], shape[::-1] if stored.transposed else shape
