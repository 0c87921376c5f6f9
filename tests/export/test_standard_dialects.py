"""The dialects in standard operators, on ONNX Runtime's CPU provider, against `ort-cpu`."""

from __future__ import annotations

import copy
import shutil
from collections import Counter

import numpy as np
import onnx_ir as ir
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adainfer_export import ExportRequest, export
from adainfer_export.calibrate import CalibrationRequest
from adainfer_export.calibrate.pipeline import recalibrate
from adainfer_export.errors import UnsupportedError
from adainfer_export.int4 import dequantise_int4, quantise_int4
from adainfer_export.join import join_engines
from adainfer_export.lower import find_target
from adainfer_export.progress import SilentReporter
from adainfer_runtime import Engine
from adainfer_runtime.engine_folder import load_manifest
from adainfer_runtime.errors import DeviceError
from adainfer_runtime.evaluation import evaluate, make_methods
from adainfer_runtime.tasks import TaskExample

from ..checkpoints import VARIANTS, make_checkpoint
from ..reference import reference_greedy, reference_logits

PROMPT = [5, 17, 200, 43, 9, 120, 77, 31, 250, 8, 61, 13, 99, 301, 4, 18, 230, 71]
STANDARD = [variant for variant in VARIANTS if variant != "opt-350m"]
FLOAT32 = [("onnx-std", "fp32"), ("tensorrt-basic", "fp32")]
HALF = [("tensorrt", "fp16"), ("tensorrt-basic", "fp16"), ("ort-cuda", "fp16")]
INT4 = [("tensorrt", "int4"), ("tensorrt-basic", "int4")]
FLOAT8 = [("tensorrt", "fp8"), ("tensorrt-basic", "fp8")]
PASSES = [(7, 0), (1, 7), (5, 8), (1, 13), (1, 14), (4, 15)]  # prefill, chunks, decode


def run_stage_by_stage(engine, passes, inputs):
    """Hidden states after every stage, each fed with the given inputs, and the filled caches."""
    buffers = engine.backend.open_sequence()
    found = []
    for (rows, past), hidden in zip(passes, inputs, strict=True):
        for index in range(len(engine.manifest.layer_stages)):
            buffers.hidden(index, rows)[:] = hidden
            buffers.run_stage(index, rows, past)
            found.append(np.array(buffers.hidden(index + 1, rows)))
    end = passes[-1][0] + passes[-1][1]
    caches = [
        np.array(part)
        for layer in range(1, engine.manifest.model.num_layers + 1)
        for part in buffers.kv(layer, end)
    ]
    return found, caches


def differences(made, reference, passes=PASSES):
    random = np.random.default_rng(0)
    inputs = [random.normal(size=(rows, 64)).astype(np.float32) for rows, _ in passes]
    mine = run_stage_by_stage(made.engine, passes, inputs)
    theirs = run_stage_by_stage(reference.engine, passes, inputs)
    hidden, caches = (
        max(float(np.abs(a - b).max()) for a, b in zip(x, y, strict=True))
        for x, y in zip(mine, theirs, strict=True)
    )
    return hidden, caches


@pytest.mark.parametrize(("target", "precision"), FLOAT32)
@pytest.mark.parametrize("variant", STANDARD)
def test_every_stage_equals_ort_cpu(tiny, variant, target, precision):
    made = tiny(variant, target=target, precision=precision)
    hidden, caches = differences(made, tiny(variant))
    assert hidden <= 1e-4
    assert caches <= 1e-4


@pytest.mark.parametrize(("target", "precision"), HALF)
@pytest.mark.parametrize("variant", ["llama", "llama-bias", "mistral-window", "qwen3"])
def test_half_precision_stays_within_its_tolerance(tiny, variant, target, precision):
    """fp16 has 11 digits: 2⁻¹⁰ of values around 8, a few roundings in a row."""
    hidden, caches = differences(tiny(variant, target=target, precision=precision), tiny(variant))
    assert hidden <= 0.03
    assert caches <= 0.03


@pytest.mark.parametrize(("target", "precision"), FLOAT32)
@pytest.mark.parametrize("variant", STANDARD)
def test_greedy_tokens_equal_transformers(tiny, variant, target, precision):
    made = tiny(variant, target=target, precision=precision)
    result = made.engine.generate(PROMPT, max_new_tokens=24, ignore_eos=True)
    assert list(result.tokens) == reference_greedy(made.reference, PROMPT, 24)


