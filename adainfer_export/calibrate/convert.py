"""The exit graph's pieces as ONNX: adapters, and the classifier in plain operators.

The classifier's graph has the same inputs and outputs whatever its kind, less the inputs that its
outputs do not depend on (they are named in the manifest):

    token int64 [n]; top_prob, gap, depth, trust float [n]; state float [n, 3];
    logits float [n, tokens]
        →  score [n], next_state [n, 3]

`state` holds the last exit point's token plus one (0 where there was none), its top prob and its
score. skl2onnx's own conversion is kept beside it as a reference: `SVMClassifier` (ai.onnx.ml) runs
on ONNX Runtime's CPU provider only, and its second output is not `decision_function`. Both are
checked against the fitted classifier before anything is written.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from adainfer_runtime.backends.ort_cpu import open_session

from ..errors import LoweringError
from ..graph_builder import GraphBuilder, graph_input
from ..lower.graph import remove_dead_inputs
from .affine import AffineMap
from .classifiers import FittedClassifier
from .predictions import LOG_ODDS_CLIP, LOWEST_LOGIT, entropy_of, log_odds
from .trust import Trust

__all__ = ["STATE_SIZE", "check_parity", "lower_adapter", "lower_classifier"]

STATE_SIZE = 3
INPUTS = ("top_prob", "gap", "depth", "trust")
_MARGIN = 1e-3  # of the scores' range: what float32 may lose of them
_POINTS = 4000
_TOKENS = 8  # of made-up predictions

Float32 = npt.NDArray[np.float32]


def lower_classifier(classifier: FittedClassifier) -> ir.Model:
    """The decision in plain operators, with the inputs that it depends on."""
    inputs = {name: graph_input(name, ["n"]) for name in INPUTS}
    token = graph_input("token", ["n"], ir.DataType.INT64)
    state = graph_input("state", ["n", STATE_SIZE])
    logits = graph_input("logits", ["n", "tokens"])
    graph = GraphBuilder()
    columns = {name: graph.column(value) for name, value in inputs.items()}
    number = graph.op("Add", graph.cast(graph.column(token)), graph.number(1.0))
    last = [graph.op("Gather", state, graph.ints([index]), axis=1) for index in range(STATE_SIZE)]
    first = graph.op("Equal", last[0], graph.number(0.0))
    columns["stability"] = graph.cast(graph.op("Equal", number, last[0]))
    columns["log_odds"] = _log_odds(graph, columns["top_prob"])
    rise = graph.op("Sub", columns["log_odds"], _log_odds(graph, last[1]))
    columns["rise"] = graph.op("Mul", rise, graph.cast(graph.op("Not", first)))
    columns["entropy"] = _entropy(graph, logits)
    x = graph.op("Concat", *(columns[name] for name in classifier.features), axis=-1)
    score = classifier.lower(graph, x, last[2], first)
    next_state = graph.op("Concat", number, columns["top_prob"], score, axis=-1)
    outputs = [
        graph.output(graph.row(score), "score", ["n"]),
        graph.output(next_state, "next_state", ["n", STATE_SIZE]),
    ]
    model = graph.model("classifier", [token, *inputs.values(), state, logits], outputs)
    remove_dead_inputs(model.graph)
    return model


def lower_adapter(adapter: AffineMap, trust: Trust) -> ir.Model:
    """`hidden [1, tokens, hidden_size]` to `adapted` of the same shape and `trust [1, tokens]`."""
    width = len(adapter.bias)
    hidden = graph_input("hidden", [1, "tokens", width])
    graph = GraphBuilder()
    product = graph.op("MatMul", hidden, graph.half("matrix", adapter.matrix))
    if adapter.up is not None:
        product = graph.op("MatMul", product, graph.half("up", adapter.up))
    adapted = graph.op("Add", product, graph.const("bias", adapter.bias))
    read = graph.op("MatMul", hidden, graph.const("trust_weight", trust.weight[:, None]))
    read = graph.op("Add", read, graph.const("trust_bias", [trust.bias]))
    outputs = [
        graph.output(adapted, "adapted", [1, "tokens", width]),
        graph.output(graph.row(read), "trust", [1, "tokens"]),
    ]
    return graph.model("adapter", [hidden], outputs)


def check_parity(
    classifier: FittedClassifier, lowered: Path, reference: Path | None, points: int = _POINTS
) -> float:
    """Compares both graphs with the fitted classifier on random points, on a grid as well.

    Returns:
        largest difference of the lowered score.

    Raises:
        LoweringError: a label differs outside the margin, or a score by more than it.
    """
    sample = _Sample.random(classifier, points)
    expected = classifier.decide(sample.x.astype(np.float64), sample.previous)
    session = open_session(lowered)
    feed = {value.name: sample.feed[value.name] for value in session.get_inputs()}
    scores: Float32 = session.run(["score"], feed)[0]
    difference = float(np.abs(scores - expected).max())
    margin = _MARGIN * max(1.0, float(np.abs(expected).max()))
    if not difference <= margin:
        raise LoweringError(
            f"the lowered {classifier.kind} differs from the fitted one by {difference:.2g}, "
            f"allowed {margin:.2g}"
        )
    if reference is not None:
        labels = open_session(reference).run(None, {"features": sample.x})[0]
        clear = np.abs(expected) > margin
        wrong = int((labels[clear] != (expected[clear] > 0)).sum())
        if wrong:
            raise LoweringError(
                f"skl2onnx's {classifier.kind} differs from scikit-learn's on {wrong} of "
                f"{clear.sum()} points"
            )
    return difference


class _Sample:
    """Inputs of the lowered graph, and the features and states that they amount to."""

    def __init__(self, classifier: FittedClassifier, pairs: Float32, seed: int) -> None:
        random = np.random.default_rng(seed)
        count = len(pairs)
        first = random.random(count) < 0.3
        same = (random.random(count) < 0.5) & ~first
        before = random.random(count).astype(np.float32)
        top_prob, gap = pairs.max(axis=1), pairs.min(axis=1)
        depths = [layer / max(classifier.layers) for layer in classifier.layers]
        depth = random.choice(np.array(depths, np.float32), count)
        scores = random.normal(size=count).astype(np.float32)
        logits = (4.0 * random.normal(size=(count, _TOKENS))).astype(np.float32)
        trust = (3.0 * random.normal(size=count)).astype(np.float32)
        # The token is 0, with the number 1: a last number of 1 is the same token, 2 another.
        number = np.where(first, 0, np.where(same, 1, 2))
        self.feed = {
            "token": np.zeros(count, np.int64),
            "top_prob": top_prob,
            "gap": gap,
            "depth": depth,
            "trust": trust,
            "state": np.stack([number, before, scores], axis=1).astype(np.float32),
            "logits": logits,
        }
        table = {
            "top_prob": top_prob,
            "gap": gap,
            "depth": depth,
            "trust": trust,
            "stability": same,
            "log_odds": log_odds(top_prob),
            "entropy": entropy_of(logits),
            "rise": np.where(first, 0.0, log_odds(top_prob) - log_odds(before)),
        }
        self.x = np.stack([table[name] for name in classifier.features], axis=1).astype(np.float32)
        self.previous = np.where(first, np.nan, scores.astype(np.float64))

    @classmethod
    def random(cls, classifier: FittedClassifier, points: int, seed: int = 0) -> _Sample:
        random = np.random.default_rng(seed)
        edge = np.linspace(0, 1, 25)
        grid = np.stack(np.meshgrid(edge, edge), -1).reshape(-1, 2)
        pairs = np.concatenate([grid, random.random((points, 2))]).astype(np.float32)
        return cls(classifier, pairs, seed)


def _entropy(graph: GraphBuilder, logits: ir.Value) -> ir.Value:
    """`[n, tokens]` to `[n, 1]`, see `entropy_of`."""
    last = graph.ints([-1])
    shifted = graph.op("Sub", logits, graph.op("ReduceMax", logits, last, keepdims=1))
    shifted = graph.op("Max", shifted, graph.number(LOWEST_LOGIT))
    weights = graph.op("Exp", shifted)
    total = graph.op("ReduceSum", weights, last, keepdims=1)
    mean = graph.op("ReduceSum", graph.op("Mul", weights, shifted), last, keepdims=1)
    return graph.op("Sub", graph.op("Log", total), graph.op("Div", mean, total))


def _log_odds(graph: GraphBuilder, probability: ir.Value) -> ir.Value:
    low, high = graph.number(LOG_ODDS_CLIP), graph.number(1.0 - LOG_ODDS_CLIP)
    clipped = graph.op("Min", graph.op("Max", probability, low), high)
    rest = graph.op("Sub", graph.number(1.0), clipped)
    return graph.op("Log", graph.op("Div", clipped, rest))
