"""What every exit classifier is: features in, score out, and the same as ONNX."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ...graph_builder import GraphBuilder
from ..predictions import Predictions

__all__ = ["COST_OF_WRONG_EXIT", "ExitClassifier", "FitData", "FittedClassifier"]

Float64 = npt.NDArray[np.float64]

# An exit that is wrong costs an answer, one that is missed a few layers. Without this weight the
# scores do not rank the sure cases: on SmolLM2 3% of layers saved at 0.985 instead of 7%.
COST_OF_WRONG_EXIT = 10.0


@dataclass(frozen=True)
class FitData:
    """What a classifier is fitted on.

    Attributes:
        layers: exit layers, ascending.
        features: names, in the order of the last axis (see `Predictions.features`).
        x: `[prompts, layers, features]`.
        y: `[prompts, layers]`, whether the exit would be right.
    """

    layers: tuple[int, ...]
    features: tuple[str, ...]
    x: Float64
    y: npt.NDArray[np.bool_]

    @classmethod
    def of(
        cls, predictions: Predictions, layers: tuple[int, ...], features: tuple[str, ...]
    ) -> FitData:
        """The predictions at some exit layers."""
        chosen = predictions.at(layers)
        x = chosen.features(features).astype(np.float64)
        return cls(layers, features, x, chosen.agrees)

    def sample(self, most_rows: int, seed: int) -> FitData:
        """At most so many prompts and layers together; prompts stay whole."""
        most = max(1, most_rows // len(self.layers))
        if len(self.x) <= most:
            return self
        kept = np.random.default_rng(seed).choice(len(self.x), most, replace=False)
        return FitData(self.layers, self.features, self.x[kept], self.y[kept])

    @property
    def rows(self) -> tuple[Float64, npt.NDArray[np.bool_]]:
        """Prompts and layers as one axis."""
        return self.x.reshape(-1, len(self.features)), self.y.reshape(-1)

    @property
    def one_class(self) -> bool:
        """Whether there is nothing to tell apart."""
        return bool(self.y.all() or not self.y.any())


class ExitClassifier(Protocol):
    """A classifier at some exit layers. Higher scores are surer; others choose thresholds."""

    @property
    def kind(self) -> str:
        """Its name, as on the command line."""

    @property
    def layers(self) -> tuple[int, ...]:
        """Exit layers it is for, ascending."""

    @property
    def features(self) -> tuple[str, ...]:
        """Features it reads, in order."""

    def scores(self, predictions: Predictions) -> Float64:
        """`[prompts, layers]` at its exit layers, one after the other."""


class FittedClassifier(ABC):
    """One of this package's own: features in, score out, and the same as ONNX."""

    kind: str
    layers: tuple[int, ...]
    features: tuple[str, ...]

    @abstractmethod
    def decide(self, x: Float64, previous: Float64) -> Float64:
        """Scores `[n]` of features `[n, features]`.

        Args:
            previous: scores at the last exit point `[n]`; NaN at the first.
        """

    @abstractmethod
    def lower(
        self, graph: GraphBuilder, x: ir.Value, previous: ir.Value, first: ir.Value
    ) -> ir.Value:
        """The same in plain operators: x `[n, features]`, previous `[n, 1]` and the boolean
        first `[n, 1]` (previous is then without meaning) to scores `[n, 1]`.
        """

    def reference(self) -> bytes | None:
        """skl2onnx's conversion, from input `features`, where it has a converter."""
        return None

    def scores(self, predictions: Predictions) -> Float64:
        """See `ExitClassifier.scores`."""
        x = predictions.at(self.layers).features(self.features).astype(np.float64)
        scores = np.empty(x.shape[:2])
        previous = np.full(len(x), np.nan)
        for point in range(x.shape[1]):
            previous = self.decide(x[:, point], previous)
            scores[:, point] = previous
        return scores
