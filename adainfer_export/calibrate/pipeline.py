"""The calibration, step by step: trace, adapters, classifier, graphs, threshold, certificate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adainfer_runtime import Engine
from adainfer_runtime.engine_folder import write_manifest
from adainfer_runtime.manifest import ExitSpec, Manifest
from adainfer_runtime.tasks import TaskExample

from ..errors import CalibrationError, OutputError
from ..progress import Reporter
from .certify import make_certificate, threshold_grid
from .classifiers import CLASSIFIERS, ExitClassifier
from .data import Parts, load_examples, prompt_hash, split_parts
from .distil import distil_adapters
from .exit_files import without_exit, write_exits, write_report
from .head import read_head
from .predictions import Predictions, predict_layers
from .request import CalibrationRequest
from .ridge import Adapter
from .scored import Scored, observe, score_predictions
from .select import Outcome, choose_threshold, select_classifiers
from .traces import (
    AnswerTraces,
    PromptTraces,
    candidate_layers,
    fits,
    trace_answers,
    trace_prompts,
)
from .trust import Trust, cross_fit, fit_trust, with_trust

__all__ = ["calibrate", "recalibrate"]

_RIDGE = 0.01


@dataclass(frozen=True)
class _Fitted:
    """What the first three parts gave: everything but the threshold.

    `classifiers` is empty where no exit pays; the first is the default.
    """

    parts: Parts
    skipped: int
    adapters: Mapping[int, tuple[Adapter, Trust]]
    classifiers: Sequence[ExitClassifier]
    block_influence: Mapping[int, float]
    selection: Predictions


def calibrate(
    folder: Path, manifest: Manifest, request: CalibrationRequest, reporter: Reporter
) -> Manifest:
    """Fits exit graphs to the engine in a folder and writes their files beside the stages.

    The folder's manifest is not touched: the caller writes the one that is returned. New files
    carry their content's hash in their names, so that an engine that is in use keeps its own.

    Raises:
        TaskFileError: a task file cannot be read.
        CalibrationError: too few usable prompts, or no room for an exit point.
    """
    in_use, manifest = manifest, manifest.uncalibrated()
    fitted = _fit(folder, manifest, request, reporter)
    figures = _figures(request, fitted)
    target = request.target_agreement
    draft = ExitSpec(points=(), target_agreement=target, calibration=figures)
    if not fitted.classifiers:
        return _report(folder, without_exit(folder, manifest, draft), fitted.parts)
    # Thresholds and certificates are of the exit graphs as they run: they are written first.
    written = write_exits(folder, manifest, fitted.classifiers, fitted.adapters, draft)
    reporter.begin("certifying", len(fitted.parts.certification))
    engine = Engine.of_manifest(folder, written)
    scored = observe(engine, fitted.parts.certification, fitted.selection.check_layers, reporter)
    outcomes = {kind: choose_threshold(graph, target) for kind, graph in scored.items()}
    paying = [c for c in fitted.classifiers if outcomes[c.kind].net_saved > 0]
    if not paying:
        final = without_exit(folder, manifest, draft)
    else:
        final = write_exits(folder, manifest, paying, fitted.adapters, draft)
        specs = [
            _finish(manifest, spec, fitted, classifier, scored[kind], outcomes[kind])
            for classifier, (kind, spec) in zip(paying, final.exit_graphs.items(), strict=True)
        ]
        final = final.model_copy(update={"exit": specs[0], "other_exits": tuple(specs[1:])})
    final = _report(folder, final, fitted.parts)
    for name in written.files.keys() - final.files.keys() - in_use.files.keys():
        (folder / name).unlink()
    return final


def _finish(
    manifest: Manifest,
    spec: ExitSpec,
    fitted: _Fitted,
    classifier: ExitClassifier,
    scored: Scored,
    outcome: Outcome,
) -> ExitSpec:
    grid = threshold_grid(score_predictions(classifier, fitted.selection))
    return spec.model_copy(
        update={
            "threshold": outcome.threshold,
            "thresholds": tuple(grid.tolist()),
            "certificate": make_certificate(manifest, scored, grid, spec.calibration["data"]),
            "calibration": {**spec.calibration, "held_out": _outcome_figures(outcome)},
        }
    )


def recalibrate(
    folder: Path, manifest: Manifest, request: CalibrationRequest, reporter: Reporter
) -> Manifest:
    """Gives an existing engine folder another exit graph; its manifest is replaced at the end.

    Raises:
        OutputError: the folder cannot be written; the old exit graph stays in force.
        TaskFileError, CalibrationError: see `calibrate`.
    """
    try:
        renewed = calibrate(folder, manifest, request, reporter)
        write_manifest(folder, renewed)
        for name in manifest.files.keys() - renewed.files.keys():
            (folder / name).unlink(missing_ok=True)
    except OSError as error:
        reason = error.strerror or str(error)
        raise OutputError(f"{folder} cannot be written: {reason}; it was left as it is") from error
    return renewed


def _report(folder: Path, manifest: Manifest, parts: Parts) -> Manifest:
    """Writes figures, and which prompts were fitted on: those can certify nothing later."""
    assert manifest.exit is not None  # every calibration ends with a spec
    fitted_on = (*parts.adapters, *parts.classifier, *parts.selection)
    report = {
        "exit": manifest.exit.model_dump(mode="json"),
        "fitted_on": sorted(prompt_hash(example.prompt) for example in fitted_on),
    }
    return write_report(folder, manifest, report)


def _fit(
    folder: Path, manifest: Manifest, request: CalibrationRequest, reporter: Reporter
) -> _Fitted:
    engine = Engine.of_manifest(folder, manifest)
    parts, skipped = _usable_parts(engine, request)
    if not candidate_layers(engine):
        raise CalibrationError(
            "no layer boundary in the upper half of the model to exit at: export with fewer "
            "--layers-per-engine"
        )
    prompts = _trace_prompts(engine, parts, request, reporter)
    adapters = _fit_adapters(folder, engine, prompts, request, reporter)
    traces = _trace(engine, parts.classifier, reporter, in_context=True)
    fit = predict_layers(engine, traces, adapters)
    new = _trace(engine, parts.selection, reporter)
    selection = predict_layers(engine, new, adapters)
    trusts: dict[int, Trust] = {}
    if adapters:  # plain AdaInfer reads nothing off the hidden state but its prediction
        trusts = fit_trust(traces, fit)
        fit, selection = cross_fit(traces, fit), with_trust(new, selection, trusts)
    classifiers = _select(fit, selection, request)
    maps = {layer: (adapter, trusts[layer]) for layer, adapter in adapters.items()}
    return _Fitted(parts, skipped, maps, classifiers, prompts.block_influence, selection)


def _select(
    fit: Predictions, selection: Predictions, request: CalibrationRequest
) -> list[ExitClassifier]:
    best_alone = request.classifiers == ("auto",)
    kinds = tuple(CLASSIFIERS) if best_alone else request.classifiers
    found = select_classifiers(fit, selection, request.target_agreement, request.seed, kinds)
    if best_alone:
        return list(found.values())[:1]
    return [found[kind] for kind in kinds if kind in found]


def _usable_parts(engine: Engine, request: CalibrationRequest) -> tuple[Parts, int]:
    examples = load_examples(request)
    usable = [example for example in examples if fits(engine, example)]
    skipped = len(examples) - len(usable)
    if skipped * 2 > len(examples):
        raise CalibrationError(
            f"{skipped} of {len(examples)} prompts are longer than this engine's "
            f"{engine.manifest.max_seq_len} positions: export with a larger --max-seq-len"
        )
    return split_parts(usable), skipped


def _trace_prompts(
    engine: Engine, parts: Parts, request: CalibrationRequest, reporter: Reporter
) -> PromptTraces:
    reporter.begin("tracing prompts", len(parts.adapters))
    return trace_prompts(engine, parts.adapters, reporter, request.seed)


def _fit_adapters(
    folder: Path,
    engine: Engine,
    prompts: PromptTraces,
    request: CalibrationRequest,
    reporter: Reporter,
) -> dict[int, Adapter]:
    if request.adapters == "none":
        return {}
    ridge = {layer: moment.solve(_RIDGE) for layer, moment in prompts.moments.items()}
    head = read_head(folder, engine.manifest) if request.adapters == "distilled" else None
    if head is None:
        return ridge
    return distil_adapters(engine, head, prompts.answers, ridge, reporter, request.seed)


def _trace(
    engine: Engine,
    examples: tuple[TaskExample, ...],
    reporter: Reporter,
    *,
    in_context: bool = False,
) -> AnswerTraces:
    reporter.begin("tracing answers", len(examples))
    return trace_answers(engine, examples, reporter, in_context=in_context)


def _figures(request: CalibrationRequest, fitted: _Fitted) -> dict[str, Any]:
    agreement = fitted.selection.agrees.mean(axis=0)
    return {
        "data": [path.name for path in request.files] or ["builtin"],
        "seed": request.seed,
        "adapters": request.adapters,
        "prompts": {name: len(getattr(fitted.parts, name)) for name in Parts.__dataclass_fields__},
        "prompts_too_long": fitted.skipped,
        "block_influence": {
            str(layer): float(f"{value:.4g}") for layer, value in fitted.block_influence.items()
        },
        "check_layers": round(fitted.selection.check_layers, 3),
        "agreement_by_layer": {
            str(layer): round(float(value), 4)
            for layer, value in zip(fitted.selection.layers, agreement, strict=True)
        },
    }


def _outcome_figures(outcome: Outcome) -> dict[str, float]:
    return {
        "layers_saved": round(outcome.layers_saved, 4),
        "net_saved": round(outcome.net_saved, 4),
        "agreement": round(outcome.agreement, 4),
        "task_agreement": round(outcome.task_agreement, 4),
    }
