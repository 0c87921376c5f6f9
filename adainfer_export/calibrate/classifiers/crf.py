"""AdaInfer's second classifier: a linear-chain conditional random field over the exit points.

Fitted with CRFsuite on whole chains; at run time only the points so far are known, so that the
score is the filtered log-odds of "right" given those. With emissions e(y) = w_y · x and
transitions T[y', y], and m the log-odds of the last point,

    score = e(1) − e(0) + log(exp(m + T[1,1]) + exp(T[0,1])) − log(exp(m + T[1,0]) + exp(T[0,0])),

and score = e(1) − e(0) at the first point.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ...graph_builder import GraphBuilder
from .base import FitData, FittedClassifier

__all__ = ["CrfClassifier", "fit"]

Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True)
class CrfClassifier(FittedClassifier):
    """`weight [features]` and `bias` give e(1) − e(0); `transitions [2, 2]` is T[from, to]."""

    layers: tuple[int, ...]
    features: tuple[str, ...]
    weight: Float64
    bias: float
    transitions: Float64
    kind: str = "crf"

    def decide(self, x: Float64, previous: Float64) -> Float64:
        """See `FittedClassifier.decide`."""
        emission = x @ self.weight + self.bias
        t, first = self.transitions, np.isnan(previous)
        last = np.where(first, 0.0, previous)
        carried = np.logaddexp(last + t[1, 1], t[0, 1]) - np.logaddexp(last + t[1, 0], t[0, 0])
        scores: Float64 = emission + np.where(first, 0.0, carried)
        return scores

    def lower(
        self, graph: GraphBuilder, x: ir.Value, previous: ir.Value, first: ir.Value
    ) -> ir.Value:
        """See `FittedClassifier.lower`. Softplus keeps the sums from overflowing."""
        product = graph.op("MatMul", x, graph.const("weight", self.weight[:, None]))
        emission = graph.op("Add", product, graph.const("bias", [self.bias]))
        t = self.transitions
        # log(exp(m + a) + exp(b)) = b + softplus(m + a − b)
        to_right = graph.op("Add", previous, graph.const("right", [t[1, 1] - t[0, 1]]))
        to_wrong = graph.op("Add", previous, graph.const("wrong", [t[1, 0] - t[0, 0]]))
        difference = graph.op("Sub", _softplus(graph, to_right), _softplus(graph, to_wrong))
        carried = graph.op("Add", difference, graph.const("start", [t[0, 1] - t[0, 0]]))
        nothing = graph.op("Mul", emission, graph.number(0.0))
        return graph.op("Add", emission, graph.op("Where", first, nothing, carried))


def fit(data: FitData, seed: int, *, most_rows: int = 100_000) -> CrfClassifier | None:
    """None where the labels are all the same."""
    import pycrfsuite

    data = data.sample(most_rows, seed)
    if data.one_class:
        return None
    mean, scale = data.rows[0].mean(axis=0), data.rows[0].std(axis=0) + 1e-6
    names = [str(index) for index in range(len(data.features))]
    trainer = pycrfsuite.Trainer(algorithm="lbfgs", verbose=False)
    trainer.set_params({"c2": 0.1, "max_iterations": 200, "feature.possible_transitions": True})
    for chain, labels in zip((data.x - mean) / scale, data.y, strict=True):
        items = [{"bias": 1.0, **dict(zip(names, point, strict=True))} for point in chain.tolist()]
        trainer.append(pycrfsuite.ItemSequence(items), ["01"[int(label)] for label in labels])
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "crf")
        trainer.train(path)
        tagger = pycrfsuite.Tagger()
        tagger.open(path)
        info = tagger.info()
        tagger.close()
    emission = info.state_features
    standard = np.array([_difference(emission, name) for name in names])
    weight = standard / scale
    bias = _difference(emission, "bias") - float(weight @ mean)
    transitions = np.array([[info.transitions.get((a, b), 0.0) for b in "01"] for a in "01"])
    return CrfClassifier(data.layers, data.features, weight, bias, transitions)


def _difference(emission: dict[tuple[str, str], float], name: str) -> float:
    return float(emission.get((name, "1"), 0.0) - emission.get((name, "0"), 0.0))


def _softplus(graph: GraphBuilder, value: ir.Value) -> ir.Value:
    # max(v, 0) + log(1 + exp(−|v|)): ONNX Runtime's Softplus is fine, others' overflow.
    tail = graph.op("Exp", graph.op("Neg", graph.op("Abs", value)))
    log = graph.op("Log", graph.op("Add", tail, graph.number(1.0)))
    return graph.op("Add", graph.op("Relu", value), log)
