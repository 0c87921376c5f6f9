"""A user's own classifier: an ONNX file that keeps the exit graph's contract.

Inputs (n answers at once): `token` int64 `[n]`, `top_prob`, `gap`, `depth`, `trust` float `[n]`,
`state` float `[n, s]` (zeros at the first exit point). Outputs: `score` float `[n]`, higher is
surer, and `next_state` float `[n, s]`. Inputs that these do not depend on are left out of the
folder's copy. Standard operators, or those of `ai.onnx.ml` for targets
that run them (`Target.classifier_domains`). The file is run on a few answers before any work. Exit
points, threshold and certificate are found as for any other classifier.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir

from adainfer_runtime.backends.ort_cpu import open_session
from adainfer_runtime.errors import StageError, one_line

from ...errors import CalibrationError
from ...lower.targets import TARGETS
from ..predictions import Predictions
from .base import FitData

__all__ = ["OwnClassifier", "load_own", "require_domains"]

Float64 = npt.NDArray[np.float64]

_INPUTS = {
    "token": ("tensor(int64)", 1),
    **dict.fromkeys(("top_prob", "gap", "depth", "trust"), ("tensor(float)", 1)),
    "state": ("tensor(float)", 2),
}
_OUTPUTS = {"score": ("tensor(float)", 1), "next_state": ("tensor(float)", 2)}
_FEATURES = ("top_prob", "gap", "depth", "trust")
_STANDARD = ("", "ai.onnx")
_TRIAL_ROWS = (1, 3)


@dataclass(frozen=True)
class OwnClassifier:
    """The file's content and a session of it, at some exit layers."""

    layers: tuple[int, ...]
    content: bytes
    session: Any
    state_size: int
    features: tuple[str, ...] = _FEATURES
    kind: str = "own"

    def at(self, data: FitData, seed: int, *, most_rows: int = 0) -> OwnClassifier:
        """The same at other exit layers; nothing is fitted."""
        return OwnClassifier(data.layers, self.content, self.session, self.state_size)

    def scores(self, predictions: Predictions) -> Float64:
        """See `ExitClassifier.scores`."""
        chosen = predictions.at(self.layers)
        count = len(chosen.final)
        state = np.zeros((count, self.state_size), np.float32)
        scores = np.empty((count, len(self.layers)))
        for point, layer in enumerate(self.layers):
            trust = chosen.trust[:, point] if chosen.trust is not None else np.zeros(count)
            feed = {
                "token": chosen.token[:, point],
                "top_prob": chosen.top_prob[:, point],
                "gap": chosen.gap[:, point],
                "depth": np.full(count, layer / chosen.num_layers, np.float32),
                "trust": trust.astype(np.float32),
                "state": state,
            }
            scores[:, point], state = self.session.run(["score", "next_state"], feed)
        return scores


def load_own(path: Path) -> OwnClassifier:
    """Reads and checks the file.

    Raises:
        CalibrationError: it cannot be read, or does not keep the contract.
    """
    try:
        content = path.read_bytes()
        session = open_session(path)
    except (OSError, StageError) as error:
        raise CalibrationError(f"{path} cannot be used as a classifier: {error}") from error
    _check(path, "input", session.get_inputs(), _INPUTS)
    _check(path, "output", session.get_outputs(), _OUTPUTS)
    (state,) = [value for value in session.get_inputs() if value.name == "state"]
    if not isinstance(state.shape[1], int):
        raise CalibrationError(f"{path}: input state must have a fixed second dimension")
    _try_out(path, session, state.shape[1])
    return OwnClassifier((), content, session, state.shape[1])


def require_domains(path: Path, target: str) -> None:
    """Whether a target runs the file's operators.

    Raises:
        CalibrationError: it has operators of a domain that the target does not run.
    """
    (record,) = (entry for entry in TARGETS if entry.name == target)
    model = ir.from_proto(onnx.load_model_from_string(path.read_bytes()))
    graphs = (model.graph, *(function.graph for function in model.functions.values()))
    own = {function.domain for function in model.functions.values()}
    allowed = {*_STANDARD, *record.classifier_domains, *own}
    foreign = sorted(
        {
            f"{node.domain}.{node.op_type}"
            for graph in graphs
            for node in graph.all_nodes()
            if node.domain not in allowed
        }
    )
    if foreign:
        also = "".join(f" and those of {domain}" for domain in record.classifier_domains)
        raise CalibrationError(
            f"{path}: target {target} runs standard operators{also}; found {', '.join(foreign)}"
        )


def _try_out(path: Path, session: Any, state_size: int) -> None:
    """Two exit points one behind the other, for one answer and for several."""
    for rows in _TRIAL_ROWS:
        top_prob = np.linspace(0.9, 0.3, rows, dtype=np.float32)
        feed = {
            "token": np.arange(5, 5 + rows),
            "top_prob": top_prob,
            "gap": top_prob / 2,
            "trust": np.linspace(-1.0, 1.0, rows, dtype=np.float32),
        }
        expected = {"score": (rows,), "next_state": (rows, state_size)}
        state = np.zeros((rows, state_size), np.float32)
        for depth in (0.5, 0.75):
            point = {"depth": np.full(rows, depth, np.float32), "state": state}
            try:
                found = session.run(list(expected), feed | point)
            except Exception as error:  # ONNX Runtime's errors have no class of their own
                raise CalibrationError(
                    f"{path} does not run on n = {rows}: {one_line(error)}"
                ) from error
            for (name, shape), value in zip(expected.items(), found, strict=True):
                if value.shape != shape:
                    raise CalibrationError(
                        f"{path}: output {name} must have shape {list(shape)} for n = {rows}, "
                        f"found {list(value.shape)}"
                    )
                if not np.isfinite(value).all():
                    wrong = value[~np.isfinite(value)][0]
                    raise CalibrationError(
                        f"{path}: output {name} must be finite, found {wrong} for n = {rows}"
                    )
            state = found[1]


def _check(path: Path, what: str, found: Any, expected: dict[str, tuple[str, int]]) -> None:
    values = {value.name: (value.type, len(value.shape)) for value in found}
    if values != expected:
        wanted = ", ".join(f"{name} {kind} rank {rank}" for name, (kind, rank) in expected.items())
        seen = ", ".join(f"{name} {kind} rank {rank}" for name, (kind, rank) in values.items())
        raise CalibrationError(f"{path}: {what}s must be {wanted}; found {seen}")
