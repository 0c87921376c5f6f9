"""What the scikit-learn classifiers share: one pipeline for all exit layers, and skl2onnx."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from sklearn.pipeline import Pipeline

from .base import FittedClassifier

__all__ = ["PipelineClassifier"]

Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True)
class PipelineClassifier(FittedClassifier):
    """A fitted scikit-learn pipeline with a `decision_function`; the state is not used."""

    layers: tuple[int, ...]
    features: tuple[str, ...]
    pipeline: Pipeline

    def decide(self, x: Float64, previous: Float64) -> Float64:
        """See `FittedClassifier.decide`."""
        scores: Float64 = self.pipeline.decision_function(x)
        return scores

    def reference(self) -> bytes | None:
        """`features [n, f]` to label and what skl2onnx gives as probabilities."""
        from skl2onnx import to_onnx
        from skl2onnx.common.data_types import FloatTensorType

        initial = [("features", FloatTensorType([None, len(self.features)]))]
        options = {id(self.pipeline): {"zipmap": False}}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # skl2onnx 1.20 reads deprecated names
            model = to_onnx(self.pipeline, initial_types=initial, options=options)
        content: bytes = model.SerializeToString()
        return content
