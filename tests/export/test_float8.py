"""Weights and products of 8-bit floats, on ONNX Runtime's CPU provider."""

from __future__ import annotations

import json
import shutil
from collections import Counter

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adainfer_export import ExportRequest, export
from adainfer_export.calibrate.torch_stage import read_torch_stage
from adainfer_export.errors import LoweringError, UnsupportedError
from adainfer_export.float8 import FLOAT8_UNIT, dequantise_float8, quantise_float8
from adainfer_export.lower import TARGETS, find_target
from adainfer_export.lower.float8 import Float8Products
from adainfer_export.lower.graph import find_linears, insert_before, remove_dead_nodes, take_over
from adainfer_export.presets import find_preset, fitting_length
from adainfer_export.storage import StorageRequest
from adainfer_runtime import Engine
from adainfer_runtime.backends.ort_cpu import open_session
from adainfer_runtime.engine_folder import QUANTISATION_REPORT

from ..checkpoints import VARIANTS
from ..reference import float8_reference, reference_logits, round_rows
from .test_presets import LLAMA2_7B

PROMPT = [5, 17, 200, 43, 9, 120, 77, 31, 250, 8, 61, 13, 99, 301, 4, 18, 230, 71]
CASES = [("tensorrt", variant) for variant in VARIANTS if variant != "opt-350m"]
CASES += [("tensorrt-basic", variant) for variant in ("llama-bias", "qwen3", "opt", "gemma3")]


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**31), scale=st.sampled_from([1e-9, 1e-3, 1.0, 300.0]))
def test_the_error_is_at_most_half_a_step(seed, scale):
    weight = np.random.default_rng(seed).normal(size=(5, 48)).astype(np.float32) * scale
    codes, scales = quantise_float8(weight)
    assert (codes.shape, scales.shape) == ((48, 5), (1, 5))
    assert (codes.dtype, scales.dtype) == (ml_dtypes.float8_e4m3fn, np.float16)
    assert (scales > 0).all()  # TensorRT takes positive scales alone
    error = np.abs(dequantise_float8(codes, scales) - weight)
    # Three digits behind the first; below 2**-6 of a unit, steps of 2**-9.
    step = scales.astype(np.float32).T * FLOAT8_UNIT
    largest = np.abs(weight).max(axis=1, keepdims=True)
    clipped = np.maximum(0, np.abs(weight) - 448 * step)  # by a scale that was rounded down
    assert (error <= np.abs(weight) / 16 + step * 2.0**-10 + clipped + 1e-12).all()
    assert (clipped <= largest * 2.0**-11).all()


def test_codes_are_rounded_to_even_and_saturate():
    row = [448.0, 17.0, 19.0, -(2.0**-9), 2.0**-10, 0.0]  # steps of 2 from 16 on, of 2**-9 below
    weight = np.array([row], np.float32) * np.float32(FLOAT8_UNIT)
    codes, scales = quantise_float8(weight)
    assert scales.tolist() == [[1.0]]
    assert codes.astype(np.float32)[:, 0].tolist() == [448, 16, 20, -(2.0**-9), 0, 0]
    # A scale that is rounded down would ask for more than the largest code.
    wide = np.linspace(1, 2, 999, dtype=np.float32)[:, None]
    codes, _ = quantise_float8(wide)
    assert np.isfinite(codes.astype(np.float32)).all()
    assert codes.astype(np.float32).max() == 448


def test_rows_of_zeros_stay_zero():
    codes, scales = quantise_float8(np.zeros((2, 8), np.float32))
    assert not dequantise_float8(codes, scales).any()
    assert (scales > 0).all()


def test_a_product_is_that_of_the_rounded_operands(tmp_path):
    """In float32, so that both sides round alike: also an outlier, and a position of zeros."""
    random = np.random.default_rng(3)
    weight = random.normal(size=(24, 48)).astype(np.float32)
    hidden = random.normal(size=(1, 7, 48)).astype(np.float32)
    hidden[0, 2, 5], hidden[0, 4] = 3e4, 0.0
    session = open_session(one_product(weight, tmp_path))
    (found,) = session.run(None, {"hidden": hidden})
    stored = dequantise_float8(*quantise_float8(weight, np.float32))
    expected = round_rows(torch.from_numpy(hidden)).numpy() @ stored.T
    assert np.abs(found - expected).max(axis=-1) == pytest.approx(0, abs=1e-2)  # of 3e4
    others = [0, 1, 3, 4, 5, 6]  # are not touched by the outlier
    np.testing.assert_allclose(found[0, others], expected[0, others], atol=1e-4)
    assert not found[0, 4].any()
    exact = hidden @ weight.T
    error = np.square(found - exact).sum(-1) / np.maximum(np.square(exact).sum(-1), 1e-9)
    assert (np.sqrt(error) < 0.06).all()


