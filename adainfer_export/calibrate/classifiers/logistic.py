"""Logistic regression: the plainest classifier that weighs several features."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from ...graph_builder import GraphBuilder
from .base import COST_OF_WRONG_EXIT, FitData
from .sklearn_form import PipelineClassifier

__all__ = ["LogisticClassifier", "fit"]


@dataclass(frozen=True)
class LogisticClassifier(PipelineClassifier):
    """score(x) = w · (x − mean) / scale + b."""

    kind: str = "logistic"

    def lower(
        self, graph: GraphBuilder, x: ir.Value, previous: ir.Value, first: ir.Value
    ) -> ir.Value:
        """See `FittedClassifier.lower`."""
        scaler: Any = self.pipeline.named_steps["standardscaler"]
        model: Any = self.pipeline.named_steps["logisticregression"]
        weight = model.coef_[0] / scaler.scale_
        bias = model.intercept_ - (weight * scaler.mean_).sum()
        total = graph.op("MatMul", x, graph.const("weight", weight[:, None]))
        return graph.op("Add", total, graph.const("bias", bias))


def fit(data: FitData, seed: int, *, most_rows: int = 100_000) -> LogisticClassifier | None:
    """None where the labels are all the same."""
    data = data.sample(most_rows, seed)
    if data.one_class:
        return None
    x, y = data.rows
    # Newton's method: few features, so that its few steps cost next to nothing.
    weights = {0: COST_OF_WRONG_EXIT, 1: 1.0}
    model = LogisticRegression(solver="newton-cholesky", class_weight=weights)
    pipeline = make_pipeline(StandardScaler(), model).fit(x, y.astype(np.int64))
    return LogisticClassifier(data.layers, data.features, pipeline)
