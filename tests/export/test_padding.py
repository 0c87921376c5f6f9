"""Feed-forward widths that blocks do not divide."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from adainfer_export import ExportRequest, export
from adainfer_export.decoders.views import View
from adainfer_export.errors import UnsupportedError
from adainfer_export.validate import validate_folder
from adainfer_runtime import Engine

from .. import checkpoints
from ..checkpoints import make_checkpoint
from ..reference import reference_logits

PROMPT = [5, 17, 200, 43, 9, 120, 77, 31, 250, 8, 61, 13, 99, 301, 4, 18, 230, 71]
# Families whose networks differ: gated or not, with biases, fused, stored as [in, out].
FORMS = {
    "llama": {"intermediate_size": 37},
    "llama-bias": {"intermediate_size": 80, "hidden_act": "gelu_pytorch_tanh"},
    "phi3": {"intermediate_size": 50},
    "gpt2": {"n_inner": 37},
}


def exported(folder, variant, precision, **settings):
    model = make_checkpoint(folder / "checkpoint", variant, tokenizer=False, **settings)
    request = ExportRequest(str(folder / "checkpoint"), folder / "out", precision=precision)
    export(request)
    return model, Engine.load(folder / "out")


def logits(engine):
    session = engine.session()
    session.extend(PROMPT)
    session.complete()
    return engine.backend.probe_logits(session.hidden())


@pytest.mark.parametrize("variant", FORMS)
def test_widths_that_blocks_do_not_divide(tmp_path, variant):
    model, engine = exported(tmp_path, variant, "int8", **FORMS[variant])
    expected = reference_logits(model, PROMPT)
    assert np.abs(logits(engine) - expected).max() <= 0.08 * np.abs(expected).max()
    graph = onnx.load(tmp_path / "out" / "stages" / "layer_001.onnx", load_external_data=False)
    widths = {
        attribute.i
        for node in graph.graph.node
        for attribute in node.attribute
        if node.op_type == "MatMulNBits" and attribute.name == "K"
    }
    width = next(iter(size for size in FORMS[variant].values() if isinstance(size, int)))
    assert widths == {64, -(-width // 32) * 32}


def test_layers_that_a_pruning_tool_left(tmp_path, monkeypatch):
    widths = {0: (4, 2, 80), 1: (2, 1, 37), 3: (4, 2, 64)}
    monkeypatch.setitem(checkpoints.PRUNED, "llama", widths)
    model, engine = exported(tmp_path, "llama", "int4")
    assert np.corrcoef(logits(engine).ravel(), reference_logits(model, PROMPT).ravel())[0, 1] > 0.9
    assert validate_folder(tmp_path / "out", str(tmp_path / "checkpoint")).passed
    # The zeros are multiplied, and counted.
    layers = [stage.multiply_adds for stage in engine.manifest.layer_stages]
    attention = 64 * (64 + 2 * 32) + 64 * 64
    assert layers[0] == layers[2] == attention + 3 * 64 * 96
    assert layers[3] == attention + 3 * 64 * 64


@pytest.mark.parametrize("target", ["ort-cuda", "tensorrt"])
def test_widths_in_standard_operators(tmp_path, target):
    make_checkpoint(tmp_path / "checkpoint", "llama", tokenizer=False, intermediate_size=37)
    request = ExportRequest(str(tmp_path / "checkpoint"), tmp_path / "out", target, "int4")
    assert export(request).manifest.precision == "int4"


def test_heads_are_not_padded(tmp_path, monkeypatch):
    monkeypatch.setitem(checkpoints.PRUNED, "llama", {1: (1, 1, 96)})
    make_checkpoint(tmp_path / "checkpoint", "llama", tokenizer=False)
    request = ExportRequest(str(tmp_path / "checkpoint"), tmp_path / "out")
    with pytest.raises(UnsupportedError, match=r"layers\.1\.self_attn\.o_proj\.weight: width 16 .*"
                       "feed-forward widths alone are padded"):  # fmt: skip
        export(request)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("transposed", [False, True])
def test_zeros_behind_rows_and_columns(transposed):
    matrix = np.arange(15, dtype=np.float32).reshape(5, 3)
    stored = matrix.T.copy() if transposed else matrix
    view = View("w", stored.shape, transposed=transposed, rows=(1, 5), padded=(8, 4))
    expected = np.pad(matrix[1:], ((0, 4), (0, 1)))
    assert view.result == (8, 4)
    np.testing.assert_array_equal(view.of(stored), expected)
    for start in range(8):
        for stop in range(start + 1, 9):
            rows = slice(start, stop)
            np.testing.assert_array_equal(view.of(stored, rows), expected[rows])
