"""Layers saved against agreement, over all thresholds of every exit graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..engine import Engine
from ..exit_policy import ClassifierExit
from ..tasks import TaskExample

__all__ = ["Curve", "measure_curves"]

_POINTS = 200


@dataclass(frozen=True)
class Curve:
    """Means over tasks, one value per threshold, from the surest down."""

    method: str
    layers_saved: tuple[float, ...]
    agreement: tuple[float, ...]


def measure_curves(
    engine: Engine,
    examples: Sequence[TaskExample],
    *,
    on_example: Callable[[TaskExample], None] = lambda example: None,
) -> tuple[Curve, ...]:
    """Looks at every exit point of every prompt once; one curve per exit graph."""
    graphs = engine.manifest.exit_graphs
    layers = tuple(engine.manifest.exit_points)
    if not layers:
        return ()
    policies = {kind: engine.policy("adaptive", classifier=kind) for kind in graphs}
    scores: dict[str, list[tuple[float, ...]]] = {kind: [] for kind in graphs}
    agrees = []
    for example in examples:
        with engine.borrow() as session:
            session.extend(engine.tokenizer.encode(example.prompt))
            (seen,) = session.observe(layers)
        for kind, policy in policies.items():
            assert isinstance(policy, ClassifierExit)  # exit graphs have a classifier
            scores[kind].append(policy.scores(seen.evidence))
        agrees.append([seen.evidence[n].result.token == seen.full.token for n in layers])
        on_example(example)
    weights = _task_weights([example.task for example in examples])
    total = engine.manifest.model.num_layers
    curves = []
    for kind, policy in policies.items():
        columns = [layers.index(layer) for layer in policy.exit_layers]
        right = np.array(agrees)[:, columns]
        curves.append(
            _curve(kind, np.array(scores[kind]), right, policy.exit_layers, total, weights)
        )
    return tuple(curves)


def _curve(
    kind: str,
    scores: npt.NDArray[np.float64],
    agrees: npt.NDArray[np.bool_],
    exit_layers: tuple[int, ...],
    num_layers: int,
    weights: npt.NDArray[np.float64],
) -> Curve:
    thresholds = np.quantile(scores.max(axis=1), np.linspace(1.0, 0.0, _POINTS))
    saved, agreement = [0.0], [1.0]
    rows = np.arange(len(scores))
    for threshold in thresholds:
        exits = scores >= threshold
        leaving, first = exits.any(axis=1), exits.argmax(axis=1)
        depth = np.where(leaving, np.array(exit_layers)[first], num_layers)
        saved.append(float(weights @ (1.0 - depth / num_layers)))
        agreement.append(float(weights @ np.where(leaving, agrees[rows, first], True)))
    return Curve(kind, tuple(saved), tuple(agreement))


def _task_weights(tasks: Sequence[str]) -> npt.NDArray[np.float64]:
    _, index, counts = np.unique(tasks, return_inverse=True, return_counts=True)
    weights: npt.NDArray[np.float64] = 1.0 / (counts[index] * len(counts))
    return weights
