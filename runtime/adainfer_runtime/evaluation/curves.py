"""Layers saved against agreement, over all thresholds of every exit graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..backends import ExitEvidence
from ..engine import Engine
from ..exit_policy import ClassifierExit, ExitCheck, path_places
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
    """Takes every check of every prompt once; one curve per exit graph, and of answer and context
    exits together: `combined` by the folder's pairs of thresholds; where calibration found none
    that gained, `both`, by thresholds at the same place in either graph's grid.

    With context exits, prompts of one token are left out: they have no context. There is a further
    curve then, `propagated`: the same exits over K and V that the layers' own weights make of the
    context's hidden states (CALM, arXiv 2207.07061), not the translators.
    """
    manifest = engine.manifest
    policies = {kind: engine.policy("adaptive", classifier=kind) for kind in manifest.exit_graphs}
    if manifest.context_exit is not None:
        policies["context"] = engine.policy("context")
    graphs = {n: p for n, p in policies.items() if isinstance(p, ClassifierExit)}
    if not graphs:
        return ()
    checks = {check for policy in graphs.values() for check in policy.checks}
    propagated = graphs.get("context") if manifest.kv_fills else None
    if propagated is not None:
        graphs["propagated"] = propagated
    scores: dict[str, list[tuple[float, ...]]] = {name: [] for name in graphs}
    agrees: dict[str, list[list[bool]]] = {name: [] for name in graphs}
    tasks = []
    for example in examples:
        on_example(example)
        ids = engine.tokenizer.encode(example.prompt)
        if "context" in graphs and len(ids) < 2:
            continue
        tasks.append(example.task)
        with engine.borrow() as session:
            session.extend(ids)
            (seen,) = session.observe(checks)
        over_propagated = _propagated(engine, ids, propagated) if propagated is not None else {}
        for name, policy in graphs.items():
            evidence = over_propagated if name == "propagated" else seen.evidence
            scores[name].append(policy.scores(evidence))
            tokens = [evidence[check].result.token for check in policy.checks]
            agrees[name].append([token == seen.full.token for token in tokens])
    weights, total = _task_weights(tasks), manifest.model.num_layers
    looks = {
        name: _Looks(graphs[name].exit_layers, np.array(scores[name]), np.array(agrees[name]))
        for name in graphs
    }
    if (combined := manifest.combined_exit) is not None:
        looks["combined"] = _combine(looks[combined.answer], looks["context"], combined.path)
    elif manifest.exit_graphs and manifest.context_exit is not None:
        kind, answer = next(iter(manifest.exit_graphs.items()))
        path = _equal_places(answer.thresholds, manifest.context_exit.thresholds)
        looks["both"] = _combine(looks[kind], looks["context"], path)
    return tuple(_curve(name, seen, total, weights) for name, seen in looks.items())


def _propagated(
    engine: Engine, ids: Sequence[int], policy: ClassifierExit
) -> dict[ExitCheck, ExitEvidence]:
    evidence = {}
    with engine.borrow() as session:
        session.extend(ids)
        for check in policy.checks:
            (hidden,) = session.answers_over_context(check.layer, (len(ids) - 1,), "propagate")
            evidence[check] = ExitEvidence(engine.backend.probe(hidden), trust=0.0)
    return evidence


@dataclass(frozen=True)
class _Looks:
    """Exit layer per check; scores and agreement with the full model `[prompts, checks]`."""

    exit_layers: tuple[int, ...]
    scores: npt.NDArray[np.float64]
    agrees: npt.NDArray[np.bool_]


def _equal_places(*grids: Sequence[float]) -> list[tuple[float, float]]:
    """Pairs of thresholds as far down either grid, whose steps are held-out scores' quantiles."""
    count = min(map(len, grids))
    places = [np.linspace(0, len(grid) - 1, count).astype(int) for grid in grids]
    return [(grids[0][a], grids[1][c]) for a, c in zip(*places, strict=True)]


def _combine(answer: _Looks, context: _Looks, path: Sequence[tuple[float, float]]) -> _Looks:
    layers = np.array([*answer.exit_layers, *context.exit_layers])
    order = np.argsort(layers, kind="stable")
    places = [
        path_places(looks.scores, [pair[index] for pair in path])
        for index, looks in enumerate((answer, context))
    ]
    return _Looks(
        tuple(layers[order].tolist()),
        np.concatenate(places, axis=1)[:, order],
        np.concatenate([answer.agrees, context.agrees], axis=1)[:, order],
    )


def _curve(name: str, looks: _Looks, num_layers: int, weights: npt.NDArray[np.float64]) -> Curve:
    best = looks.scores.max(axis=1)
    ordered = np.unique(best[np.isfinite(best)])[::-1]
    thresholds = (
        ordered[np.linspace(0, len(ordered) - 1, _POINTS).astype(int)] if len(ordered) else ordered
    )
    saved, agreement = [0.0], [1.0]
    rows = np.arange(len(best))
    for threshold in thresholds:
        exits = looks.scores >= threshold
        leaving, first = exits.any(axis=1), exits.argmax(axis=1)
        depth = np.where(leaving, np.array(looks.exit_layers)[first], num_layers)
        saved.append(float(weights @ (1.0 - depth / num_layers)))
        agreement.append(float(weights @ np.where(leaving, looks.agrees[rows, first], True)))
    return Curve(name, tuple(saved), tuple(agreement))


def _task_weights(tasks: Sequence[str]) -> npt.NDArray[np.float64]:
    _, index, counts = np.unique(tasks, return_inverse=True, return_counts=True)
    weights: npt.NDArray[np.float64] = 1.0 / (counts[index] * len(counts))
    return weights