def test_torch_computes_the_same_product_and_passes_gradients(tmp_path):
    """As what is distilled through layers needs it; in float32 both round alike."""
    random = np.random.default_rng(4)
    weight = random.normal(size=(24, 48)).astype(np.float32)
    hidden = random.normal(size=(1, 5, 48)).astype(np.float32)
    session = open_session(one_product(weight, tmp_path))
    (expected,) = session.run(None, {"hidden": hidden})
    stage = read_torch_stage(tmp_path / "one.onnx")
    values = torch.from_numpy(hidden).requires_grad_()
    found = stage(values, None)
    np.testing.assert_allclose(found.detach().numpy(), expected, atol=1e-4)
    found.sum().backward()
    # As if nothing were rounded, but for the largest value, by which all are divided.
    stored = dequantise_float8(*quantise_float8(weight, np.float32)).sum(axis=0)
    others = np.abs(hidden) < np.abs(hidden).max(axis=-1, keepdims=True)
    np.testing.assert_allclose(
        values.grad.numpy()[others], np.broadcast_to(stored, hidden.shape)[others], atol=1e-4
    )


def one_product(weight, folder):
    """A graph that multiplies by the weight as `Float8Products` has it; its file."""
    rows = ir.Shape([1, "tokens", weight.shape[1]])
    hidden = ir.Value(name="hidden", type=ir.TensorType(ir.DataType.FLOAT), shape=rows)
    stored = ir.Value(name="w", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(weight.shape))
    transpose = ir.Node("", "Transpose", [stored])
    product = ir.Node("", "MatMul", [hidden, transpose.outputs[0]])
    output = product.outputs[0]
    output.name, output.type = "y", ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph(
        [hidden],
        [output],
        nodes=[transpose, product],
        initializers=[stored],
        opset_imports={"": 21},
        name="one",
    )
    (linear,) = find_linears(graph)
    nodes = Float8Products(graph, "float32", {}).nodes(linear)
    insert_before(product, nodes)
    take_over(output, nodes[-1].outputs[0])
    remove_dead_nodes(graph)
    codes, scales = quantise_float8(weight, np.float32)
    for name, array in (("w.float8", codes), ("w.output_scales", scales)):
        graph.initializers[name].const_value = ir.tensor(array, name=name)
    path = folder / "one.onnx"
    ir.save(ir.Model(graph, ir_version=10), path)
    return path


@pytest.mark.parametrize(("target", "variant"), CASES)
def test_the_engine_equals_its_dequantised_weights(tiny, tmp_path, target, variant):
    """Without the rounding of activations, which float16 and float32 would do differently."""
    made = tiny(variant, target=target, precision="fp8")
    shutil.copytree(made.folder, tmp_path / "engines")
    manifest = made.engine.manifest
    for stage in manifest.cut:
        leave_activations(tmp_path / "engines" / stage.file)
    engine = Engine.of_manifest(tmp_path / "engines", manifest)
    expected = reference_logits(float8_reference(made, rounded=False), PROMPT)
    assert np.abs(logits(engine) - expected).max() <= 0.01 * np.abs(expected).max()


def leave_activations(path):
    """Takes the rounding of activations out of a stage."""
    model = ir.load(path)
    for node in [node for node in model.graph if node.op_type == "QuantizeLinear"]:
        (back,) = (use.node for use in node.outputs[0].uses())
        ir.convenience.replace_all_uses_with(back.outputs[0], node.inputs[0])
    remove_dead_nodes(model.graph)
    ir.save(model, path)


def logits(engine):
    session = engine.session()
    session.extend(PROMPT[:11])
    session.extend(PROMPT[11:])
    session.complete()
    return engine.backend.probe_logits(session.hidden())


@pytest.mark.parametrize("target", ["tensorrt", "tensorrt-basic"])
@pytest.mark.parametrize("variant", ["llama", "qwen3", "gpt2"])
def test_the_engine_loses_what_rounding_loses(tiny, target, variant):
    made = tiny(variant, target=target, precision="fp8")
    exact = reference_logits(made.reference, PROMPT)
    expected = reference_logits(float8_reference(made, rounded=True), PROMPT)
    lost, allowed = (np.square(found - exact).mean() for found in (logits(made.engine), expected))
    assert lost <= 4 * allowed  # twice the distance


@pytest.mark.parametrize("target", ["tensorrt", "tensorrt-basic"])
def test_products_stand_between_scalar_scales(tiny, target):
    """What TensorRT recognises: Q and DQ of the activation, DQ of the weight, one number each."""
    made = tiny("llama", target=target, precision="fp8")
    model = ir.load(made.folder / made.engine.manifest.cut[0].file)
    counts = Counter(node.op_type for node in model.graph)
    assert counts["QuantizeLinear"] == 4  # Q, K and V share one, gate and up another
    assert counts["DequantizeLinear"] == 7 + 4
    units = [
        node.inputs[1]
        for node in model.graph
        if node.op_type in ("QuantizeLinear", "DequantizeLinear")
    ]
    assert {float(unit.const_value.numpy()) for unit in units} == {FLOAT8_UNIT}
    assert {unit.dtype for unit in units} == {ir.DataType.FLOAT16}
    assert len(set(units)) == len(units)  # TensorRT has crashed on shared ones
    stored = [value.dtype for value in model.graph.initializers.values() if value.shape.rank() == 2]
    assert stored.count(ir.DataType.FLOAT8E4M3FN) == 7


