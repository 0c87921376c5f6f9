"""The fitted classifier as ONNX: skl2onnx's form for reference, plain operators to run.

`SVMClassifier` (ai.onnx.ml) runs on ONNX Runtime's CPU provider only, and the second output that
skl2onnx gives it is not `decision_function`. The lowered graph computes that score from

    token int64 [n], top_prob, gap, depth float [n], state float [n, 1]  →  score [n], next_state

with operators that every target has. `state` holds the last exit point's token plus one, 0 at the
first. Both forms are checked against scikit-learn before anything is written.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx_ir.tape import Tape

from adainfer_runtime.backends.ort_cpu import open_session

from ..errors import LoweringError
from .classifier import ExitClassifier, RbfForm
from .ridge import Adapter

__all__ = ["STATE_SIZE", "check_parity", "lower_adapter", "lower_classifier", "reference_graph"]

STATE_SIZE = 1
_OPSET, _IR_VERSION = 24, 11
_MARGIN = 1e-3  # of the scores' range: what float32 may lose of them
_POINTS = 4000


def lower_classifier(classifier: ExitClassifier) -> ir.Model:
    """The decision in plain operators."""
    form = classifier.rbf_form()
    inputs = {name: _input(name, ir.DataType.FLOAT, ["n"]) for name in ("top_prob", "gap", "depth")}
    token = _input("token", ir.DataType.INT64, ["n"])
    state = _input("state", ir.DataType.FLOAT, ["n", STATE_SIZE])
    tape = Tape()
    number = tape.op("Add", [_cast(tape, token), _const(tape, "one", [1.0])])
    column = tape.op("Unsqueeze", [number, _axes(tape, "last", [-1])])
    same = tape.op("Equal", [column, state])
    columns = {
        name: tape.op("Unsqueeze", [v, _axes(tape, "last", [-1])]) for name, v in inputs.items()
    }
    columns["stability"] = _cast(tape, same)
    features = tape.op(
        "Concat", [columns[name] for name in classifier.features], attributes={"axis": -1}
    )
    score = _rbf(tape, features, form)
    score.name, score.type, score.shape = "score", ir.TensorType(ir.DataType.FLOAT), _shape(["n"])
    next_state = tape.op("Identity", [column])
    next_state.name, next_state.type = "next_state", ir.TensorType(ir.DataType.FLOAT)
    next_state.shape = _shape(["n", STATE_SIZE])
    return _model("classifier", [token, *inputs.values(), state], [score, next_state], tape)


def lower_adapter(adapter: Adapter) -> ir.Model:
    """`hidden [1, tokens, hidden_size]` to `adapted` of the same shape."""
    width = len(adapter.bias)
    hidden = _input("hidden", ir.DataType.FLOAT, [1, "tokens", width])
    tape = Tape()
    product = tape.op("MatMul", [hidden, _const(tape, "matrix", adapter.matrix)])
    adapted = tape.op("Add", [product, _const(tape, "bias", adapter.bias)])
    adapted.name, adapted.type = "adapted", ir.TensorType(ir.DataType.FLOAT)
    adapted.shape = _shape([1, "tokens", width])
    return _model("adapter", [hidden], [adapted], tape)


def reference_graph(classifier: ExitClassifier) -> bytes:
    """skl2onnx's conversion: `features [n, f]` to label and probabilities-like scores."""
    from skl2onnx import to_onnx
    from skl2onnx.common.data_types import FloatTensorType

    initial = [("features", FloatTensorType([None, len(classifier.features)]))]
    options = {id(classifier.pipeline): {"zipmap": False}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # skl2onnx 1.20 reads deprecated names
        model = to_onnx(classifier.pipeline, initial_types=initial, options=options)
    content: bytes = model.SerializeToString()
    return content


def check_parity(
    classifier: ExitClassifier, lowered: Path, reference: Path, seed: int = 0
) -> float:
    """Compares both graphs with scikit-learn on a grid and on random points.

    Returns:
        largest difference of the lowered score from `decision_function`.

    Raises:
        LoweringError: a label differs outside the margin, or a score by more than it.
    """
    points = _points(classifier, seed)
    expected = classifier.pipeline.decision_function(points)
    scores = _run_lowered(classifier, lowered, points)
    difference = float(np.abs(scores - expected).max())
    margin = _MARGIN * max(1.0, float(np.abs(expected).max()))
    if not difference <= margin:
        raise LoweringError(
            f"the lowered classifier differs from scikit-learn by {difference:.2g}, "
            f"allowed {margin:.2g}"
        )
    session = open_session(reference)
    labels = session.run(None, {"features": points})[0]
    clear = np.abs(expected) > margin
    wrong = int((labels[clear] != (expected[clear] > 0)).sum())
    if wrong:
        raise LoweringError(
            f"skl2onnx's classifier differs from scikit-learn on {wrong} of {clear.sum()} points"
        )
    return difference


def _rbf(tape: Tape, features: ir.Value, form: RbfForm) -> ir.Value:
    # Differences, not |z|² + |v|² − 2 z·v: near a support vector those cancel in float32.
    vectors = form.vectors * form.scale + form.mean
    column = tape.op("Unsqueeze", [features, _axes(tape, "middle", [1])])
    difference = tape.op("Sub", [column, _const(tape, "vectors", vectors[None])])
    scaled = tape.op("Div", [difference, _const(tape, "scale", form.scale)])
    square = tape.op("Mul", [scaled, scaled])
    distance = tape.op("ReduceSum", [square, _axes(tape, "last", [-1])], attributes={"keepdims": 0})
    kernel = tape.op("Exp", [tape.op("Mul", [distance, _const(tape, "gamma", [-form.gamma])])])
    total = tape.op("MatMul", [kernel, _const(tape, "coef", form.coef)])
    return tape.op("Add", [total, _const(tape, "intercept", [form.intercept])])


def _points(classifier: ExitClassifier, seed: int) -> npt.NDArray[np.float32]:
    random = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(np.linspace(0, 1, 25), np.linspace(0, 1, 25)), -1).reshape(-1, 2)
    pairs = np.concatenate([grid, random.random((_POINTS, 2))])
    depths = [layer / max(classifier.layers) for layer in classifier.layers]
    table = {
        "top_prob": pairs.max(axis=1),
        "gap": pairs.min(axis=1),
        "depth": random.choice(depths, len(pairs)),
        "stability": random.integers(0, 2, len(pairs)),
    }
    return np.stack([table[name] for name in classifier.features], axis=1).astype(np.float32)


