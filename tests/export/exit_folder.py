"""A tiny engine with everything that a calibration may put into a folder, without its choices."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from adainfer_export.calibrate.affine import AffineMap
from adainfer_export.calibrate.classifiers import ExitClassifier
from adainfer_export.calibrate.convert import lower_adapter
from adainfer_export.calibrate.exit_files import Files, write_classifier
from adainfer_export.calibrate.scored import CHOICE
from adainfer_export.calibrate.trust import Trust
from adainfer_export.graph_builder import serialise
from adainfer_runtime.engine_folder import load_manifest, write_manifest
from adainfer_runtime.manifest import CombinedExitSpec, ExitPoint, ExitSpec, Manifest

from .context_folder import LAYERS, make_context_folder
from .synthetic import fit_classifier, synthetic

PLAIN_SVM = ("top_prob", "gap", "depth")  # AdaInfer's own features: neither trust nor state
KINDS = {"svm": PLAIN_SVM, "crf": None, "logistic": None, "boosting": None, "threshold": None}
ANSWER_LAYERS = (1, 2)


def make_exit_folder(engines: Path, out: Path) -> Path:
    """A copy with adapters (a full one, one of low rank), a classifier of every kind, one for
    choices, context exits after layers 1 to 3 and combined ones.
    """
    make_context_folder(engines, out, LAYERS)
    manifest, files = load_manifest(out), Files(out)
    points = tuple(_point(files, manifest, layer) for layer in ANSWER_LAYERS)
    fitted = synthetic(200, noise=0.1, layers=ANSWER_LAYERS, num_layers=4)

    def spec(name: str, classifier: ExitClassifier) -> ExitSpec:
        graph, _ = write_classifier(files, name, classifier)
        return ExitSpec(points=points, classifier=graph, threshold=0.0, target_agreement=0.9)

    exits = [
        spec(kind, fit_classifier(kind, fitted, ANSWER_LAYERS, features))
        for kind, features in KINDS.items()
    ]
    choice = spec(CHOICE, fit_classifier("svm", fitted, ANSWER_LAYERS))
    combined = CombinedExitSpec(
        answer="svm", path=((0.0, 0.0),), threshold=0.0, target_agreement=0.9
    )
    manifest = manifest.model_copy(
        update={
            "exit": exits[0],
            "other_exits": tuple(exits[1:]),
            "choice_exit": choice,
            "combined_exit": combined,
        }
    )
    named = set(manifest.referenced_files())
    new = {path: record for path, record in files.written.items() if path in named}
    write_manifest(out, manifest.model_copy(update={"files": manifest.files | new}))
    return out


def _point(files: Files, manifest: Manifest, layer: int) -> ExitPoint:
    random, width = np.random.default_rng(layer), manifest.model.hidden_size
    matrix = np.eye(width, dtype=np.float32) + 0.1 * random.normal(size=(width, width))
    bias = (0.1 * random.normal(size=width)).astype(np.float32)
    adapter = AffineMap(matrix.astype(np.float32), bias)
    if layer == ANSWER_LAYERS[-1]:
        adapter = AffineMap(adapter.matrix[:, :40], bias, adapter.matrix[:40])
    trust = Trust(random.normal(size=width).astype(np.float32), 0.1)
    content = serialise(lower_adapter(adapter.as_stored(), trust))
    path = files.save(f"adapters/layer_{layer:03d}.onnx", content)
    return ExitPoint(exit_layer=layer, adapter=path, multiply_adds=width * width)
