"""Context exits: the prompt's positions stop, the answer position runs on over translated K,V.

Fitted like answer exits, on the same parts of the data: translators in place of adapters, then a
classifier on the features of the answer that comes out at each point, its points chosen.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from adainfer_runtime import Engine
from adainfer_runtime.exit_policy import ExitCheck
from adainfer_runtime.manifest import ExitPoint, ExitSpec, Manifest
from adainfer_runtime.session import Observation
from adainfer_runtime.tasks import TaskExample

from ..cost import multiply_adds
from ..graph_builder import serialise
from ..progress import Reporter
from .classifiers import Entry, ExitClassifier
from .classifiers.threshold import ThresholdClassifier
from .data import Parts
from .distil_translators import distil_translators
from .exit_files import Files, write_classifier
from .head import read_head
from .predictions import Predictions
from .request import CalibrationRequest
from .scored import CONTEXT
from .select import select_classifiers
from .translate import (
    Rotary,
    Translator,
    Unrotated,
    fit_translators,
    lower_translator,
    read_rotary,
    translator_layers,
)

__all__ = ["FittedContext", "fit_context"]

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class FittedContext:
    """A context exit without its threshold.

    Attributes:
        spec: its points and graphs, which are written.
        selection: predictions of the selection part's prompts that have a context, whose numbers
            count all prompts of the part from 1.
    """

    spec: ExitSpec
    classifier: ExitClassifier
    selection: Predictions


def fit_context(
    files: Files,
    bare: Manifest,
    parts: Parts,
    entries: Mapping[str, Entry],
    request: CalibrationRequest,
    reporter: Reporter,
) -> FittedContext | None:
    """Translators, and a classifier on the answers over them; None where nothing seems to pay.

    Models whose layers differ in heads or rotary tables have none, with a warning.

    Args:
        bare: the manifest without exits, every boundary of the cut in it.
    """
    rotary = read_rotary(files.folder, bare)
    layers = translator_layers(bare)
    if rotary is None:
        _LOG.warning(
            "no context exit: keys are translated for all layers alike, and in this model layers "
            "differ in their heads or rotary tables, or rotate a part of each head",
        )
    if rotary is None or not layers:
        return None
    reporter.begin("fitting translators", len(parts.adapters))
    engine = Engine.of_manifest(files.folder, bare)
    translators, lessons = fit_translators(engine, rotary, parts.adapters, layers, reporter)
    head = read_head(files.folder, bare) if request.translators == "distilled" else None
    if head is not None:
        translators = distil_translators(
            engine, files.folder, head, rotary, translators, lessons, reporter, request.seed
        )
    del lessons
    points = {
        layer: _write_translator(files, translator, rotary, bare)
        for layer, translator in translators.items()
    }
    draft = _draft(files, points, ThresholdClassifier(layers, ("top_prob",)), request)
    looking = Engine.of_manifest(files.folder, bare.model_copy(update={"context_exit": draft}))
    fit = _predict(looking, parts.classifier, layers, reporter)
    selection = _predict(looking, parts.selection, layers, reporter)
    target, seed = request.target_agreement, request.seed
    found = select_classifiers(fit, selection, target, seed, entries)
    for classifier in tuple(found.values())[:1]:
        spec = _draft(files, points, classifier, request)
        figures = {
            **spec.calibration,
            "check_layers": round(selection.check_layers, 3),
            "agreement_by_layer": {
                str(layer): round(float(share), 4)
                for layer, share in zip(
                    selection.layers, selection.agrees.mean(axis=0), strict=True
                )
            },
        }
        spec = spec.model_copy(update={"calibration": figures})
        return FittedContext(spec, classifier, selection)
    return None


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
    points: Mapping[int, ExitPoint],
    classifier: ExitClassifier,
    request: CalibrationRequest,
) -> ExitSpec:
    """A classifier at its points, before a threshold is chosen."""
    graph, difference = write_classifier(files, CONTEXT, classifier)
    return ExitSpec(
        points=tuple(points[layer] for layer in classifier.layers),
        classifier=graph,
        threshold=0.0,
        target_agreement=request.target_agreement,
        calibration={
            "data": request.data,
            "classifier_difference": float(f"{difference:.2g}"),
        },
    )


def _predict(
    engine: Engine, examples: tuple[TaskExample, ...], layers: tuple[int, ...], reporter: Reporter
) -> Predictions:
    """Every context exit of every prompt that has a context."""
    reporter.begin("tracing context exits", len(examples))
    checks = [ExitCheck(layer, "context") for layer in layers]
    seen: list[_Look] = []
    for number, example in enumerate(examples, 1):
        ids = engine.tokenizer.encode(example.prompt)
        reporter.step(example.task)
        if len(ids) < 2:
            continue
        with engine.borrow() as session:
            session.extend(ids)
            start = time.perf_counter()
            (observation,) = session.observe(checks)
            seen.append(_Look(number, example, observation, time.perf_counter() - start))
    results = [[look.seen.evidence[check].result for check in checks] for look in seen]
    check = _check_layers(engine, seen[-20:], len(layers))
    return Predictions(
        layers,
        engine.manifest.model.num_layers,
        tuple(look.example.task for look in seen),
        np.array([look.seen.full.token for look in seen], np.int64),
        np.array([[r.token for r in row] for row in results], np.int64),
        np.array([[r.top_prob for r in row] for row in results], np.float32),
        np.array([[r.gap for r in row] for row in results], np.float32),
        check,
        prompts=np.array([look.number for look in seen], np.int64),
        exit_check_layers=check,
    )


@dataclass(frozen=True)
class _Look:
    """A prompt's context exits, and the seconds of its full run with all of them."""

    number: int
    example: TaskExample
    seen: Observation
    seconds: float


def _check_layers(engine: Engine, looks: Sequence[_Look], points: int) -> float:
    """Time of one look in layers: what prompts took with all of them, beyond a plain run."""
    plain = float(np.median([_plain_seconds(engine, look.example) for look in looks]))
    extra = float(np.median([look.seconds for look in looks])) - plain
    return max(0.0, extra / points / (plain / engine.manifest.model.num_layers))


def _plain_seconds(engine: Engine, example: TaskExample) -> float:
    with engine.borrow() as session:
        session.extend(engine.tokenizer.encode(example.prompt))
        start = time.perf_counter()
        session.complete()
        return time.perf_counter() - start