@pytest.mark.parametrize(("target", "precision"), INT4)
@pytest.mark.parametrize(("variant", "block_size"), [("llama-tied", 32), ("qwen2", 32)])
def test_int4_equals_its_dequantised_weights(tiny, variant, block_size, target, precision):
    made = tiny(variant, target=target, precision=precision)
    session = made.engine.session()
    session.extend(PROMPT)
    session.complete()
    model = copy.deepcopy(made.reference)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and "layers." in name:
                values = dequantise_int4(*quantise_int4(parameter.numpy(), block_size))
                parameter.copy_(torch.from_numpy(values))
    logits = made.engine.backend.probe_logits(session.hidden())
    expected = reference_logits(model, PROMPT)
    assert np.abs(logits - expected).max() <= 0.01 * np.abs(expected).max()


def test_cuda_int4_equals_that_of_cpus(tiny):
    """The same codes; scales are rounded to float16, activations are 16 bits against 8."""
    logits = []
    for target in ("ort-cuda", "ort-cpu"):
        engine = tiny("llama", target=target, precision="int4").engine
        session = engine.session()
        session.extend(PROMPT)
        session.complete()
        logits.append(session.hidden().copy())
    assert np.abs(logits[0] - logits[1]).max() <= 0.06 * np.abs(logits[1]).max()


@pytest.mark.parametrize(("target", "precision"), [*HALF, FLOAT32[0], *FLOAT8])
def test_joined_engines_equal_single_layers(tiny, tmp_path, target, precision):
    made = tiny("llama", target=target, precision=precision)
    folder = tmp_path / "engines"
    shutil.copytree(made.folder, folder)
    _, dialect, _ = find_target(target, precision)
    manifest = join_engines(folder, made.engine.manifest, dialect)
    assert len(manifest.joined) == 1
    model = ir.load(folder / manifest.joined[0].file)
    casts = sum(node.op_type == "Cast" for node in model.graph)
    if target == "ort-cuda":
        assert casts == 2  # into the engine and out of it
    hidden = []
    for engine in (made.engine, Engine.of_manifest(folder, manifest)):
        session = engine.session()
        session.extend(PROMPT)
        session.complete()
        hidden.append(session.hidden().copy())
    tolerance = 1e-4 if precision == "fp32" else 0.03
    np.testing.assert_allclose(hidden[0], hidden[1], atol=tolerance)


@pytest.mark.parametrize("block_size", [32, 64, 128])
@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), scale=st.sampled_from([1e-9, 1e-3, 1.0, 300.0]))
def test_int4_error_is_at_most_half_a_step(block_size, seed, scale):
    weight = np.random.default_rng(seed).normal(size=(6, 2 * block_size)).astype(np.float32) * scale
    packed, scales = quantise_int4(weight, block_size)
    assert packed.shape == (2 * block_size, 3)
    assert scales.dtype == np.float16
    assert (scales > 0).all()  # TensorRT takes positive scales alone
    step = np.repeat(scales.astype(np.float32), block_size, axis=0).T
    error = np.abs(dequantise_int4(packed, scales) - weight)
    # Rounding the scale to float16 may clip the extreme value by a thousandth of it.
    assert (error <= 0.5 * step + 8 * step * 2.0**-11 + 1e-12).all()


@pytest.mark.parametrize(("target", "precision"), [*FLOAT32, *HALF[:2], *INT4, *FLOAT8])
def test_stages_hold_standard_operators_that_the_target_takes(tiny, target, precision):
    made = tiny("qwen3", target=target, precision=precision)
    _, dialect, record = find_target(target, precision)
    for stage in made.engine.manifest.stages:
        model = ir.load(made.folder / stage.file)
        assert {node.domain for node in model.graph} == {""}
        assert model.opset_imports[""] == dialect.opset
        assert all(value.uses() for value in model.graph.inputs)  # TensorRT would ignore them
        counts = Counter(node.op_type for node in model.graph)
        if stage.kind == "layers":
            fused = target != "tensorrt-basic"
            assert counts["TensorScatter"] == (2 if fused else 0)
            assert counts["Attention"] == (1 if fused else 0)
            assert counts["RotaryEmbedding"] == (2 if fused else 0)
            weights, activations = 7 * bool(record.bits or record.float8), 4 * record.float8
            assert counts["QuantizeLinear"] == activations
            assert counts["DequantizeLinear"] == weights + activations
            assert counts["RMSNormalization"] == (4 if fused else 0)
        for node in model.graph:
            if node.op_type == "Attention":
                assert len(node.inputs) == 4  # Q, K, V and the mask: no past, no lengths
                assert len(node.outputs) == 1
            if node.op_type == "TensorScatter":
                cache = node.inputs[0]
                assert cache.is_graph_input()
                assert node.outputs[0].is_graph_output()
                assert list(cache.shape) == [1, 2, made.engine.manifest.kv.max_length, 16]


