"""`--prefill int8`: prompts are read by 8-bit weights and activations."""

from __future__ import annotations

import dataclasses
import shutil

import numpy as np
import onnx
import pytest

from adainfer_export.calibrate.exit_files import join_calibrated
from adainfer_export.export import ExportRequest, export
from adainfer_export.int8 import dequantise_int8, quantise_int8
from adainfer_export.lower.int8_products import INT8_WIDE_ROWS
from adainfer_export.storage import StorageRequest
from adainfer_runtime import Engine
from adainfer_runtime.backends import ort_cpu
from adainfer_runtime.engine_folder import load_manifest, write_manifest
from tests.reference import reference_logits

INT8 = StorageRequest(prefill="int8")
PROMPT = [int(token) for token in np.random.default_rng(0).integers(2, 320, 40)]


def logits_of(engine, prompt):
    session = engine.session()
    session.extend(prompt)
    session.complete()
    return engine.backend.probe_logits(session.hidden())


def operators(folder, file):
    return [node.op_type for node in onnx.load(folder / file, load_external_data=False).graph.node]


def error(engine, expected, prompt=PROMPT):
    """Of the logits, as a share of their size."""
    difference = logits_of(engine, prompt) - expected
    return float(np.sqrt((difference**2).mean() / (expected**2).mean()))


def test_codes_are_within_half_a_step():
    weight = np.random.default_rng(0).normal(size=(24, 40)).astype(np.float32)
    weight[3] = 0.0
    codes, scales = quantise_int8(weight)
    assert (codes.dtype, codes.shape, scales.shape) == (np.int8, (40, 24), (1, 24))
    assert np.abs(codes).max() == 127
    found = dequantise_int8(codes, scales)
    assert (np.abs(found - weight) <= scales.T * 0.501).all()
    assert not found[3].any()


@pytest.mark.parametrize("precision", ["int4", "int8"])
@pytest.mark.parametrize("variant", ["llama", "llama-bias", "qwen2", "qwen3", "mistral-window"])
def test_prompts_are_nearer_to_the_float_model(tiny, variant, precision):
    """Than 4 bits by far; 8-bit blocks with a scale each are a little better."""
    made = tiny(variant, precision=precision, storage=INT8)
    expected = reference_logits(made.reference, PROMPT)
    assert error(made.engine, expected) < 0.12
    plain = tiny(variant, precision=precision).engine
    factor = 0.4 if precision == "int4" else 1.5
    assert error(made.engine, expected) < factor * error(plain, expected)


def test_layers_alone_lose_what_8_bits_lose(tiny):
    made = tiny("llama", precision="int4", storage=INT8)
    exact = tiny("llama").engine  # fp32

    def hidden(engine, start, rows):
        buffers = engine.backend.open_sequence()
        buffers.hidden(0, rows)[:] = start
        buffers.run_stage(0, rows, 0)
        return buffers.hidden(1, rows).copy()

    rows = np.random.default_rng(1).normal(size=(INT8_WIDE_ROWS, 64)).astype(np.float32)
    found, expected = hidden(made.engine, rows, len(rows)), hidden(exact, rows, len(rows))
    moved = np.linalg.norm(expected - rows)
    assert np.linalg.norm(found - expected) < 0.03 * moved
    few = rows[: INT8_WIDE_ROWS - 1]
    assert np.linalg.norm(
        hidden(made.engine, few, len(few)) - hidden(exact, few, len(few))
    ) > 0.06 * np.linalg.norm(hidden(exact, few, len(few)) - few)  # 4 bits


def test_positions_of_zeros_stay_finite(tiny):
    engine = tiny("llama", precision="int4", storage=INT8).engine
    buffers = engine.backend.open_sequence()
    rows = buffers.hidden(0, INT8_WIDE_ROWS)
    rows[:] = 0.0
    rows[3] = 1e4  # and an outlier touches its own position alone
    buffers.run_stage(0, INT8_WIDE_ROWS, 0)
    assert np.isfinite(buffers.hidden(1, INT8_WIDE_ROWS)).all()
    assert not buffers.hidden(1, INT8_WIDE_ROWS)[:3].any()


def test_what_is_written(tiny):
    made = tiny("llama", precision="int4", storage=INT8)
    manifest = made.engine.manifest
    assert manifest.quantisation.prefill == "int8"
    assert manifest.quantisation.wide_rows == INT8_WIDE_ROWS
    stage = manifest.layer_stages[0]
    wide = operators(made.folder, stage.wide_file)
    assert wide.count("MatMulIntegerToFloat") == operators(made.folder, stage.file).count(
        "MatMulNBits"
    )
    assert "MatMulNBits" not in wide
    assert f"stages/{stage.name}.wide.data" in manifest.files
    plain = tiny("llama", precision="int4").engine.manifest
    assert stage.multiply_adds == plain.layer_stages[0].multiply_adds


def test_sensitive_layers_too(tiny):
    storage = dataclasses.replace(INT8, int8_layers=frozenset({2}))
    made = tiny("llama", precision="int4", storage=storage)
    for stage in made.engine.manifest.stages:
        if stage.kind == "layers":
            assert "MatMulNBits" not in operators(made.folder, stage.wide_file)


def test_joined_engines_equal_single_ones(tiny, tmp_path):
    made = tiny("llama", precision="int4", storage=INT8)
    shutil.copytree(made.folder, tmp_path / "engines")
    manifest = load_manifest(made.folder).model_copy(update={"layers_per_engine": None})
    write_manifest(tmp_path / "engines", join_calibrated(tmp_path / "engines", manifest))
    joined = Engine.load(tmp_path / "engines", verify=True)
    assert len(joined.manifest.layer_stages) == 1
    wide = joined.manifest.layer_stages[0].wide_file
    assert "SkipSimplifiedLayerNormalization" in operators(tmp_path / "engines", wide)
    expected = logits_of(made.engine, PROMPT)
    # Sums in another order may round an activation to the code beside.
    assert np.abs(logits_of(joined, PROMPT) - expected).max() < 0.05 * np.abs(expected).max()


def test_small_machines_read_in_8_bits_too(tiny, monkeypatch):
    """What the exits were certified on comes from these weights."""
    monkeypatch.setattr(ort_cpu, "memory_limit", lambda: 1 << 20)
    folder = tiny("llama", precision="int4", storage=INT8).folder
    for low_memory, twice in ((None, True), (True, False)):
        backend = Engine.load(folder, low_memory=low_memory).backend
        assert (backend.stage(0, INT8_WIDE_ROWS) is not backend.stage(0, 1)) is twice


def test_layers_are_written_again_with_both_copies(tiny, tmp_path):
    made = tiny("llama", precision="int4", storage=INT8)
    folder = tmp_path / "engines"
    shutil.copytree(made.folder, folder)
    lost = [folder / "stages" / f"layer_002{copy}.data" for copy in ("", ".wide")]
    for path in lost:
        path.write_bytes(b"")
    manifest = load_manifest(folder)
    request = ExportRequest(
        str(made.checkpoint),
        folder,
        storage=INT8,
        layers=(2, 2),
        layers_per_engine=manifest.layers_per_engine,
        max_seq_len=manifest.max_seq_len,
    )
    export(request)
    Engine.load(folder, verify=True)
    with pytest.raises(Exception, match="quantisation"):
        export(dataclasses.replace(request, storage=StorageRequest()))
