"""Decoders that are ONNX already are split as they are."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import onnx
import pytest

from adainfer_export import ExportRequest, export
from adainfer_export.errors import CheckpointError, UnsupportedError
from adainfer_runtime import Engine
from adainfer_runtime.backends.ort_cpu import open_session

from ..checkpoints import make_checkpoint
from ..genai_folder import write_genai_folder
from ..reference import reference_logits

OFFLINE = {"HF_HUB_OFFLINE": "1"}
PROMPT = [5, 99, 17, 250, 3, 3, 42, 180]


@pytest.fixture(params=[True, False], ids=["int4", "fp32"])
def folder(request, tmp_path):
    """A folder of genai's form, made from a tiny Llama."""
    model = make_checkpoint(tmp_path / "checkpoint", "llama")
    write_genai_folder(tmp_path / "genai", model, quantised=request.param)
    return tmp_path / "genai"


def split(folder, out, **settings):
    export(ExportRequest(str(folder), out, **{"precision": "keep", **settings}))
    return Engine.load(out, verify=True)


def unsplit_logits(folder):
    """What ONNX Runtime computes on the graph as it was."""
    session = open_session(folder / "model.onnx")
    feed = {
        "input_ids": np.array([PROMPT]),
        "attention_mask": np.ones((1, len(PROMPT)), np.int64),
    }
    for value in session.get_inputs()[2:]:
        feed[value.name] = np.zeros((1, value.shape[1], 0, value.shape[3]), np.float32)
    return session.run(["logits"], feed)[0][0]


@pytest.mark.parametrize("per_engine", [None, 3])
def test_the_chain_equals_the_graph_that_was_split(folder, tmp_path, per_engine):
    engine = split(folder, tmp_path / "out", layers_per_engine=per_engine)
    for stage in (tmp_path / "out" / "stages").glob("*.onnx"):
        onnx.checker.check_model(str(stage))
    expected = unsplit_logits(folder)
    session = engine.session()
    session.extend(PROMPT[:5])
    session.complete()
    session.extend(PROMPT[5:])
    session.complete()
    logits = engine.backend.probe_logits(session.hidden())
    np.testing.assert_allclose(logits[-1], expected[-1], atol=2e-5 * np.abs(expected).max())
    labels = np.array([7, 300, 12])
    chosen = engine.backend.probe_candidates(session.hidden()[-1], labels)
    np.testing.assert_allclose(chosen.logits, expected[-1, labels], atol=1e-3)
    assert engine.manifest.source.kind == "onnx"
    assert {file.name for file in engine.manifest.source.files} == {
        "genai_config.json",
        "model.onnx",
        "model.onnx.data",
    }


def test_what_mobius_wrote_for_onnxruntime_genai_is_split(tmp_path):
    """Another builder of the same form: other node names, other norms, fused Q, K and V."""
    checkpoint, folder = tmp_path / "checkpoint", tmp_path / "mobius"
    model = make_checkpoint(checkpoint, "llama")
    command = [sys.executable, "-m", "mobius", "build", "--config", str(checkpoint), str(folder)]
    command += ["--ep", "cpu", "--runtime", "ort-genai"]
    subprocess.run(command, check=True, capture_output=True, env=os.environ | OFFLINE)
    engine = split(folder, tmp_path / "out")
    assert engine.manifest.boundaries == (1, 2, 3, 4)
    session = engine.session()
    session.extend(PROMPT[:5])
    session.advance(2)
    session.extend(PROMPT[5:])
    session.complete()
    logits = engine.backend.probe_logits(session.hidden())
    np.testing.assert_allclose(logits, reference_logits(model, PROMPT), atol=1e-4)


def test_products_stay_as_they_are(folder, tmp_path):
    split(folder, tmp_path / "out")
    source = onnx.load(folder / "model.onnx", load_external_data=False).graph
    kinds = ("MatMul", "MatMulNBits", "GroupQueryAttention", "Sigmoid")
    count = {kind: sum(node.op_type == kind for node in source.node) for kind in kinds}
    for path in (tmp_path / "out" / "stages").glob("layer_*.onnx"):
        for node in onnx.load(path, load_external_data=False).graph.node:
            if node.op_type in kinds:
                count[node.op_type] -= 1
    head = {"MatMul": 1, "MatMulNBits": 0} if count["MatMul"] else {"MatMul": 0, "MatMulNBits": 1}
    assert count == {**head, "GroupQueryAttention": 0, "Sigmoid": 0}


def test_early_exits_fill_the_cache(folder, tmp_path):
    """Deferred fills over forced exits: the same text as without."""
    engine = split(folder, tmp_path / "out")
    session = engine.session()
    session.extend(PROMPT[:4])
    session.advance(2)
    session.extend(PROMPT[4:])
    session.complete()
    expected = unsplit_logits(folder)[-1]
    found = engine.backend.probe_logits(session.hidden()[-1:])[0]
    np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize("folder", [True], indirect=True)
def test_refusals(folder, tmp_path):
    def refused(error, match, **settings):
        with pytest.raises(error, match=match) as caught:
            split(folder, tmp_path / "out", **settings)
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "out").exists()

    refused(UnsupportedError, "split as it is: export with --precision keep", precision="int4")
    path = folder / "genai_config.json"
    settings = json.loads(path.read_text())
    settings["model"]["decoder"]["num_hidden_layers"] = 5
    path.write_text(json.dumps(settings))
    refused(UnsupportedError, "found 4 of operator GroupQueryAttention, expected 5")
    settings["model"]["decoder"]["filename"] = "../model.onnx"
    path.write_text(json.dumps(settings))
    refused(CheckpointError, "is no file name")
    path.write_text("{}")
    refused(CheckpointError, "describes no decoder")
    path.unlink()
    refused(UnsupportedError, "holds an ONNX model without genai_config.json")


@pytest.mark.parametrize("folder", [True], indirect=True)
def test_truncated_data(folder, tmp_path):
    path = folder / "model.onnx.data"
    path.write_bytes(path.read_bytes()[:-4096])
    with pytest.raises(CheckpointError, match="missing or truncated: export it again"):
        split(folder, tmp_path / "out")
