"""Context exits: the prompt's positions stop, the last few run on over translated K,V.

Fitted like answer exits, on the same parts of the data: translators in place of adapters, then a
classifier on the features of the answer that comes out at each point, its points chosen.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from adainfer_runtime import Engine
from adainfer_runtime.exit_policy import ExitCheck
from adainfer_runtime.manifest import ExitPoint, ExitSpec, Manifest
from adainfer_runtime.tasks import TaskExample

from ..cost import multiply_adds
from ..graph_builder import serialise
from ..progress import Reporter
from .affine import AffineMap
from .classifiers import Entry, ExitClassifier
from .classifiers.threshold import ThresholdClassifier
from .data import Parts
from .distil_translators import distil_translators
from .exit_files import Files, write_classifier
from .head import read_head
from .kept import KeptSteps
from .predictions import Predictions, predict_layers
from .request import CalibrationRequest
from .scored import CONTEXT
from .select import select_classifiers
from .traces import AnswerTraces, trace_contexts
from .translate import (
    Rotary,
    Translator,
    Unrotated,
    fit_translators,
    lower_translator,
    read_rotary,
    translate_inputs,
    translator_layers,
)

__all__ = ["FittedContext", "draft_context", "fit_context"]

_LOG = logging.getLogger(__name__)

# Positions from the end on that run through all layers: the question itself is told by more than
# its last token. On SmolLM2 (int4, 12 tasks) eight of some 150 are worth two layers of the context.
_ANSWER_ROWS = 8
_TIMED = 40  # prompts


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
    kept: KeptSteps,
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
    engine = Engine.of_manifest(files.folder, bare)

    def fit_maps() -> dict[str, npt.NDArray[np.float32]]:
        fitted = _fit_translators(
            engine, files.folder, rotary, layers, parts, request, reporter, kept
        )
        return {
            name: part
            for layer, translator in fitted.items()
            for name, part in translator.affine.as_stored().arrays(str(layer)).items()
        }

    arrays = kept.arrays("translators", fit_maps)
    translators = {
        layer: Translator(layer, AffineMap.of_arrays(arrays, str(layer))) for layer in layers
    }
    draft = draft_context(files, bare, translators, rotary, request)
    points = {point.exit_layer: point for point in draft.points}
    looking = Engine.of_manifest(files.folder, bare.model_copy(update={"context_exit": draft}))
    check = _check_layers(looking, parts.selection, layers)
    reporter.begin("tracing context exits", len(parts.classifier) + len(parts.selection))
    answers = trace_contexts(
        looking, parts.classifier, layers, reporter, in_context=True, held_out=parts.held_out
    )
    fit = _predict(looking, answers, check, request)
    own = trace_contexts(looking, parts.selection, layers, reporter, in_context=False)
    selection = _predict(looking, own, check, request)
    target, seed = request.target_agreement, request.seed
    found = select_classifiers(fit, selection, target, seed, entries)
    for classifier in tuple(found.values())[:1]:
        spec = _draft(files, points, classifier, request)
        figures = {
            **spec.calibration,
            "check_layers": selection.checks_by_layer,
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


def _fit_translators(
    engine: Engine,
    folder: Path,
    rotary: Rotary | Unrotated,
    layers: tuple[int, ...],
    parts: Parts,
    request: CalibrationRequest,
    reporter: Reporter,
    kept: KeptSteps,
) -> dict[int, Translator]:
    reporter.begin("fitting translators", len(parts.adapters))
    translators, lessons = fit_translators(
        engine, rotary, parts.adapters, layers, reporter, parts.held_out
    )
    head = read_head(folder, engine.manifest) if request.translators == "distilled" else None
    if head is None:
        return translators
    keep, seed = kept.layers("translators"), request.seed
    return distil_translators(
        engine, folder, head, rotary, translators, lessons, reporter, seed, keep
    )


def draft_context(
    files: Files,
    bare: Manifest,
    translators: Mapping[int, Translator],
    rotary: Rotary | Unrotated,
    request: CalibrationRequest,
) -> ExitSpec:
    """Context exits at all these points, written, for looking at what they would answer: their
    classifier and threshold are none that anybody chose.
    """
    points = {
        layer: _write_translator(files, translator, rotary, bare)
        for layer, translator in translators.items()
    }
    return _draft(files, points, ThresholdClassifier(tuple(points), ("top_prob",)), request)


def _write_translator(
    files: Files, translator: Translator, rotary: Rotary | Unrotated, manifest: Manifest
) -> ExitPoint:
    model = lower_translator(translator, rotary, manifest)
    # Beside the stages: it shares their rotary tables' file.
    path = files.save(f"stages/translate_{translator.exit_layer:03d}.onnx", serialise(model))
    return ExitPoint(
        exit_layer=translator.exit_layer,
        translate=path,
        translate_inputs=translate_inputs(model),
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
        answer_rows=_ANSWER_ROWS,
        target_agreement=request.target_agreement,
        calibration={
            "data": request.data,
            "classifier_difference": float(f"{difference:.2g}"),
        },
    )


def _predict(
    engine: Engine,
    traces: AnswerTraces,
    check_layers: tuple[float, ...],
    request: CalibrationRequest,
) -> Predictions:
    """What every context exit of every traced prompt answers."""
    predictions = predict_layers(engine, traces, {}, entropy=request.entropy)
    return replace(predictions, check_layers=check_layers, exit_check_layers=check_layers)


def _check_layers(
    engine: Engine, examples: tuple[TaskExample, ...], layers: tuple[int, ...]
) -> tuple[float, ...]:
    """Time of each look in layers: what it takes of a prompt's run, as a mean over prompts.

    A look is dearer the shorter the prompt, and prompts come task by task: those that are timed lie
    evenly among all of them.
    """
    places = np.unique(np.linspace(0, len(examples) - 1, _TIMED).astype(int))
    prompts = [engine.tokenizer.encode(examples[place].prompt) for place in places]
    taken = np.array([_seconds(engine, ids, layers) for ids in prompts if len(ids) > 1])
    if not taken.size:
        return (0.0,) * len(layers)
    looks, whole = taken[:, :-1], taken[:, -1]
    layer = np.maximum(whole - looks.sum(axis=1), 1e-9) / engine.manifest.model.num_layers
    prices: list[float] = (looks / layer[:, np.newaxis]).mean(axis=0).tolist()
    return tuple(prices)


def _seconds(engine: Engine, ids: list[int], layers: Sequence[int]) -> tuple[float, ...]:
    """Of a look at each layer, and of the whole run with all of them."""
    looks = []
    with engine.borrow() as session:
        session.extend(ids)
        start = time.perf_counter()
        for layer in layers:
            session.advance(layer)
            before = time.perf_counter()
            session.look(ExitCheck(layer, "context"))
            looks.append(time.perf_counter() - before)
        session.complete()
        return (*looks, time.perf_counter() - start)