def test_a_position_is_not_disturbed_by_its_neighbours(tiny):
    """Scales are a position's own: one at a time gives what one pass gives."""
    engine = tiny("llama", target="tensorrt", precision="fp8").engine
    sessions = [engine.session() for _ in range(2)]
    sessions[0].extend(PROMPT)
    for token in PROMPT:
        sessions[1].extend([token])
        sessions[1].complete()
    sessions[0].complete()
    last = [np.array(session.hidden()) for session in sessions]
    assert np.abs(last[0][-1] - last[1][-1]).max() <= 0.03 * np.abs(last[0]).max()


def test_weights_take_half_the_bytes_and_the_report_names_every_matrix(tiny):
    sizes = {}
    for precision in ("fp16", "fp8"):
        made = tiny("llama", target="tensorrt", precision=precision)
        stored = ir.load(made.folder / made.engine.manifest.cut[0].file).graph.initializers
        sizes[precision] = sum(value.const_value.nbytes for value in stored.values())
    assert sizes["fp8"] < 0.55 * sizes["fp16"]
    report = json.loads((made.folder / QUANTISATION_REPORT).read_text())
    assert [entry["place"] for entry in report["summary"]] == [f"layer {n}" for n in (1, 2, 3, 4)]
    assert {tuple(entry["bits"]) for entry in report["summary"]} == {(8,)}
    assert all(0.02 < entry["relative_error"] < 0.04 for entry in report["summary"])
    assert len(report["matrices"]) == 4 * 7
    assert {matrix["block_size"] for matrix in report["matrices"]} == {64, 96}  # whole rows


def test_joined_engines_keep_their_scales(tiny, tmp_path):
    """Names of scales are those of weights: layers in one graph do not share any."""
    made = tiny("llama", target="tensorrt", precision="fp8")
    request = ExportRequest(
        str(made.checkpoint),
        tmp_path / "engines",
        target="tensorrt",
        precision="fp8",
        layers_per_engine=4,
    )
    export(request)
    hidden = []
    for engine in (made.engine, Engine.load(tmp_path / "engines")):
        session = engine.session()
        session.extend(PROMPT)
        session.complete()
        hidden.append(np.array(session.hidden()))
    np.testing.assert_allclose(hidden[0], hidden[1], atol=1e-3 * np.abs(hidden[0]).max())


@pytest.mark.parametrize("name", [t.name for t in TARGETS if not t.name.startswith("tensorrt")])
def test_other_targets_say_what_they_take(name):
    with pytest.raises(UnsupportedError, match=f"target {name} does not take precision 'fp8'; it"):
        find_target(name, "fp8")


def test_a_lost_scale_is_noticed(tiny):
    made = tiny("llama", target="tensorrt", precision="fp8")
    graph = ir.load(made.folder / made.engine.manifest.cut[0].file).graph
    _, dialect, record = find_target("tensorrt", "fp8")
    dialect.check_layers(graph, 1, record)
    product = next(node for node in graph if node.op_type == "MatMul")
    product.replace_input_with(1, product.inputs[1].producer().inputs[0])
    remove_dead_nodes(graph)
    with pytest.raises(LoweringError, match="found 10 of operator DequantizeLinear, expected 11"):
        dialect.check_layers(graph, 1, record)


@pytest.mark.parametrize("board", ["jetson-orin", "jetson-orin-nano"])
def test_boards_without_8_bit_floats_are_refused(checkpoint, tmp_path, board):
    preset = find_preset(board)
    request = ExportRequest(
        str(checkpoint), tmp_path / "out", target=preset.target, precision="fp8", preset=preset
    )
    match = f"preset {board}: precision fp8 needs a GPU of SM 89 or later, .*has SM 87; export with"
    with pytest.raises(UnsupportedError, match=match):
        export(request)
    assert not (tmp_path / "out").exists()


def test_thor_takes_them(checkpoint, tmp_path):
    preset = find_preset("jetson-thor")
    request = ExportRequest(
        str(checkpoint), tmp_path / "out", target=preset.target, precision="fp8", preset=preset
    )
    assert export(request).manifest.precision == "fp8"
    assert fitting_length(preset, LLAMA2_7B, "fp8", preset.target) == 8192


def test_settings_of_integer_blocks_are_refused(checkpoint, tmp_path):
    request = ExportRequest(
        str(checkpoint),
        tmp_path / "out",
        target="tensorrt",
        precision="fp8",
        storage=StorageRequest(block_size=64),
    )
    with pytest.raises(UnsupportedError, match="are for int4 and int8, not fp8"):
        export(request)
