"""Gradient-boosted trees: scikit-learn's exact ones, for skl2onnx converts no histogram ones."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from sklearn.ensemble import GradientBoostingClassifier
from sklearn.pipeline import make_pipeline

from ...graph_builder import GraphBuilder
from .base import FitData
from .sklearn_form import PipelineClassifier

__all__ = ["BoostingClassifier", "fit"]

_TREES, _DEPTH = 120, 3


@dataclass(frozen=True)
class _Leaf:
    """Conditions on the way from the root: (feature, threshold, whether x ≤ threshold)."""

    value: float
    conditions: tuple[tuple[int, float, bool], ...]


@dataclass(frozen=True)
class BoostingClassifier(PipelineClassifier):
    """score(x) = prior + rate · Σ over trees of the leaf that x falls into."""

    kind: str = "boosting"

    def lower(
        self, graph: GraphBuilder, x: ir.Value, previous: ir.Value, first: ir.Value
    ) -> ir.Value:
        """Every leaf of every tree at once: it is reached where all its conditions hold."""
        model: Any = self.pipeline.named_steps["gradientboostingclassifier"]
        leaves = [leaf for tree in model.estimators_[:, 0] for leaf in _leaves(tree.tree_)]
        depth = max(1, *(len(leaf.conditions) for leaf in leaves))
        always = (0, np.inf, True)
        table = [leaf.conditions + (always,) * (depth - len(leaf.conditions)) for leaf in leaves]
        flat = [condition for conditions in table for condition in conditions]
        values = graph.op("Gather", x, graph.index("tested", [f for f, _, _ in flat]), axis=1)
        limits = graph.const("limits", [_floor32(limit) for _, limit, _ in flat])
        below = graph.op("LessOrEqual", values, limits)
        holds = graph.cast(graph.op("Equal", below, graph.bools("wanted", [w for _, _, w in flat])))
        grouped = graph.op("Reshape", holds, graph.ints([-1, len(leaves), depth]))
        reached = graph.op("ReduceMin", grouped, graph.ints([-1]), keepdims=0)
        weight = np.array([[leaf.value * model.learning_rate] for leaf in leaves])
        total = graph.op("MatMul", reached, graph.const("leaves", weight))
        prior = float(self._prior(model))
        return graph.op("Add", total, graph.const("prior", [prior]))

    def _prior(self, model: Any) -> float:
        positive = float(np.clip(model.init_.class_prior_[1], 1e-12, 1 - 1e-12))
        return float(np.log(positive / (1 - positive)))


def fit(data: FitData, seed: int, *, most_rows: int = 40_000) -> BoostingClassifier | None:
    """None where the labels are all the same."""
    data = data.sample(most_rows, seed)
    if data.one_class:
        return None
    x, y = data.rows
    model = GradientBoostingClassifier(
        n_estimators=_TREES,
        max_depth=_DEPTH,
        subsample=0.7,
        min_samples_leaf=max(5, min(30, len(x) // 200)),
        random_state=seed,
    )
    # scikit-learn's trees compare float32 values: fit on those that the graph will see.
    pipeline = make_pipeline(model).fit(x.astype(np.float32), y.astype(np.int64))
    return BoostingClassifier(data.layers, data.features, pipeline)


def _leaves(tree: Any) -> Iterator[_Leaf]:
    def walk(node: int, conditions: tuple[tuple[int, float, bool], ...]) -> Iterator[_Leaf]:
        left, right = int(tree.children_left[node]), int(tree.children_right[node])
        if left < 0:
            yield _Leaf(float(tree.value[node, 0, 0]), conditions)
            return
        feature, limit = int(tree.feature[node]), float(tree.threshold[node])
        yield from walk(left, (*conditions, (feature, limit, True)))
        yield from walk(right, (*conditions, (feature, limit, False)))

    return walk(0, ())


def _floor32(limit: float) -> npt.NDArray[np.float32] | np.float32:
    """The largest float32 ≤ limit: x ≤ limit means the same for every float32 x."""
    rounded = np.float32(limit)
    return np.nextafter(rounded, np.float32(-np.inf)) if float(rounded) > limit else rounded
