"""Trust: how far the hidden state itself says that an exit will agree with the full model.

One affine read-out per exit layer, a logistic regression from the hidden state to "this exit gives
the full model's answer". Top prob and gap do not know what kind of question was asked; the hidden
state does, so that one threshold serves easy and hard tasks. It costs one more row of the
adapter.

Classifiers are fitted on scores that their own prompts had no part in (cross-fitting): in-sample
ones are too sure.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold

from .predictions import Predictions
from .traces import AnswerTraces

__all__ = ["Trust", "cross_fit", "fit_trust", "with_trust"]

Float32 = npt.NDArray[np.float32]

_STRENGTH = 0.003  # inverse of the L2 penalty on standardised coordinates
_COST_OF_WRONG = 3.0
_FOLDS = 5


@dataclass(frozen=True)
class Trust:
    """`trust = hidden @ weight + bias`; weight `[hidden]`."""

    weight: Float32
    bias: float

    def apply(self, hidden: Float32) -> Float32:
        """`[rows, hidden]` to `[rows]`."""
        trust: Float32 = hidden @ self.weight + np.float32(self.bias)
        return trust


def fit_trust(traces: AnswerTraces, predictions: Predictions) -> dict[int, Trust]:
    """One read-out per candidate layer."""
    return {
        layer: _fit(traces.hidden[:, column], predictions.agrees[:, column])
        for column, layer in enumerate(traces.layers)
    }


def cross_fit(traces: AnswerTraces, predictions: Predictions) -> Predictions:
    """The predictions with trusts that were fitted without their own prompts."""
    trust = np.zeros(predictions.token.shape, np.float32)
    folds = GroupKFold(min(_FOLDS, len(set(traces.prompts.tolist()))))
    for known, new in folds.split(traces.prompts, groups=traces.prompts):
        for column in range(len(traces.layers)):
            fitted = _fit(traces.hidden[known, column], predictions.agrees[known, column])
            trust[new, column] = fitted.apply(traces.hidden[new, column])
    return predictions.with_trust(trust)


def with_trust(
    traces: AnswerTraces, predictions: Predictions, trusts: Mapping[int, Trust]
) -> Predictions:
    """Predictions of other prompts with the read-outs applied."""
    columns = [trusts[layer].apply(traces.hidden[:, i]) for i, layer in enumerate(traces.layers)]
    return predictions.with_trust(np.stack(columns, axis=1))


def _fit(hidden: Float32, agrees: npt.NDArray[np.bool_]) -> Trust:
    width = hidden.shape[1]
    if agrees.all() or not agrees.any():
        return Trust(np.zeros(width, np.float32), 0.0)
    mean, scale = hidden.mean(axis=0), hidden.std(axis=0) + 1e-6
    model = LogisticRegression(C=_STRENGTH, max_iter=200, class_weight={0: _COST_OF_WRONG, 1: 1.0})
    model.fit((hidden - mean) / scale, agrees)
    weight = model.coef_[0] / scale
    bias = float(model.intercept_[0] - weight @ mean)
    return Trust(weight.astype(np.float32), bias)
