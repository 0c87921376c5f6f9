"""Puts fitted exit graphs into an engine folder: graphs, report, joined engines, manifest."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import onnx
import onnx_ir as ir

from adainfer_runtime.engine_folder import record_file
from adainfer_runtime.manifest import (
    CLASSIFIER_INPUTS,
    ClassifierInput,
    ClassifierSpec,
    ExitPoint,
    ExitSpec,
    FileRecord,
    Manifest,
)

from ..cost import multiply_adds
from ..folder import save_hashed
from ..graph_builder import serialise
from ..join import join_engines
from ..lower import find_target
from ..lower.graph import remove_dead_inputs
from .affine import AffineMap
from .classifiers import ExitClassifier, FittedClassifier, OwnClassifier
from .convert import STATE_SIZE, check_parity, lower_adapter, lower_classifier
from .fitting import FittedGraph
from .scored import CHOICE
from .trust import Trust

__all__ = ["Files", "join_calibrated", "write_classifier", "write_exits", "write_report"]


class Files:
    """New files of an engine folder, named by their content."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.written: dict[str, FileRecord] = {}

    def save(self, name: str, content: bytes) -> str:
        """Writes a file; its path relative to the folder."""
        path = save_hashed(self.folder, name, content)
        self.written[path] = record_file(self.folder / path)
        return path


def write_exits(
    files: Files,
    manifest: Manifest,
    graphs: Sequence[FittedGraph],
    *,
    adapters: Mapping[int, tuple[AffineMap, Trust]],
    draft: ExitSpec,
    context: ExitSpec | None = None,
) -> Manifest:
    """Writes adapters and classifiers; the first graph is the default, none means "do not exit".

    The context exit's files are written already.

    Their thresholds are 0 until the caller has chosen them.

    Raises:
        LoweringError: a graph does not give what was fitted.
    """
    layers = sorted({layer for graph in graphs for layer in graph.classifier.layers})
    points = {layer: _write_point(layer, adapters.get(layer), files) for layer in layers}
    specs = {}
    for graph in graphs:
        classifier, difference = write_classifier(files, graph.name, graph.classifier)
        specs[graph.name] = draft.model_copy(
            update={
                "points": tuple(points[layer] for layer in graph.classifier.layers),
                "classifier": classifier,
                "threshold": 0.0,
                "calibration": {
                    **draft.calibration,
                    "check_layers": graph.selection.checks_by_layer,
                    "classifier_difference": float(f"{difference:.2g}"),
                },
            }
        )
    choice = specs.pop(CHOICE, None)
    default, *others = specs.values() or (draft,)
    calibrated = manifest.model_copy(
        update={
            "exit": default,
            "other_exits": tuple(others),
            "choice_exit": choice,
            "context_exit": context,
        }
    )
    named = {*calibrated.referenced_files()}
    new = {path: record for path, record in files.written.items() if path in named}
    calibrated = calibrated.model_copy(update={"files": manifest.files | new})
    return join_calibrated(files.folder, calibrated)


def join_calibrated(folder: Path, manifest: Manifest) -> Manifest:
    """With one engine between two exit points, unless the user fixed the layers per engine."""
    if manifest.layers_per_engine is not None:
        return manifest
    _, dialect, _ = find_target(manifest.target, manifest.precision)
    return join_engines(folder, manifest, dialect)


def _write_point(layer: int, maps: tuple[AffineMap, Trust] | None, files: Files) -> ExitPoint:
    if maps is None:
        return ExitPoint(exit_layer=layer)
    model = lower_adapter(*maps)
    cost = multiply_adds(model.graph)
    path = files.save(f"adapters/layer_{layer:03d}.onnx", serialise(model))
    return ExitPoint(exit_layer=layer, adapter=path, multiply_adds=cost)


def write_classifier(
    files: Files, graph_name: str, classifier: ExitClassifier
) -> tuple[ClassifierSpec, float]:
    """Writes a classifier and its reference; also says how far the two forms differ.

    Raises:
        LoweringError: a graph does not give what was fitted.
    """
    name, folder, save = f"exit/{graph_name}", files.folder, files.save
    if isinstance(classifier, OwnClassifier):
        content, inputs = _without_dead_inputs(classifier.content)
        graph, reference, difference = save(f"{name}.onnx", content), None, 0.0
        state_size = classifier.state_size
    else:
        assert isinstance(classifier, FittedClassifier)  # the two forms that there are
        model = lower_classifier(classifier)
        graph, inputs = save(f"{name}.onnx", serialise(model)), _inputs(model)
        converted = classifier.reference()
        reference = save(f"{name}_reference.onnx", converted) if converted else None
        difference = check_parity(
            classifier, folder / graph, folder / reference if reference else None
        )
        state_size = STATE_SIZE
    spec = ClassifierSpec(
        kind=classifier.kind,
        graph=graph,
        reference=reference,
        state_size=state_size,
        features=classifier.features,
        inputs=inputs,
    )
    return spec, difference


def _without_dead_inputs(content: bytes) -> tuple[bytes, tuple[ClassifierInput, ...]]:
    """A user's own graph, byte for byte where it reads every input."""
    model = ir.from_proto(onnx.load_model_from_string(content))
    before = _inputs(model)
    remove_dead_inputs(model.graph)
    inputs = _inputs(model)
    return (content if inputs == before else serialise(model)), inputs


def _inputs(model: ir.Model) -> tuple[ClassifierInput, ...]:
    names = {value.name for value in model.graph.inputs}
    return tuple(name for name in CLASSIFIER_INPUTS if name in names)


def write_report(folder: Path, manifest: Manifest, report: Mapping[str, object]) -> Manifest:
    """Adds a JSON report to the folder and its manifest."""
    content = (json.dumps(report, indent=1) + "\n").encode()
    name = save_hashed(folder, "reports/calibration.json", content)
    files = {**manifest.files, name: record_file(folder / name)}
    return manifest.model_copy(update={"files": files})
