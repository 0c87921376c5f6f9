"""Context exits: the prompt's positions stop, the answer position runs on over translated K,V.

Fitted like answer exits, on the same parts of the data: translators in place of adapters, then a
classifier on the features of the answer that comes out at each point, its points chosen, threshold
and certificate from prompts used for nothing else.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from adainfer_runtime import Engine
from adainfer_runtime.manifest import ExitPoint, ExitSpec, Manifest
from adainfer_runtime.session import Observation
from adainfer_runtime.tasks import TaskExample

from ..cost import multiply_adds
from ..graph_builder import serialise
from ..progress import Reporter
from .certify import make_certificate, threshold_grid
from .classifiers import Entry, ExitClassifier
from .classifiers.threshold import ThresholdClassifier
from .data import Parts
from .exit_files import Files, join_calibrated, write_classifier
from .predictions import Predictions
from .request import CalibrationRequest
from .scored import CONTEXT, observe_context, score_predictions
from .select import choose_threshold, outcome_figures, select_classifiers
from .translate import (
    Rotary,
    Translator,
    Unrotated,
    fit_translators,
    lower_translator,
    read_rotary,
    translator_layers,
)

__all__ = ["with_context_exit"]

_LOG = logging.getLogger(__name__)


def with_context_exit(
    files: Files,
    manifest: Manifest,
    parts: Parts,
    entries: Mapping[str, Entry],
    request: CalibrationRequest,
    reporter: Reporter,
) -> Manifest:
    """The calibrated manifest with a context exit as well, where one pays.

    Models whose layers differ in heads or rotary tables have none: `context_exit` stays None, with
    a warning.
    """
    folder, bare = files.folder, manifest.uncalibrated()
    rotary = read_rotary(folder, bare)
    layers = translator_layers(bare)
    if rotary is None:
        _LOG.warning(
            "no context exit: keys are translated for all layers alike, and in this model layers "
            "differ in their heads or rotary tables, or rotate a part of each head",
        )
    if rotary is None or not layers:
        return manifest
    reporter.begin("fitting translators", len(parts.adapters))
    engine = Engine.of_manifest(folder, bare)
    translators = fit_translators(engine, rotary, parts.adapters, layers, reporter)
    points = {
        layer: _write_translator(files, translator, rotary, bare)
        for layer, translator in translators.items()
    }
    draft = _draft(files, bare, points, ThresholdClassifier(layers, ("top_prob",)), request)
    looking = Engine.of_manifest(folder, draft)
    fit = _predict(looking, parts.classifier, layers, reporter)
    selection = _predict(looking, parts.selection, layers, reporter)
    target, seed = request.target_agreement, request.seed
    found = select_classifiers(fit, selection, target, seed, entries)
    spec: ExitSpec | None = None
    for classifier in tuple(found.values())[:1]:
        chosen = _draft(files, bare, points, classifier, request)
        spec = _certified(folder, chosen, classifier, selection, parts, request, reporter)
    finished = manifest.model_copy(update={"context_exit": spec})
    named = {*finished.referenced_files()}
    new = {path: record for path, record in files.written.items() if path in named}
    kept = {path: record for path, record in manifest.files.items() if path not in manifest.joins}
    # Its points are boundaries too: engines are joined anew.
    unjoined = finished.model_copy(update={"joined": (), "files": kept | new})
    return join_calibrated(folder, unjoined)


def _write_translator(
    files: Files, translator: Translator, rotary: Rotary | Unrotated, manifest: Manifest
) -> ExitPoint:
    model = lower_translator(translator, rotary, manifest)
    # Beside the stages: it shares their rotary tables' file.
    path = files.save(f"stages/translate_{translator.exit_layer:03d}.onnx", serialise(model))
    return ExitPoint(
        exit_layer=translator.exit_layer,
        translate=path,
        multiply_adds=multiply_adds(model.graph),
    )


def _draft(
    files: Files,
    manifest: Manifest,
    points: Mapping[int, ExitPoint],
    classifier: ExitClassifier,
    request: CalibrationRequest,
) -> Manifest:
    """The engine with a classifier at its points, before a threshold is chosen."""
    graph, difference = write_classifier(files, CONTEXT, classifier)
    spec = ExitSpec(
        points=tuple(points[layer] for layer in classifier.layers),
        classifier=graph,
        threshold=0.0,
        target_agreement=request.target_agreement,
        calibration={
            "data": [path.name for path in request.files] or ["builtin"],
            "classifier_difference": float(f"{difference:.2g}"),
        },
    )
    return manifest.model_copy(update={"context_exit": spec})


def _predict(
    engine: Engine, examples: tuple[TaskExample, ...], layers: tuple[int, ...], reporter: Reporter
) -> Predictions:
    reporter.begin("tracing context exits", len(examples))
    seen = []
    for example in examples:
        seen += _look(engine, example, layers)
        reporter.step(example.task)
    results = [[o.evidence[layer].result for layer in layers] for _, o, _ in seen]
    check = _check_layers(engine, [(example, took) for example, _, took in seen[-20:]], len(layers))
    return Predictions(
        layers,
        engine.manifest.model.num_layers,
        tuple(example.task for example, _, _ in seen),
        np.array([observation.full.token for _, observation, _ in seen], np.int64),
        np.array([[r.token for r in row] for row in results], np.int64),
        np.array([[r.top_prob for r in row] for row in results], np.float32),
        np.array([[r.gap for r in row] for row in results], np.float32),
        check,
        exit_check_layers=check,
    )


def _look(
    engine: Engine, example: TaskExample, layers: tuple[int, ...]
) -> list[tuple[TaskExample, Observation, float]]:
    """Every context exit of a prompt, and the seconds of the full run with all the looks; nothing
    for a prompt without a context.
    """
    ids = engine.tokenizer.encode(example.prompt)
    if len(ids) < 2:
        return []
    with engine.borrow() as session:
        session.extend(ids)
        start = time.perf_counter()
        seen = session.observe_context(layers)
        return [(example, seen, time.perf_counter() - start)]


def _check_layers(engine: Engine, runs: Sequence[tuple[TaskExample, float]], looks: int) -> float:
    """Time of one look in layers: what prompts took with all looks, beyond a plain run of them."""
    plain = float(np.median([_plain_seconds(engine, example) for example, _ in runs]))
    extra = float(np.median([seconds for _, seconds in runs])) - plain
    return max(0.0, extra / looks / (plain / engine.manifest.model.num_layers))


def _plain_seconds(engine: Engine, example: TaskExample) -> float:
    with engine.borrow() as session:
        session.extend(engine.tokenizer.encode(example.prompt))
        start = time.perf_counter()
        session.complete()
        return time.perf_counter() - start


def _certified(
    folder: Path,
    manifest: Manifest,
    classifier: ExitClassifier,
    selection: Predictions,
    parts: Parts,
    request: CalibrationRequest,
    reporter: Reporter,
) -> ExitSpec | None:
    spec = manifest.context_exit
    assert spec is not None  # it was written for this classifier
    engine = Engine.of_manifest(folder, manifest)
    reporter.begin("certifying context exits", len(parts.certification))
    scored = observe_context(engine, parts.certification, selection.check_layers, reporter)
    outcome = choose_threshold(scored, request.target_agreement)
    if outcome.net_saved <= 0:
        return None
    grid = threshold_grid(score_predictions(classifier, selection))
    figures: dict[str, Any] = {
        **spec.calibration,
        "check_layers": round(selection.check_layers, 3),
        "agreement_by_layer": {
            str(layer): round(float(share), 4)
            for layer, share in zip(selection.layers, selection.agrees.mean(axis=0), strict=True)
        },
        "held_out": outcome_figures(outcome),
    }
    return spec.model_copy(
        update={
            "threshold": outcome.threshold,
            "thresholds": tuple(grid.tolist()),
            "certificate": make_certificate(manifest, scored, grid, spec.calibration["data"]),
            "calibration": figures,
        }
    )
