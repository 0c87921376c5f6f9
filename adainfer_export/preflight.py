"""Whether a checkpoint's tensors are those of the graph: asked before anything is written."""

from __future__ import annotations

import onnx_ir as ir

from .errors import CheckpointError, UnsupportedError
from .sources.viewed import ViewedCheckpoint

__all__ = ["require_same_tensors", "weight_shapes"]


def require_same_tensors(graph: ir.Graph, checkpoint: ViewedCheckpoint) -> None:
    """Compares names, types and shapes; reads no weights.

    Raises:
        CheckpointError: a tensor is missing, or has another shape than the configuration gives it.
        UnsupportedError: a tensor is of a type that cannot be read, or has no place in the graph:
            another model than the checkpoint's.
    """
    source, weights = checkpoint.source_name, weight_shapes(graph)
    for name, shape in weights.items():
        stored, expected = checkpoint.stored_name(name), checkpoint.expected_shape(name, shape)
        found = checkpoint.stored_shape(name)
        if found != expected:
            raise CheckpointError(
                f"{source}: tensor {stored} has shape {list(found)}, its configuration asks for "
                f"{list(expected)}; configuration and weights belong to different models"
            )
    if unused := checkpoint.unused(frozenset(weights)):
        shown = ", ".join(unused[:3]) + (", …" if len(unused) > 3 else "")
        raise UnsupportedError(
            f"{source}: {len(unused)} tensors of the checkpoint have no place in the "
            f"graph of architecture {checkpoint.config.model_type}: {shown}"
        )


def weight_shapes(graph: ir.Graph) -> dict[str, tuple[int, ...]]:
    """Name and shape of every initialiser that the checkpoint has to fill."""
    return {
        name: tuple(value.shape.numpy())
        for name, value in graph.initializers.items()
        if value.const_value is None and value.shape is not None
    }
