"""AdaInfer's own classifier: a support vector machine with an RBF kernel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC

from ...graph_builder import GraphBuilder
from .base import COST_OF_WRONG_EXIT, FitData
from .sklearn_form import PipelineClassifier

__all__ = ["SvmClassifier", "fit"]


@dataclass(frozen=True)
class SvmClassifier(PipelineClassifier):
    """With z = (x − mean) / scale: score(x) = Σ_i coef_i exp(−γ |z − v_i|²) + intercept."""

    kind: str = "svm"

    def lower(
        self, graph: GraphBuilder, x: ir.Value, previous: ir.Value, first: ir.Value
    ) -> ir.Value:
        """See `FittedClassifier.lower`."""
        scaler: Any = self.pipeline.named_steps["standardscaler"]
        svm: Any = self.pipeline.named_steps["svc"]
        # Differences, not |z|² + |v|² − 2 z·v: near a support vector those cancel in float32.
        vectors = np.asarray(svm.support_vectors_) * scaler.scale_ + scaler.mean_
        difference = graph.op(
            "Sub", graph.op("Unsqueeze", x, graph.ints([1])), graph.const("vectors", vectors[None])
        )
        scaled = graph.op("Div", difference, graph.const("scale", scaler.scale_))
        square = graph.op("Mul", scaled, scaled)
        distance = graph.op("ReduceSum", square, graph.ints([-1]), keepdims=0)
        exponent = graph.op("Mul", distance, graph.const("gamma", [-float(svm._gamma)]))
        coef = graph.const("coef", np.asarray(svm.dual_coef_).T)
        total = graph.op("MatMul", graph.op("Exp", exponent), coef)
        return graph.op("Add", total, graph.const("intercept", svm.intercept_))


def fit(data: FitData, seed: int, *, most_rows: int = 5000) -> SvmClassifier | None:
    """None where the labels are all the same."""
    data = data.sample(most_rows, seed)
    if data.one_class:
        return None
    x, y = data.rows
    svm = SVC(kernel="rbf", class_weight={0: COST_OF_WRONG_EXIT})
    pipeline = make_pipeline(StandardScaler(), svm).fit(x, y.astype(np.int64))
    return SvmClassifier(data.layers, data.features, pipeline)
