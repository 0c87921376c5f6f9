"""The LM head's matrix, which embedding (where it is tied), probe and candidates all read.

Plans hold their constants, so that it would lie in device memory once for each of them. As an input
of those plans it lies there once, and TensorRT reads it where it is: TensorRT-RTX 1.7.1 multiplies
by the same kind of kernel either way, and the probe's plan for SmolLM2 has 3 MB instead of 60.
Where it does not (see `multiplies_in_place`), the probe keeps its own, and the others share.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import onnx

from adainfer_runtime.manifest import Manifest
from adainfer_runtime.plans import SharedTable

__all__ = ["multiplies_in_place", "shared_tables", "with_inputs"]

_KINDS = ("embed", "probe", "candidates")
_ALIGNED = 8
_TYPES = {
    onnx.TensorProto.FLOAT: "float32",
    onnx.TensorProto.FLOAT16: "float16",
    onnx.TensorProto.BFLOAT16: "bfloat16",
}


def shared_tables(folder: Path, manifest: Manifest, file: str) -> tuple[SharedTable, ...]:
    """The matrices of an ONNX file that another of these stages reads as well."""
    files = [stage.file for stage in manifest.stages if stage.kind in _KINDS]
    if file not in files:
        return ()
    found = {name: _matrices(folder, name) for name in files}
    probe = manifest.probe.file
    found[probe] = [table for table in found[probe] if multiplies_in_place(table.shape)]
    places = Counter(table.place for tables in found.values() for table in tables)
    return tuple(table for table in found[file] if places[table.place] > 1)


def multiplies_in_place(shape: Sequence[int]) -> bool:
    """Whether a product with all of a matrix `[vocabulary, hidden_size]` reads it where it lies.

    TensorRT-RTX 1.7.1 pads odd sizes: of a constant once, when the plan is built, of an input by a
    copy in every run. Tensor cores want 16 bytes at a time, so that other versions may pad more.
    """
    return all(size % _ALIGNED == 0 for size in shape)


def with_inputs(path: Path, names: Sequence[str]) -> onnx.ModelProto:
    """The model, its weights still where they lie, with some initialisers as inputs."""
    model = onnx.load(path, load_external_data=False)
    initializers = model.graph.initializer
    for tensor in [tensor for tensor in initializers if tensor.name in names]:
        value = onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
        model.graph.input.append(value)
        initializers.remove(tensor)
    return model


def _matrices(folder: Path, file: str) -> list[SharedTable]:
    tables = []
    for tensor in onnx.load(folder / file, load_external_data=False).graph.initializer:
        place = {entry.key: entry.value for entry in tensor.external_data}
        if len(tensor.dims) != 2 or not place or tensor.data_type not in _TYPES:
            continue
        tables.append(
            SharedTable(
                name=tensor.name,
                file=str(PurePosixPath(file).parent / place["location"]),
                offset=int(place.get("offset", 0)),
                bytes=int(place["length"]),
                dtype=_TYPES[tensor.data_type],
                shape=tuple(tensor.dims),
            )
        )
    return tables
