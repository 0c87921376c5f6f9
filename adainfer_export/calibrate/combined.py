"""Combined exits: answer exits and context exits of one request, by one pair of thresholds.

Which pair? An exit is worth taking while its chance of being wrong, per layer saved, stays below a
common price: among all pairs with equal risk that one saves most. Chances are read off the scores
by a logistic regression per graph (Platt) on the selection part, and the price runs from small to
large: pairs in one order, from the safest down, which a certificate tests like any threshold.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from sklearn.linear_model import LogisticRegression

from adainfer_runtime.exit_policy import path_places

from .scored import Scored

__all__ = ["COMBINED", "combine", "fit_path", "path_grid"]

Float64 = npt.NDArray[np.float64]
Path = Sequence[tuple[float, float]]

COMBINED = "combined"
_PRICES = 200
_CHEAPEST, _DEAREST = 1e-3, 10.0  # chance of being wrong per model saved


def fit_path(answer: Scored, context: Scored) -> tuple[tuple[float, float], ...]:
    """Pairs of thresholds, from the safest down; both fall along it."""
    prices = np.geomspace(_CHEAPEST, _DEAREST, _PRICES)
    columns = [_thresholds(scored, prices).tolist() for scored in (answer, context)]
    return tuple(zip(*columns, strict=True))


def path_grid(path: Path) -> Float64:
    """The path's places as thresholds: 0, -1, -2 …"""
    return -np.arange(len(path), dtype=np.float64)


def combine(answer: Scored, context: Scored, path: Path) -> Scored:
    """Both graphs on the prompts that both saw, in the order of their checks.

    The score of a check is minus the first place of the path at which it is accepted.
    """
    common = np.intersect1d(answer.numbers, context.numbers)
    parts = [scored.rows(np.isin(scored.numbers, common)) for scored in (answer, context)]
    places = [
        path_places(part.scores, [pair[index] for pair in path]) for index, part in enumerate(parts)
    ]
    layers = np.concatenate([part.layers for part in parts]).astype(np.int64)
    order = np.argsort(layers, kind="stable")  # at the same layer the answer exit comes first
    checks = np.concatenate([part.check_layers for part in parts])[order]
    exits = np.concatenate([part.exit_check_layers for part in parts])[order]
    return Scored(
        tuple(layers[order].tolist()),
        answer.num_layers,
        np.concatenate(places, axis=1)[:, order],
        np.concatenate([part.agrees for part in parts], axis=1)[:, order],
        parts[0].tasks,
        tuple(checks.tolist()),
        tuple(exits.tolist()),
        common,
        parts[0].lengths,
    )


def _thresholds(scored: Scored, prices: Float64) -> Float64:
    """Per price the score at which the chance of a wrong exit is the price times what it saves."""
    saves = 1.0 - float(np.mean(scored.layers)) / scored.num_layers
    scores, agrees = scored.scores.ravel(), scored.agrees.ravel()
    low, high = float(scores.min()), float(scores.max())
    spread = float(scores.std()) or 1.0
    # One wrong exit at the safest score and one right at the least: both classes are there, and
    # few prompts do not make the regression certain.
    x = np.append(scores, [high, low])[:, None] / spread
    y = np.append(agrees, [False, True])
    fitted = LogisticRegression(C=100.0).fit(x, y)
    slope, offset = float(fitted.coef_[0, 0]) / spread, float(fitted.intercept_[0])
    never = high + spread
    if slope <= 0.0:  # scores that know nothing
        return np.full(len(prices), never)
    allowed = np.minimum(prices * saves, 1.0 - 1e-6)
    thresholds = (np.log((1.0 - allowed) / allowed) - offset) / slope
    falling: Float64 = np.clip(thresholds, low - spread, never)
    return falling
