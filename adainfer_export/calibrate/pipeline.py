"""The calibration, step by step: trace, adapters, classifier, threshold, graphs, manifest."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir

from adainfer_runtime import Engine
from adainfer_runtime.manifest import (
    ClassifierSpec,
    ExitPoint,
    ExitSpec,
    FileRecord,
    Manifest,
    file_sha256,
    write_manifest,
)
from adainfer_runtime.tasks import TaskExample

from ..errors import CalibrationError, OutputError
from ..join import join_engines
from ..lower import find_target
from ..progress import Reporter
from .classifiers import CLASSIFIERS, ExitClassifier, score_all
from .convert import (
    STATE_SIZE,
    check_parity,
    lower_adapter,
    lower_classifier,
)
from .data import Parts, load_examples, split_parts
from .predictions import Predictions, predict_layers
from .request import CalibrationRequest
from .ridge import Adapter
from .select import Outcome, choose_threshold, select_classifier
from .traces import candidate_layers, fits, trace_answers, trace_moments

__all__ = ["calibrate", "recalibrate"]

_RIDGE = 0.01


def calibrate(
    folder: Path, manifest: Manifest, request: CalibrationRequest, reporter: Reporter
) -> Manifest:
    """Fits an exit graph to the engine in a folder and writes its files beside the stages.

    The folder's manifest is not touched: the caller writes the one that is returned. New files
    carry their content's hash in their names, so that an engine that is in use keeps its own.

    Raises:
        TaskFileError: a task file cannot be read.
        CalibrationError: too few usable prompts, or no room for an exit point.
    """
    manifest = manifest.uncalibrated()
    engine = Engine.of_manifest(folder, manifest)
    parts, skipped = _usable_parts(engine, request)
    if not candidate_layers(engine):
        raise CalibrationError(
            "no layer boundary in the upper half of the model to exit at: export with fewer "
            "--layers-per-engine"
        )
    adapters = _fit_adapters(engine, parts, request, reporter)
    predictions = {
        "classifier": _predict(engine, parts.classifier, adapters, reporter, in_context=True),
        "selection": _predict(engine, parts.selection, adapters, reporter),
        "threshold": _predict(engine, parts.threshold, adapters, reporter),
    }
    target = request.target_agreement
    kinds = tuple(CLASSIFIERS) if request.classifier == "auto" else (request.classifier,)
    classifier = select_classifier(
        predictions["classifier"], predictions["selection"], target, request.seed, kinds
    )
    outcome = _threshold(classifier, predictions["threshold"], target)
    figures = _figures(request, parts, skipped, predictions, outcome)
    if classifier is None or outcome is None:
        spec = ExitSpec(points=(), target_agreement=target, calibration=figures)
        return _with_exit(folder, manifest, spec, [])
    return _write(folder, manifest, classifier, adapters, outcome, target, figures)


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


def _fit_adapters(
    engine: Engine, parts: Parts, request: CalibrationRequest, reporter: Reporter
) -> dict[int, Adapter]:
    if request.adapters == "none":
        return {}
    reporter.begin("fitting adapters", len(parts.adapters))
    moments = trace_moments(engine, parts.adapters, reporter, request.seed)
    return {layer: moment.solve(_RIDGE) for layer, moment in moments.items()}


def _predict(
    engine: Engine,
    examples: tuple[TaskExample, ...],
    adapters: Mapping[int, Adapter],
    reporter: Reporter,
    *,
    in_context: bool = False,
) -> Predictions:
    reporter.begin("tracing answers", len(examples))
    traces = trace_answers(engine, examples, reporter, in_context=in_context)
    return predict_layers(engine, traces, adapters)


def _threshold(
    classifier: ExitClassifier | None, predictions: Predictions, target: float
) -> Outcome | None:
    """The outcome on the threshold part; None where exits would not pay for their checks."""
    if classifier is None:
        return None
    chosen = predictions.at(classifier.layers)
    outcome = choose_threshold(score_all(classifier, predictions), chosen, target)
    return outcome if outcome.net_saved > 0 else None


def _figures(
    request: CalibrationRequest,
    parts: Parts,
    skipped: int,
    predictions: Mapping[str, Predictions],
    outcome: Outcome | None,
) -> dict[str, Any]:
    threshold = predictions["threshold"]
    agreement = threshold.agrees.mean(axis=0)
    figures: dict[str, Any] = {
        "data": [path.name for path in request.files] or ["builtin"],
        "seed": request.seed,
        "adapters": request.adapters,
        "prompts": {name: len(getattr(parts, name)) for name in Parts.__dataclass_fields__},
        "prompts_too_long": skipped,
        "check_layers": round(threshold.check_layers, 3),
        "agreement_by_layer": {
            str(layer): round(float(value), 4)
            for layer, value in zip(threshold.layers, agreement, strict=True)
        },
    }
    if outcome is not None:
        figures["threshold_part"] = {
            "layers_saved": round(outcome.layers_saved, 4),
            "net_saved": round(outcome.net_saved, 4),
            "agreement": round(outcome.agreement, 4),
            "task_agreement": round(outcome.task_agreement, 4),
        }
    return figures


def _write(
    folder: Path,
    manifest: Manifest,
    classifier: ExitClassifier,
    adapters: Mapping[int, Adapter],
    outcome: Outcome,
    target: float,
    figures: dict[str, Any],
) -> Manifest:
    graph = _save(folder, "exit/classifier", _serialise(lower_classifier(classifier)))
    content = classifier.reference()
    reference = _save(folder, "exit/classifier_reference", content) if content else None
    difference = check_parity(classifier, folder / graph, folder / reference if reference else None)
    figures["classifier_difference"] = float(f"{difference:.2g}")
    points = []
    for layer in classifier.layers:
        adapter = adapters.get(layer)
        path = None
        if adapter is not None:
            path = _save(folder, f"adapters/layer_{layer:03d}", _serialise(lower_adapter(adapter)))
        points.append(ExitPoint(exit_layer=layer, adapter=path))
    spec = ExitSpec(
        points=tuple(points),
        classifier=ClassifierSpec(
            kind=classifier.kind,
            graph=graph,
            reference=reference,
            state_size=STATE_SIZE,
            features=classifier.features,
        ),
        threshold=outcome.threshold,
        target_agreement=target,
        calibration=figures,
    )
    written = [graph, reference, *(point.adapter for point in points)]
    return _with_exit(folder, manifest, spec, [name for name in written if name])


def _with_exit(folder: Path, manifest: Manifest, spec: ExitSpec, written: list[str]) -> Manifest:
    report = (json.dumps(spec.model_dump(mode="json"), indent=1) + "\n").encode()
    written = [*written, _save(folder, "reports/calibration", report, ".json")]
    new = {
        name: FileRecord(bytes=(folder / name).stat().st_size, sha256=file_sha256(folder / name))
        for name in written
    }
    calibrated = manifest.model_copy(update={"exit": spec, "files": dict(manifest.files) | new})
    if manifest.layers_per_engine is not None:
        return calibrated
    _, dialect, precision = find_target(manifest.target, manifest.precision)
    return join_engines(folder, calibrated, dialect, precision)


def _serialise(model: ir.Model) -> bytes:
    content: bytes = ir.to_proto(model).SerializeToString()
    return content


def _save(folder: Path, name: str, content: bytes, suffix: str = ".onnx") -> str:
    relative = f"{name}.{hashlib.sha256(content).hexdigest()[:8]}{suffix}"
    path = folder / relative
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return relative
