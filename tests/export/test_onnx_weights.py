"""Decoders that optimum exported: their weights are found again, whatever the exporter did."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper

from adainfer_export import ExportRequest, export
from adainfer_export.errors import CheckpointError, UnsupportedError
from adainfer_export.sources.onnx_weights import OnnxWeights
from adainfer_export.sources.tensor_files import TensorFiles
from adainfer_runtime import Engine

from ..checkpoints import edit_config, make_checkpoint
from ..optimum_folder import write_optimum_folder

VARIANTS = (
    "llama-tied", "llama-bias", "llama-pruned", "qwen2", "qwen3", "opt-350m", "gemma3", "gpt2",
    "gpt_neox",
)  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A tiny Llama's checkpoint, and the folder that optimum would make of it."""
    root = tmp_path_factory.mktemp("optimum")
    model = make_checkpoint(root / "checkpoint", "llama")
    write_optimum_folder(root / "onnx", root / "checkpoint", model)
    return root


@pytest.fixture
def folder(made, tmp_path):
    """A copy that a test may damage."""
    return Path(shutil.copytree(made / "onnx", tmp_path / "onnx"))


def split(source, out, **settings):
    export(ExportRequest(str(source), out, **{"precision": "fp32", **settings}))
    return Engine.load(out, verify=True)


def beside(folder, **settings):
    """Moves the graph's data to a file of its own."""
    graph = onnx.load(folder / "model.onnx")
    (folder / "model.onnx").unlink()
    settings = {"location": "model.onnx_data", "size_threshold": 0, **settings}
    onnx.save_model(graph, folder / "model.onnx", save_as_external_data=True, **settings)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_weight_is_found(variant, tmp_path):
    model = make_checkpoint(tmp_path / "checkpoint", variant)
    write_optimum_folder(tmp_path / "onnx", tmp_path / "checkpoint", model)
    expected = TensorFiles(tmp_path / "checkpoint")
    found = OnnxWeights(tmp_path / "onnx", "model.onnx")
    for name in expected.table:
        # Modules have other names than tensors: OPT's lack a part, GPT-NeoX's head has its own.
        others = (name, name.removeprefix("model."), name.replace("embed_out", "lm_head"))
        other = next(other for other in others if other in found.table)
        assert found.info(other).shape == expected.info(name).shape
        torch.testing.assert_close(found.read(other), expected.read(name), rtol=0, atol=3e-7)
    assert len(found.table) <= len(expected.table) + 1  # a tied head has a copy


@pytest.mark.parametrize("precision", ["fp32", "int4"])
def test_the_same_engine_as_from_the_checkpoint(made, folder, tmp_path, precision):
    beside(folder)
    engine = split(folder, tmp_path / "out", precision=precision)
    same = split(made / "checkpoint", tmp_path / "same", precision=precision)
    stages = {name: record for name, record in engine.manifest.files.items() if "stages" in name}
    assert stages
    assert stages.items() <= same.manifest.files.items()
    source = engine.manifest.source
    assert source.kind == "folder"
    assert [file.name for file in source.files] == ["config.json", "model.onnx", "model.onnx_data"]
    assert engine.tokenizer is not None


def test_half_precision_and_the_folder_of_transformers_js(folder, tmp_path):
    graph = onnx.load(folder / "model.onnx")
    for tensor in graph.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT:
            values = numpy_helper.to_array(tensor).astype(np.float16)
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    (folder / "onnx").mkdir()
    onnx.save_model(graph, folder / "onnx" / "model.onnx")
    (folder / "model.onnx").unlink()
    weights = OnnxWeights(folder, "onnx/model.onnx")
    assert weights.info("lm_head.weight").dtype == "F16"
    assert weights.files == ("onnx/model.onnx",)
    assert weights.read("lm_head.weight", slice(3, 5)).shape == (2, 64)
    engine = split(folder, tmp_path / "out")
    assert engine.manifest.source.files[1].name == "onnx/model.onnx"


@pytest.mark.parametrize("operator", ["DynamicQuantizeLinear", "SkipSimplifiedLayerNormalization"])
def test_quantised_and_optimised_ones_are_refused(folder, tmp_path, operator):
    graph = onnx.load(folder / "model.onnx")
    domain = "com.microsoft" if operator.startswith("Skip") else ""
    graph.graph.node.append(helper.make_node(operator, ["logits"], ["further"], domain=domain))
    onnx.save_model(graph, folder / "model.onnx")
    with pytest.raises(UnsupportedError, match=f"holds operator {operator}: read are decoders"):
        split(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_another_models_configuration(folder, tmp_path):
    edit_config(folder, num_hidden_layers=5)
    with pytest.raises(CheckpointError, match=r"weight model\.layers\.4\.\S+ is not found in the"):
        split(folder, tmp_path / "out")
    edit_config(folder, num_hidden_layers=3)
    with pytest.raises(UnsupportedError, match=r"have no place in the graph.*layers\.3"):
        split(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_damaged_data(folder, tmp_path):
    beside(folder)
    data = folder / "model.onnx_data"
    data.write_bytes(data.read_bytes()[:-4096])
    with pytest.raises(CheckpointError, match="missing or truncated: export it again"):
        split(folder, tmp_path / "out")
    graph = onnx.load(folder / "model.onnx", load_external_data=False)
    for tensor in graph.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "../model.onnx_data"
    (folder / "model.onnx").write_bytes(graph.SerializeToString())
    with pytest.raises(CheckpointError, match="is no name of a data file"):
        split(folder, tmp_path / "out")
    (folder / "model.onnx").write_bytes(b"not a graph")
    with pytest.raises(CheckpointError, match="cannot be read as ONNX"):
        split(folder, tmp_path / "out")
