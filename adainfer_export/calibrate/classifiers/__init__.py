"""Exit classifiers behind one contract. Adding one is a module and an entry here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from . import boosting, crf, logistic, svm, threshold
from .base import ExitClassifier, FitData, score_all

__all__ = ["CLASSIFIERS", "Entry", "ExitClassifier", "FitData", "score_all"]

_STATE = ("stability", "rise")


@dataclass(frozen=True)
class Entry:
    """How a kind is fitted, and the sets of features that it is tried with.

    Attributes:
        fit: `(data, seed)` or `(data, seed, most_rows=…)` to a classifier, or None.
        most_rows_to_rank: rows that are enough to compare sets of exit points with.
    """

    fit: Callable[..., ExitClassifier | None]
    feature_sets: tuple[tuple[str, ...], ...]
    most_rows_to_rank: int


CLASSIFIERS: dict[str, Entry] = {
    "svm": Entry(
        svm.fit,
        (("top_prob", "gap", "depth"), ("top_prob", "gap", "depth", "stability")),
        2000,
    ),
    "crf": Entry(crf.fit, (("log_odds", "gap", "depth", *_STATE),), 10_000),
    "logistic": Entry(logistic.fit, (("log_odds", "gap", "depth", *_STATE),), 10_000),
    "boosting": Entry(boosting.fit, (("top_prob", "gap", "depth", *_STATE),), 10_000),
    "threshold": Entry(threshold.fit, (("top_prob",), ("top_prob", "stability")), 0),
}
