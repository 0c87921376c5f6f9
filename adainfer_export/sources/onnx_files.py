"""Reading ONNX files from elsewhere: the graph, and rows of its tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ..errors import CheckpointError, one_line

__all__ = ["load_graph", "read_rows", "require_inside"]


def load_graph(path: Path) -> ir.Model:
    """Without the data that lies beside it.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    try:
        return ir.load(path)
    except Exception as error:  # protobuf's and onnx_ir's exceptions share no public base
        raise CheckpointError(f"{path} cannot be read as ONNX: {one_line(error)}") from error


def require_inside(folder: Path, tensor: Any) -> None:
    """A location is data from elsewhere: it may not leave the graph's folder.

    Raises:
        CheckpointError: it does, or its file is missing or too short.
    """
    if not isinstance(tensor, ir.ExternalTensor):
        return
    location = str(tensor.location)
    path = folder / location
    if Path(location).name != location:
        raise CheckpointError(f"{folder}: {location!r} is no name of a data file")
    end = (tensor.offset or 0) + tensor.nbytes
    if not path.is_file() or path.stat().st_size < end:
        raise CheckpointError(f"{path} is missing or truncated: export it again")


def read_rows(folder: Path, name: str, tensor: Any, rows: slice) -> npt.NDArray[Any]:
    """Rows `start … stop` of a tensor, in its own type.

    Raises:
        CheckpointError: the file ends inside it.
    """
    dtype = np.dtype(tensor.dtype.numpy())
    count, *inner = (int(size) for size in tensor.shape.numpy())
    start, stop, _ = rows.indices(count)
    if not isinstance(tensor, ir.ExternalTensor):
        return np.asarray(tensor.numpy()[start:stop])
    width = int(np.prod(inner)) * dtype.itemsize
    with (folder / str(tensor.location)).open("rb") as stream:
        stream.seek((tensor.offset or 0) + start * width)
        raw = np.fromfile(stream, np.uint8, (stop - start) * width)
    if raw.size != (stop - start) * width:
        raise CheckpointError(
            f"{folder / str(tensor.location)} ends inside tensor {name}; the file is "
            "truncated: export it again"
        )
    array: npt.NDArray[Any] = raw.view(dtype).reshape(stop - start, *inner)
    return array
