"""Joining written stages: the same numbers from fewer graphs, on the same weights."""

import json
import shutil

import numpy as np
import onnx
import pytest

from adainfer_export.calibrate import CalibrationRequest
from adainfer_export.calibrate.pipeline import recalibrate
from adainfer_export.join import join_engines
from adainfer_export.lower import find_target
from adainfer_export.progress import SilentReporter
from adainfer_runtime import Engine
from adainfer_runtime.engine_folder import load_manifest, verify_files, write_manifest
from adainfer_runtime.manifest import ClassifierSpec, ExitPoint, ExitSpec

PROMPT = [int(token) for token in np.random.default_rng(1).integers(2, 320, 21)]


def joined_copy(made, folder, exits):
    """A copy of a tiny engine with its layers joined between the given exit layers."""
    shutil.copytree(made.folder, folder)
    manifest = load_manifest(folder)
    classifier = ClassifierSpec(kind="svm", graph="", reference="", state_size=2, features=())
    points = tuple(ExitPoint(exit_layer=layer) for layer in exits)
    spec = ExitSpec(points=points, classifier=classifier, threshold=0.0, target_agreement=1.0)
    _, dialect, _ = find_target(manifest.target, manifest.precision)
    joined = join_engines(folder, manifest.model_copy(update={"exit": spec}), dialect)
    write_manifest(folder, joined.model_copy(update={"exit": None}))
    return Engine.load(folder, verify=True)


def run(engine, prompt):
    """Hidden states of a prompt and of one token after it, and the last layer's cache."""
    session = engine.session()
    session.extend(prompt)
    session.complete()
    session.extend([7])
    session.complete()
    return session.hidden().copy(), *(part.copy() for part in session.kv(4))


@pytest.mark.parametrize("exits", [(), (2,), (1, 3), (1, 2, 3)])
@pytest.mark.parametrize("variant", ["llama", "llama-bias", "mistral-window", "qwen2", "qwen3"])
def test_joined_engines_equal_single_ones(tiny, tmp_path, variant, exits):
    made = tiny(variant)
    engine = joined_copy(made, tmp_path / "engines", exits)
    assert engine.manifest.boundaries == (*exits, 4)
    for found, expected in zip(run(engine, PROMPT), run(made.engine, PROMPT), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_joined_engines_are_wide_too(tiny, tmp_path):
    made = tiny("llama", precision="int4")
    engine = joined_copy(made, tmp_path / "engines", (2,))
    prompt = PROMPT * 3
    for found, expected in zip(run(engine, prompt), run(made.engine, prompt), strict=True):
        np.testing.assert_allclose(found, expected, atol=2e-2 * np.abs(expected).max())
    wide = engine.manifest.layer_stages[0].wide_file
    levels = {
        attribute.i
        for node in onnx.load(tmp_path / "engines" / wide, load_external_data=False).graph.node
        for attribute in node.attribute
        if attribute.name == "accuracy_level"
    }
    assert levels == {0}


def test_seams_are_fused_and_weights_stay_where_they_are(tiny, tmp_path):
    made = tiny("llama")
    engine = joined_copy(made, tmp_path / "engines", ())
    (stage,) = engine.manifest.layer_stages
    graph = onnx.load(tmp_path / "engines" / stage.file, load_external_data=False).graph
    ops = [node.op_type for node in graph.node]
    assert ops.count("SkipSimplifiedLayerNormalization") == 7  # all but the first of 8 norms
    assert ops.count("Add") == 1  # the last residual
    names = [tensor.name for tensor in graph.initializer]
    assert sum("cos_cache" in name for name in names) == 1
    stages = "stages/*.data"
    before = {path.name for path in made.folder.glob(stages)}
    assert {path.name for path in (tmp_path / "engines").glob(stages)} == before


def calibrate(folder, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    lines = (json.dumps({"prompt": f"{n % 7} {n}: x {n % 5}: y {n}:"}) for n in range(120))
    prompts.write_text("\n".join(lines))
    request = CalibrationRequest(files=(prompts,), target_agreement=0.6)
    return recalibrate(folder, load_manifest(folder), request, SilentReporter())


def test_calibration_joins_what_has_no_exit_in_between(tiny, tmp_path):
    folder = tmp_path / "engines"
    shutil.copytree(tiny("llama").folder, folder)
    first = calibrate(folder, tmp_path)
    exits = tuple(point.exit_layer for point in first.exit.points)
    assert first.boundaries == (*exits, 4)
    assert len(first.cut) == 4
    again = calibrate(folder, tmp_path)  # starts from the cut, not from what was joined
    assert again.boundaries == first.boundaries
    verify_files(folder, load_manifest(folder), sha256=True)
    on_disk = {path.relative_to(folder).as_posix() for path in (folder / "stages").glob("*.onnx")}
    assert on_disk == {n for n in again.files if n.startswith("stages/") and n.endswith(".onnx")}


def test_a_fixed_number_of_layers_per_engine_is_kept(tiny, tmp_path):
    folder = tmp_path / "engines"
    shutil.copytree(tiny("llama", layers_per_engine=1).folder, folder)
    assert calibrate(folder, tmp_path).joined == ()
