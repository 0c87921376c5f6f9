"""Exit classifiers behind one contract. Adding one is a module and an entry here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from . import boosting, crf, logistic, svm, threshold
from .base import ExitClassifier, FitData, FittedClassifier
from .own import OwnClassifier, load_own, require_domains

__all__ = [
    "CLASSIFIERS",
    "Entry",
    "ExitClassifier",
    "FitData",
    "FittedClassifier",
    "OwnClassifier",
    "own_entry",
    "require_domains",
]

_STATE = ("stability", "rise")
_LINEAR = (
    ("log_odds", "gap", "depth", *_STATE),
    ("log_odds", "gap", "depth", *_STATE, "trust"),
    ("log_odds", "gap", "depth", *_STATE, "trust", "entropy"),
)
# Trees step where a feature crosses a limit: none that the graph computes, and rounds, itself.
_TREES = (
    ("top_prob", "gap", "depth", "stability"),
    ("top_prob", "gap", "depth", "stability", "trust"),
)


@dataclass(frozen=True)
class Entry:
    """How a kind is fitted, and the sets of features that it is tried with.

    Attributes:
        feature_sets: those with a feature that the predictions lack are left out.
        fit: `(data, seed)` or `(data, seed, most_rows=…)` to a classifier, or None.
        most_rows_to_rank: rows that are enough to compare sets of exit points with.
    """

    fit: Callable[..., ExitClassifier | None]
    feature_sets: tuple[tuple[str, ...], ...]
    most_rows_to_rank: int


CLASSIFIERS: dict[str, Entry] = {
    "svm": Entry(
        svm.fit,
        (
            ("top_prob", "gap", "depth"),  # AdaInfer's own
            ("top_prob", "gap", "depth", "stability"),
            ("top_prob", "gap", "depth", "entropy"),
            ("log_odds", "gap", "depth", *_STATE, "trust"),
            ("log_odds", "gap", "depth", *_STATE, "trust", "entropy"),
        ),
        2000,
    ),
    "crf": Entry(crf.fit, _LINEAR, 4000),
    "logistic": Entry(logistic.fit, _LINEAR, 10_000),
    "boosting": Entry(boosting.fit, _TREES, 4000),
    "threshold": Entry(threshold.fit, (("top_prob",), ("top_prob", "stability")), 0),
}


def own_entry(path: Path) -> Entry:
    """A user's own ONNX file as one more kind, `own`.

    Raises:
        CalibrationError: the file does not keep the contract.
    """
    classifier = load_own(path)
    return Entry(classifier.at, (("top_prob", "gap", "depth"),), 0)
