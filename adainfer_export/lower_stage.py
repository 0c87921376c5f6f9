"""Lowers a stage by the dialect's pass for its kind."""

from __future__ import annotations

from .lower import Precision
from .lower.targets import Dialect
from .split import StageGraph
from .weights import WeightExpr

__all__ = ["lower_stage"]


def lower_stage(
    stage: StageGraph, dialect: Dialect, precision: Precision, *, tied: bool
) -> dict[str, WeightExpr]:
    """Lowers its graph in place; returns what its new initialisers hold.

    Raises:
        LoweringError: the graph is not what the dialect expects.
    """
    graph = stage.model.graph
    if stage.kind == "embed":
        weights = dialect.lower_embedding(graph, precision, tied=tied)
    elif stage.kind == "probe":
        weights = dialect.lower_probe(graph, precision)
    elif stage.kind == "candidates":
        weights = dialect.lower_candidates(graph, precision)
    elif stage.kind == "positions":
        weights = {}
    elif stage.kind == "kv_fill" and dialect.kv_fill is not None:
        weights = dialect.kv_fill.lower(graph, precision)
    else:
        weights = dialect.lower_layers(graph, precision)
        dialect.check_layers(graph, stage.last_layer - stage.first_layer + 1, precision)
    graph.opset_imports[""], stage.model.ir_version = dialect.opset, dialect.ir_version
    return weights
