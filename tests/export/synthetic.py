"""Predictions made up for tests of classifiers, thresholds and certificates."""

from __future__ import annotations

import numpy as np

from adainfer_export.calibrate.classifiers import CLASSIFIERS, ExitClassifier, FitData
from adainfer_export.calibrate.predictions import Predictions


def synthetic(
    prompts: int = 600,
    seed: int = 0,
    noise: float = 0.0,
    layers: tuple[int, ...] = (4, 6, 8),
    num_layers: int = 10,
) -> Predictions:
    """Predictions in which confidence tells whether a layer agrees, the more the deeper."""
    random = np.random.default_rng(seed)
    ease = random.random((prompts, 1))
    probability = np.clip(ease + np.array([0.0, 0.15, 0.3]), 0.01, 0.99)
    agrees = probability > 0.75
    agrees ^= random.random(agrees.shape) < noise
    final = random.integers(0, 50, prompts)
    token = np.where(agrees, final[:, None], 99)
    return Predictions(
        layers,
        num_layers,
        ("a",) * prompts,
        final,
        token,
        probability.astype(np.float32),
        (probability * 0.9).astype(np.float32),
        (0.1, 0.1, 0.1),
        (0.0, 0.0, 0.0),
        (agrees + random.normal(size=agrees.shape)).astype(np.float32),
        entropy=(2.0 * (1.0 - probability)).astype(np.float32),
    )


def fit_classifier(
    kind: str,
    predictions: Predictions,
    layers: tuple[int, ...] = (4, 6, 8),
    features: tuple[str, ...] | None = None,
) -> ExitClassifier:
    """A classifier of a kind, with its richest features unless others are given."""
    entry = CLASSIFIERS[kind]
    data = FitData.of(predictions, layers, features or entry.feature_sets[-1])
    classifier = entry.fit(data, 0)
    assert classifier is not None
    return classifier
