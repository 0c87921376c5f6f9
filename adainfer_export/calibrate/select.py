"""Chooses exit points and threshold: most layers saved at the wanted agreement."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from sklearn.model_selection import GroupKFold
from threadpoolctl import threadpool_limits

from .classifiers import CLASSIFIERS, Entry, ExitClassifier, FitData
from .predictions import Predictions
from .scored import Scored, score_predictions

__all__ = ["Outcome", "choose_threshold", "evaluate", "outcome_figures", "select_classifiers"]

Float64 = npt.NDArray[np.float64]

_MOST_POINTS = 3
_SHORTLIST = 8
_RANKING = "logistic"
_FOLDS = 3
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
    wrong = scored.wrong(threshold)
    saved = 1.0 - float(layers.mean()) / scored.num_layers
    extra = float(scored.check_time(threshold).mean())
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


def select_classifiers(
    fit: Predictions,
    selection: Predictions,
    target_agreement: float,
    seed: int,
    entries: Mapping[str, Entry],
) -> dict[str, ExitClassifier]:
    """Of every kind the classifier that saves most, net of checks; those that save, best first.

    All sets of up to three exit points are ranked with a logistic regression; the best of them
    are tried with every kind and its sets of features. What a set saves is measured on prompts
    that the classifier of the trial was not fitted on: the selection part, and the classifier
    part by cross-validation. (The selection part alone leaves it to chance which set wins.)
    """
    with threadpool_limits(1):  # thousands of small fits: threads would only wait for each other
        return _select(_Trials(fit, selection, target_agreement, seed), fit, entries, seed)


def _select(
    data: _Trials, fit: Predictions, entries: Mapping[str, Entry], seed: int
) -> dict[str, ExitClassifier]:
    ranking = CLASSIFIERS[_RANKING]
    richest = next(f for f in reversed(ranking.feature_sets) if data.knows(f))
    subsets = list(_subsets(fit.layers))
    ranked = sorted(subsets, key=lambda layers: -data.saves(ranking, layers, richest))
    found: list[tuple[float, ExitClassifier]] = []
    if fit.agrees.all(axis=0).any():
        # A layer that was never wrong gives classifiers nothing to learn, and is the best exit.
        entries = {**entries, "threshold": CLASSIFIERS["threshold"]}
    for entry in entries.values():
        feature_sets = [f for f in entry.feature_sets if data.knows(f)]
        trials = {
            (layers, features): data.saves(entry, layers, features)
            for layers, features in itertools.product(ranked[:_SHORTLIST], feature_sets)
        }
        (layers, features), value = max(trials.items(), key=lambda trial: trial[1])
        if value <= 0.0:
            continue
        classifier = entry.fit(FitData.of(fit, layers, features), seed)
        if classifier is not None:
            found.append((value, classifier))
    return {
        classifier.kind: classifier for _, classifier in sorted(found, key=lambda entry: -entry[0])
    }


class _Trials:
    """Measures kinds, sets of exit points and of features, on the same folds of prompts."""

    def __init__(self, fit: Predictions, selection: Predictions, target: float, seed: int) -> None:
        self._target, self._seed = target, seed
        folds = GroupKFold(min(_FOLDS, len(set(fit.groups.tolist()))))
        own = fit.own
        self._splits = [(fit, selection)] + [
            (fit.rows(known), fit.rows(new[own[new]]))
            for known, new in folds.split(fit.groups, groups=fit.groups)
        ]

    def knows(self, features: tuple[str, ...]) -> bool:
        """Whether the predictions have these features."""
        return self._splits[0][0].known_features.issuperset(features)

    def saves(self, entry: Entry, layers: tuple[int, ...], features: tuple[str, ...]) -> float:
        """Share of layers, net of checks, at agreements around the target; 0 if nothing fits."""
        parts = []
        for known, new in self._splits:
            data = FitData.of(known, layers, features)
            classifier = entry.fit(data, self._seed, most_rows=entry.most_rows_to_rank)
            if classifier is not None:  # a fold may hold no wrong exit to learn from
                parts.append(score_predictions(classifier, new))
        return _value(Scored.concatenate(parts), self._target) if parts else 0.0


def _subsets(layers: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    for count in range(1, _MOST_POINTS + 1):
        yield from itertools.combinations(layers, count)


def _value(scored: Scored, target: float) -> float:
    levels = [1.0 - (1.0 - target) * factor for factor in _LEVELS]
    outcomes = [choose_threshold(scored, level, steps=100) for level in levels]
    return float(np.mean([outcome.net_saved for outcome in outcomes]))


def outcome_figures(outcome: Outcome) -> dict[str, float]:
    """What a manifest keeps of an outcome."""
    return {
        "layers_saved": round(outcome.layers_saved, 4),
        "net_saved": round(outcome.net_saved, 4),
        "agreement": round(outcome.agreement, 4),
        "task_agreement": round(outcome.task_agreement, 4),
    }