def _run_lowered(
    classifier: ExitClassifier, path: Path, points: npt.NDArray[np.float32]
) -> npt.NDArray[np.float32]:
    columns = dict(zip(classifier.features, points.T, strict=True))
    zeros = np.zeros(len(points), np.float32)
    # A token of 0 has the number 1: a state of 1 is the same token, 0 is none.
    feed = {
        "token": np.zeros(len(points), np.int64),
        "state": columns.get("stability", zeros)[:, None],
        **{name: columns.get(name, zeros) for name in ("top_prob", "gap", "depth")},
    }
    session = open_session(path)
    scores: npt.NDArray[np.float32] = session.run(["score"], feed)[0]
    return scores


def _input(name: str, dtype: ir.DataType, shape: list[int | str]) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=_shape(shape))


def _shape(sizes: list[int | str]) -> ir.Shape:
    return ir.Shape(sizes)


def _cast(tape: Tape, value: ir.Value) -> ir.Value:
    return tape.op("Cast", [value], attributes={"to": ir.DataType.FLOAT.value})


def _const(tape: Tape, name: str, values: npt.ArrayLike) -> ir.Value:
    return tape.initializer(ir.tensor(np.asarray(values, np.float32), name=name), name=name)


def _axes(tape: Tape, name: str, axes: list[int]) -> ir.Value:
    existing = {value.name: value for value in tape.initializers}
    key = f"axes_{name}"
    return existing.get(key) or tape.initializer(
        ir.tensor(np.array(axes, np.int64), name=key), name=key
    )


def _model(name: str, inputs: list[ir.Value], outputs: list[ir.Value], tape: Tape) -> ir.Model:
    graph = ir.Graph(
        inputs,
        outputs,
        nodes=tape.nodes,
        initializers=tape.initializers,
        opset_imports={"": _OPSET},
        name=name,
    )
    return ir.Model(graph, ir_version=_IR_VERSION, producer_name="adainfer-export")
