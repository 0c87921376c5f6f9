"""A plain confidence threshold, the usual baseline: nothing is fitted."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ...graph_builder import GraphBuilder
from .base import FitData, FittedClassifier

__all__ = ["ThresholdClassifier", "fit"]

Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True)
class ThresholdClassifier(FittedClassifier):
    """score(x) is the first feature; with `stability` second, only where the token stood before."""

    layers: tuple[int, ...]
    features: tuple[str, ...]
    kind: str = "threshold"

    def decide(self, x: Float64, previous: Float64) -> Float64:
        """See `FittedClassifier.decide`."""
        if len(self.features) == 1:
            return x[:, 0]
        changed = ~np.isnan(previous) & (x[:, 1] < 0.5)
        scores: Float64 = x[:, 0] - changed
        return scores

    def lower(
        self, graph: GraphBuilder, x: ir.Value, previous: ir.Value, first: ir.Value
    ) -> ir.Value:
        """See `FittedClassifier.lower`."""
        confidence = graph.op("Gather", x, graph.ints([0]), axis=1)
        if len(self.features) == 1:
            return confidence
        same = graph.op("Gather", x, graph.ints([1]), axis=1)
        changed = graph.op("Less", same, graph.number(0.5))
        changed = graph.op("And", changed, graph.op("Not", first))
        return graph.op("Sub", confidence, graph.cast(changed))


def fit(data: FitData, seed: int, *, most_rows: int = 0) -> ThresholdClassifier | None:
    """There is nothing to fit: the features are a confidence, and perhaps `stability`."""
    return ThresholdClassifier(data.layers, data.features)
