"""Puts fitted exit graphs into an engine folder: graphs, report, joined engines, manifest."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from adainfer_runtime.engine_folder import record_file
from adainfer_runtime.manifest import ClassifierSpec, ExitPoint, ExitSpec, Manifest

from ..cost import multiply_adds
from ..folder import save_hashed
from ..graph_builder import serialise
from ..join import join_engines
from ..lower import find_target
from .classifiers import ExitClassifier
from .convert import STATE_SIZE, check_parity, lower_adapter, lower_classifier
from .ridge import Adapter
from .trust import Trust

__all__ = ["without_exit", "write_exits", "write_report"]


def without_exit(folder: Path, manifest: Manifest, spec: ExitSpec) -> Manifest:
    """The answer "do not exit", with the figures that led to it."""
    return _with_specs(folder, manifest, (spec,), [])


def write_exits(
    folder: Path,
    manifest: Manifest,
    classifiers: Sequence[ExitClassifier],
    adapters: Mapping[int, tuple[Adapter, Trust]],
    draft: ExitSpec,
) -> Manifest:
    """Writes adapters and classifiers, one exit graph each; the first is the default.

    Their thresholds are 0 until the caller has chosen them.

    Raises:
        LoweringError: a graph does not give what was fitted.
    """
    written: list[str] = []

    def save(name: str, content: bytes) -> str:
        written.append(save_hashed(folder, name, content))
        return written[-1]

    layers = sorted({layer for classifier in classifiers for layer in classifier.layers})
    points = {layer: _write_point(layer, adapters.get(layer), save) for layer in layers}
    specs = []
    for classifier in classifiers:
        spec, difference = _write_classifier(folder, classifier, save)
        figures = {**draft.calibration, "classifier_difference": float(f"{difference:.2g}")}
        specs.append(
            ExitSpec(
                points=tuple(points[layer] for layer in classifier.layers),
                classifier=spec,
                threshold=0.0,
                target_agreement=draft.target_agreement,
                calibration=figures,
            )
        )
    return _with_specs(folder, manifest, tuple(specs), written)


def _write_point(
    layer: int, maps: tuple[Adapter, Trust] | None, save: Callable[[str, bytes], str]
) -> ExitPoint:
    if maps is None:
        return ExitPoint(exit_layer=layer)
    model = lower_adapter(*maps)
    cost = multiply_adds(model.graph)
    path = save(f"adapters/layer_{layer:03d}.onnx", serialise(model))
    return ExitPoint(exit_layer=layer, adapter=path, multiply_adds=cost)


def _write_classifier(
    folder: Path, classifier: ExitClassifier, save: Callable[[str, bytes], str]
) -> tuple[ClassifierSpec, float]:
    name = f"exit/{classifier.kind}"
    graph = save(f"{name}.onnx", serialise(lower_classifier(classifier)))
    content = classifier.reference()
    reference = save(f"{name}_reference.onnx", content) if content else None
    difference = check_parity(classifier, folder / graph, folder / reference if reference else None)
    spec = ClassifierSpec(
        kind=classifier.kind,
        graph=graph,
        reference=reference,
        state_size=STATE_SIZE,
        features=classifier.features,
    )
    return spec, difference


def _with_specs(
    folder: Path, manifest: Manifest, specs: tuple[ExitSpec, ...], written: list[str]
) -> Manifest:
    new = {name: record_file(folder / name) for name in written}
    calibrated = manifest.model_copy(
        update={
            "exit": specs[0],
            "other_exits": specs[1:],
            "files": dict(manifest.files) | new,
        }
    )
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
