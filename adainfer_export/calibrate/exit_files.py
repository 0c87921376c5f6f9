"""Puts a fitted exit graph into an engine folder: graphs, report, joined engines, manifest."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from adainfer_runtime.engine_folder import record_file
from adainfer_runtime.manifest import ClassifierSpec, ExitPoint, ExitSpec, Manifest

from ..folder import save_hashed
from ..graph_builder import serialise
from ..join import join_engines
from ..lower import find_target
from .classifiers import ExitClassifier
from .convert import STATE_SIZE, check_parity, lower_adapter, lower_classifier
from .ridge import Adapter
from .trust import Trust

__all__ = ["without_exit", "write_exit", "write_report"]


def without_exit(folder: Path, manifest: Manifest, spec: ExitSpec) -> Manifest:
    """The answer "do not exit", with the figures that led to it."""
    return _with_spec(folder, manifest, spec, [])


def write_exit(
    folder: Path,
    manifest: Manifest,
    classifier: ExitClassifier,
    adapters: Mapping[int, tuple[Adapter, Trust]],
    draft: ExitSpec,
) -> Manifest:
    """Writes adapters and classifier. The threshold is 0 until the caller has chosen one.

    Raises:
        LoweringError: a graph does not give what was fitted.
    """
    graph = save_hashed(folder, "exit/classifier.onnx", serialise(lower_classifier(classifier)))
    content = classifier.reference()
    reference = save_hashed(folder, "exit/classifier_reference.onnx", content) if content else None
    difference = check_parity(classifier, folder / graph, folder / reference if reference else None)
    points = []
    for layer in classifier.layers:
        adapter = adapters.get(layer)
        path = None
        if adapter is not None:
            path = save_hashed(
                folder, f"adapters/layer_{layer:03d}.onnx", serialise(lower_adapter(*adapter))
            )
        points.append(ExitPoint(exit_layer=layer, adapter=path))
    classifier_spec = ClassifierSpec(
        kind=classifier.kind,
        graph=graph,
        reference=reference,
        state_size=STATE_SIZE,
        features=classifier.features,
    )
    figures = {**draft.calibration, "classifier_difference": float(f"{difference:.2g}")}
    spec = ExitSpec(
        points=tuple(points),
        classifier=classifier_spec,
        threshold=0.0,
        target_agreement=draft.target_agreement,
        calibration=figures,
    )
    written = [graph, reference, *(point.adapter for point in points)]
    return _with_spec(folder, manifest, spec, [name for name in written if name])


def _with_spec(folder: Path, manifest: Manifest, spec: ExitSpec, written: list[str]) -> Manifest:
    new = {name: record_file(folder / name) for name in written}
    calibrated = manifest.model_copy(update={"exit": spec, "files": dict(manifest.files) | new})
    if manifest.layers_per_engine is not None:
        return calibrated
    _, dialect, precision = find_target(manifest.target, manifest.precision)
    return join_engines(folder, calibrated, dialect, precision)


def write_report(folder: Path, manifest: Manifest, report: Mapping[str, object]) -> Manifest:
    """Adds a JSON report to the folder and its manifest."""
    content = (json.dumps(report, indent=1) + "\n").encode()
    name = save_hashed(folder, "reports/calibration.json", content)
    files = {**manifest.files, name: record_file(folder / name)}
    return manifest.model_copy(update={"files": files})
