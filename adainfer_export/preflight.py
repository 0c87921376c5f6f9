"""Whether a checkpoint's tensors are those of the graph: asked before anything is written."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from .errors import CheckpointError, UnsupportedError
from .sources.viewed import ViewedCheckpoint

__all__ = ["require_same_tensors"]


def require_same_tensors(graph: ir.Graph, checkpoint: ViewedCheckpoint) -> None:
    """Compares names and shapes; reads no weights.

    Raises:
        CheckpointError: a tensor is missing, or has another shape than config.json gives it.
        UnsupportedError: a tensor has no place in the graph: another model than the checkpoint's.
    """
    source, needed = checkpoint.source_name, []
    for name, shape in _weights(graph):
        needed.append(name)
        stored, expected = checkpoint.stored_name(name), checkpoint.expected_shape(name, shape)
        found = checkpoint.stored_shape(name)
        if found != expected:
            raise CheckpointError(
                f"{source}: tensor {stored} has shape {list(found)}, config.json asks for "
                f"{list(expected)}; the weights belong to another configuration"
            )
    if unused := checkpoint.unused(frozenset(needed)):
        shown = ", ".join(unused[:3]) + (", …" if len(unused) > 3 else "")
        raise UnsupportedError(
            f"{source}: {len(unused)} tensors of the checkpoint have no place in the "
            f"graph of architecture {checkpoint.config.model_type}: {shown}"
        )


def _weights(graph: ir.Graph) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Initialisers that the checkpoint has to fill."""
    for name, value in graph.initializers.items():
        if value.const_value is None and value.shape is not None:
            yield name, tuple(int(size) for size in value.shape)  # type: ignore[arg-type]