@pytest.mark.parametrize(("target", "precision"), [FLOAT32[0], HALF[1], HALF[2]])
def test_embedding_of_another_width_is_refused(tmp_path, target, precision):
    make_checkpoint(tmp_path / "checkpoint", "opt-350m")
    request = ExportRequest(
        str(tmp_path / "checkpoint"), tmp_path / "engines", target=target, precision=precision
    )
    with pytest.raises(UnsupportedError, match=r"project_in.weight: this target takes no proj"):
        export(request)
    assert not (tmp_path / "engines").exists()


def test_a_tied_table_is_stored_once(tiny):
    sizes = {
        variant: sum(
            path.stat().st_size
            for path in (tiny(variant, target="tensorrt", precision="fp16").folder / "stages").glob(
                "*.data"
            )
        )
        for variant in ("llama", "llama-tied")
    }
    table = 320 * 64 * 2
    assert sizes["llama"] - sizes["llama-tied"] == pytest.approx(table, abs=2 * 4096)


def test_bfloat16_graphs_are_the_float32_ones_with_rounded_weights(tiny, tmp_path):
    """ONNX Runtime has no bfloat16 products on CPUs: the types are widened, the graph is kept."""
    made = tiny("llama", target="tensorrt", precision="fp16")
    folder = tmp_path / "engines"
    export(ExportRequest(str(made.checkpoint), folder, target="tensorrt", precision="bf16"))
    with pytest.raises(DeviceError, match="no bfloat16 arithmetic on CPUs"):
        Engine.load(folder)
    manifest = load_manifest(folder)
    for stage in manifest.stages:
        widen_bfloat16(folder / stage.file)
    kv = manifest.kv.model_copy(update={"dtype": "float32"})
    tensors = tuple(
        tensor.model_copy(update={"dtype": "float32"}) if tensor.dtype != "bool" else tensor
        for tensor in manifest.pass_tensors
    )
    widened = manifest.model_copy(update={"kv": kv, "pass_tensors": tensors})
    engine = Engine.of_manifest(folder, widened)
    session = engine.session()
    session.extend(PROMPT)
    session.complete()
    model = copy.deepcopy(made.reference)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "proj" in name:
                parameter.copy_(parameter.bfloat16().float())
    logits = engine.backend.probe_logits(session.hidden())
    expected = reference_logits(model, PROMPT)
    assert np.abs(logits - expected).max() <= 0.01 * np.abs(expected).max()


def widen_bfloat16(path):
    model = ir.load(path)
    ir.external_data.load_to_model(model)
    narrow = ir.DataType.BFLOAT16

    def widen(value):
        if value.dtype == narrow:
            value.type = ir.TensorType(ir.DataType.FLOAT)

    for value in [*model.graph.inputs, *model.graph.initializers.values()]:
        if value.const_value is not None and value.dtype == narrow:
            array = value.const_value.numpy().astype(np.float32)
            value.const_value = ir.tensor(array, name=value.name)
        widen(value)
    for node in model.graph:
        if node.op_type == "Cast" and node.attributes["to"].as_int() == narrow.value:
            node.attributes["to"] = ir.AttrInt64("to", ir.DataType.FLOAT.value)
        for value in node.outputs:
            widen(value)
    ir.save(model, path)


@pytest.mark.parametrize(("target", "precision"), [FLOAT32[1], HALF[0], FLOAT8[0]])
def test_calibrated_exits_hold_standard_operators_and_run(tiny, tmp_path, target, precision):
    made = tiny("llama", target=target, precision=precision)
    folder = tmp_path / "engines"
    shutil.copytree(made.folder, folder)
    file = tmp_path / "prompts.jsonl"
    random = np.random.default_rng(1)
    words = ["".join(chr(97 + c) for c in random.integers(0, 26, 6)) for _ in range(160)]
    lines = [TaskExample(prompt=f"{w} {w[::-1]}", task="t") for w in words]
    file.write_text("".join(f'{{"prompt": "{line.prompt}"}}\n' for line in lines))
    request = CalibrationRequest(files=(file,), target_agreement=0.6, context_exit=True)
    manifest = recalibrate(folder, load_manifest(folder), request, SilentReporter())
    graphs = [classifier.graph for classifier in manifest.classifiers]
    graphs += [point.adapter for point in manifest.exit_points.values() if point.adapter]
    graphs += [point.translate for point in manifest.context_points.values() if point.translate]
    assert graphs
    for name in graphs:
        model = ir.load(folder / name)
        assert {node.domain for node in model.graph} == {""}
        assert model.opset_imports[""] <= 21
    engine = Engine.load(folder, verify=True)
    result = evaluate(make_methods(["adaptive"], folder, engine), lines[:20])["adaptive"]
    assert 0.0 <= result.mean.layers_saved < 1.0
