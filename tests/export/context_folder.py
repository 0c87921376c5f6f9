"""A tiny engine with a context exit after each layer, without a calibration's choices."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from adainfer_export.calibrate.classifiers.threshold import ThresholdClassifier
from adainfer_export.calibrate.exit_files import Files, write_classifier
from adainfer_export.calibrate.scored import CONTEXT, observe
from adainfer_export.calibrate.translate import (
    fit_translators,
    lower_translator,
    read_rotary,
    translate_inputs,
)
from adainfer_export.graph_builder import serialise
from adainfer_export.progress import SilentReporter
from adainfer_runtime import Engine
from adainfer_runtime.engine_folder import load_manifest, write_manifest
from adainfer_runtime.manifest import ExitPoint, ExitSpec
from adainfer_runtime.tasks import TaskExample

LAYERS = (1, 2, 3)


def examples(first: int, last: int) -> list[TaskExample]:
    """Different prompts of two tasks."""
    return [
        TaskExample(prompt=f"{n % 7} {n}: x {n % 5}: y {n}: and {n % 3}", task="ab"[n % 2])
        for n in range(first, last)
    ]


def write_prompts(path: Path, first: int, last: int) -> Path:
    """The same as a task file."""
    lines = [json.dumps({"prompt": e.prompt, "task": e.task}) for e in examples(first, last)]
    path.write_text("\n".join(lines))
    return path


def make_context_folder(
    engines: Path,
    out: Path,
    layers: tuple[int, ...] = LAYERS,
    prompts: tuple[Sequence[TaskExample], Sequence[TaskExample]] | None = None,
) -> Path:
    """A copy with exits after some layers, accepted by top prob; thresholds spread over it.

    `prompts` are for fitting, and for the thresholds.
    """
    to_fit, to_score = prompts or (examples(0, 40), examples(40, 60))
    shutil.copytree(engines, out)
    manifest, files = load_manifest(out), Files(out)
    engine, rotary = Engine.load(out), read_rotary(out, load_manifest(out))
    fitted, _ = fit_translators(engine, rotary, to_fit, layers, SilentReporter())
    models = {layer: lower_translator(fitted[layer], rotary, manifest) for layer in layers}
    points = tuple(
        ExitPoint(
            exit_layer=layer,
            translate=files.save(f"stages/translate_{layer:03d}.onnx", serialise(model)),
            translate_inputs=translate_inputs(model),
            multiply_adds=1000,
        )
        for layer, model in models.items()
    )
    graph, _ = write_classifier(files, CONTEXT, ThresholdClassifier(layers, ("top_prob",)))
    spec = ExitSpec(
        points=points, classifier=graph, threshold=2.0, target_agreement=0.9, answer_rows=2
    )
    named = {point.translate for point in points} | {graph.graph, graph.reference}
    records = {path: record for path, record in files.written.items() if path in named}
    manifest = manifest.model_copy(update={"context_exit": spec, "files": manifest.files | records})
    write_manifest(out, manifest)
    scores = observe(Engine.load(out), to_score, {}, SilentReporter())[CONTEXT].scores
    grid = tuple(np.quantile(np.unique(scores), np.linspace(1.0, 0.0, 40)).tolist())
    spec = spec.model_copy(update={"thresholds": grid})
    write_manifest(out, manifest.model_copy(update={"context_exit": spec}))
    return out
