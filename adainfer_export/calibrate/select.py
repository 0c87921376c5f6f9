"""Chooses exit points and threshold: most layers saved at the wanted agreement."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from sklearn.linear_model import LogisticRegression

from .classifiers import CLASSIFIERS, ExitClassifier, FitData
from .classifiers.base import COST_OF_WRONG_EXIT
from .predictions import Predictions
from .scored import Scored, score_predictions

__all__ = ["Outcome", "choose_threshold", "evaluate", "select_classifier"]

Float64 = npt.NDArray[np.float64]

_MOST_POINTS = 3
_SHORTLIST = 8
_RANKING_FEATURES = ("log_odds", "gap", "depth", "stability", "trust")
# Savings are compared at several levels around the wanted one: a few hundred prompts say little
# about a single level.
_LEVELS = (1.0, 1.5, 2.0, 3.0)


@dataclass(frozen=True)
class Outcome:
    """A threshold on a set of prompts.

    Attributes:
        layers_saved: mean share of layers that were not executed.
        net_saved: the same minus the time of the checks, in layers.
        disagreements: prompts that exit with another answer than the full model's.
        agreement: share of prompts that got the full model's answer.
        task_agreement: the same as a mean over tasks.
    """

    threshold: float
    layers_saved: float
    net_saved: float
    disagreements: int
    agreement: float
    task_agreement: float


def evaluate(scored: Scored, threshold: float) -> Outcome:
    """Exits at the first point whose score reaches the threshold."""
    leaving, first = scored.leave(threshold)
    layers = np.where(leaving, np.array(scored.layers)[first], scored.num_layers)
    checks = np.where(leaving, first + 1, len(scored.layers))
    wrong = scored.wrong(threshold)
    saved = 1.0 - float(layers.mean()) / scored.num_layers
    # The last check of an exit is the answer's own probe, which the full model pays too.
    extra = float((checks - leaving).mean()) * scored.check_layers
    return Outcome(
        threshold,
        saved,
        saved - extra / scored.num_layers,
        int(wrong.sum()),
        1.0 - float(wrong.mean()),
        1.0 - float(wrong @ scored.task_weights()),
    )


def choose_threshold(
    scored: Scored,
    target_agreement: float,
    *,
    steps: int = 1000,
) -> Outcome:
    """The lowest threshold before agreement first falls below the target, from the top down.

    With n prompts of which d disagree, a threshold holds if (d + 1) / (n + 1) ≤ 1 − target:
    conformal risk control (arXiv 2208.02814), by which the expected disagreement on new prompts of
    the same kind stays within the target. The mean over tasks must reach the target too, so that
    large tasks do not pay for small ones. Where nothing may exit, the threshold is infinite.
    """
    candidates = np.unique(scored.scores)[::-1]
    if len(candidates) > steps:
        candidates = candidates[np.linspace(0, len(candidates) - 1, steps).astype(int)]
    best = evaluate(scored, math.inf)
    prompts = len(scored.scores)
    for threshold in candidates:
        outcome = evaluate(scored, float(threshold))
        if (outcome.disagreements + 1) / (prompts + 1) > 1.0 - target_agreement:
            break
        if outcome.task_agreement < target_agreement:
            break
        best = outcome
    return best


def select_classifier(
    fit: Predictions,
    selection: Predictions,
    target_agreement: float,
    seed: int,
    kinds: Sequence[str] = ("svm",),
) -> ExitClassifier | None:
    """The classifier that saves most on the selection part, net of checks.

    All sets of up to three exit points are ranked with a logistic regression; the best of them
    are tried with every kind and its sets of features. None where nothing saves anything.
    """
    ranked = sorted(
        _subsets(fit.layers),
        key=lambda layers: -_logistic_value(fit, selection, layers, target_agreement),
    )
    best: ExitClassifier | None = None
    best_value = 0.0
    for layers, kind in itertools.product(ranked[:_SHORTLIST], kinds):
        entry = CLASSIFIERS[kind]
        for features in entry.feature_sets:
            if not fit.known_features.issuperset(features):
                continue
            data = FitData.of(fit, layers, features)
            classifier = entry.fit(data, seed, most_rows=entry.most_rows_to_rank)
            if classifier is None:
                continue
            value = _value(score_predictions(classifier, selection), target_agreement)
            if value > best_value:
                best, best_value = classifier, value
    if best is None:
        return None
    return CLASSIFIERS[best.kind].fit(FitData.of(fit, best.layers, best.features), seed)


def _subsets(layers: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    for count in range(1, _MOST_POINTS + 1):
        yield from itertools.combinations(layers, count)


def _logistic_value(
    fit: Predictions, selection: Predictions, layers: tuple[int, ...], target: float
) -> float:
    names = tuple(name for name in _RANKING_FEATURES if name in fit.known_features)
    data = FitData.of(fit, layers, names)
    if data.one_class:
        return 0.0
    x, y = data.rows
    model = LogisticRegression(max_iter=200, class_weight={0: COST_OF_WRONG_EXIT, 1: 1.0}).fit(x, y)
    chosen = selection.at(layers)
    features = chosen.features(names)
    scores = model.decision_function(features.reshape(-1, features.shape[-1]))
    scored = Scored(
        layers,
        chosen.num_layers,
        scores.reshape(features.shape[:2]),
        chosen.agrees,
        chosen.tasks,
        chosen.check_layers,
    )
    return _value(scored, target)


def _value(scored: Scored, target: float) -> float:
    levels = [1.0 - (1.0 - target) * factor for factor in _LEVELS]
    outcomes = [choose_threshold(scored, level, steps=100) for level in levels]
    return float(np.mean([outcome.net_saved for outcome in outcomes]))
