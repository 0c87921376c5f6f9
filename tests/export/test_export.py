from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest

from adainfer_export import ExportRequest, export
from adainfer_export.errors import LoweringError
from adainfer_export.split import layer_groups
from adainfer_runtime import Engine

from ..checkpoints import make_checkpoint


def graphs(folder):
    return {path.stem: onnx.load(path, load_external_data=False)
            for path in sorted((folder / "stages").glob("*.onnx"))}  # fmt: skip


def places(model):
    """Where a graph's external tensors lie: (file, offset) by name."""
    found = {}
    for tensor in model.graph.initializer:
        if tensor.external_data:
            fields = {entry.key: entry.value for entry in tensor.external_data}
            found[tensor.name] = (fields["location"], int(fields.get("offset", 0)))
    return found


@pytest.mark.parametrize("precision", ["fp32", "int8", "int4"])
@pytest.mark.parametrize("variant", ["llama", "llama-tied", "qwen2", "qwen3", "mistral-window"])
def test_stages_pass_the_onnx_checker(tiny, variant, precision):
    folder = tiny(variant, precision=precision).folder
    for path in (folder / "stages").glob("*.onnx"):
        onnx.checker.check_model(str(path))
    for name, model in graphs(folder).items():
        ops = [node.op_type for node in model.graph.node]
        if name.startswith("layer"):
            assert ops.count("GroupQueryAttention") == 1
            assert ops.count("MatMulNBits" if precision != "fp32" else "MatMul") >= 4
            assert "Attention" not in ops


def test_every_weight_stands_in_one_place(tiny):
    models = graphs(tiny("llama-tied", precision="int4").folder)
    embed, probe = places(models["embed"]), places(models["probe"])
    assert len(embed) == 2
    assert embed.items() <= probe.items()  # the tied head reads the embedding's rows
    tables = [places(model)["model.rotary_emb.cos_cache"] for name, model in models.items()
              if name.startswith("layer")]  # fmt: skip
    assert len(set(tables)) == 1
    assert tables[0][0] == "shared.data"


def test_tied_head_is_shared_in_fp32_too(tiny):
    models = graphs(tiny("llama-tied").folder)
    assert set(places(models["embed"]).values()) <= set(places(models["probe"]).values())


def test_layer_groups():
    assert layer_groups(5, 2) == [(1, 2), (3, 4), (5, 5)]
    assert layer_groups(3, 9) == [(1, 3)]


def test_max_seq_len_sets_cache_and_rotary_tables(tiny):
    made = tiny("llama", max_seq_len=50)
    assert made.engine.manifest.kv.max_length == 50
    table = next(tensor for tensor in graphs(made.folder)["layer_001"].graph.initializer
                 if tensor.name.endswith("cos_cache"))  # fmt: skip
    assert table.dims[0] == 50
    assert len(made.engine.generate([5] * 45, max_new_tokens=6, ignore_eos=True).tokens) == 6


def test_sharded_and_half_precision_checkpoints(tmp_path):
    import torch

    model = make_checkpoint(tmp_path / "checkpoint", shard="100KB")
    assert len(list((tmp_path / "checkpoint").glob("*.safetensors"))) > 2
    for dtype in (torch.float16, torch.bfloat16):
        half = tmp_path / str(dtype).rpartition(".")[2]
        model.to(dtype).save_pretrained(half)
        export(ExportRequest(str(half), tmp_path / f"out-{half.name}", precision="fp32"))
        engine = Engine.load(tmp_path / f"out-{half.name}")
        session = engine.session()
        session.extend([5, 6, 7])
        session.complete()
        expected = model.to(torch.float32)(torch.tensor([[5, 6, 7]])).logits[0]
        logits = engine.backend.probe_logits(session.hidden())
        np.testing.assert_allclose(logits, expected.detach().numpy(), atol=1e-3)
    export(ExportRequest(str(tmp_path / "checkpoint"), tmp_path / "out", precision="fp32"))


def test_manifest_names_origin_and_versions(tiny):
    manifest = tiny("llama").engine.manifest
    assert manifest.source.kind == "folder"
    assert {file.name for file in manifest.source.files} == {"config.json", "model.safetensors"}
    assert "mobius-onnx" in manifest.exporter
    assert manifest.quantisation is None
    assert tiny("llama", precision="int4").engine.manifest.quantisation.block_size == 32


def test_lowering_that_misses_an_operator_is_refused(monkeypatch, checkpoint, tmp_path):
    from adainfer_export.lower import ort

    monkeypatch.setattr(ort, "find_linears", lambda graph: iter(()))
    with pytest.raises(LoweringError, match="found 7 of operator MatMul, expected 0"):
        export(ExportRequest(str(checkpoint), tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_width_that_blocks_do_not_divide(tmp_path):
    from adainfer_export.errors import UnsupportedError

    from .. import checkpoints

    checkpoints.VARIANTS["narrow"] = ("llama", {"hidden_size": 80})
    try:
        make_checkpoint(tmp_path / "checkpoint", "narrow")
    finally:
        del checkpoints.VARIANTS["narrow"]
    with pytest.raises(UnsupportedError, match="width 80 is not divisible by the block of 32"):
        export(ExportRequest(str(tmp_path / "checkpoint"), tmp_path / "out"))
    export(ExportRequest(str(tmp_path / "checkpoint"), tmp_path / "out", precision="fp32"))


class _Steps:
    def __init__(self):
        self.seen = {}

    def begin(self, what, total):
        self.phase = self.seen.setdefault(what, [])

    def step(self, detail=""):
        self.phase.append(detail)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, ["layer 1/4", "layer 2/4", "layer 3/4", "layer 4/4"]),
        ({"layers_per_engine": 2}, ["layers 1-2/4", "layers 3-4/4"]),
    ],
)
def test_progress_tells_the_layer(checkpoint, tmp_path, settings, expected):
    steps = _Steps()
    request = ExportRequest(str(checkpoint), tmp_path / "out", precision="fp32", **settings)
    export(request, steps)
    told = steps.seen["writing weights"]
    assert sorted(detail for detail in told if "layer" in detail) == expected
    assert {"embed", "probe"} <= set(told)
    again = _Steps()
    export(replace(request, layers=(4, 4)), again)
    assert again.seen == {"writing weights": expected[-1:]}
