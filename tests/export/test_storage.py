"""How weights are stored, beyond the precision: block sizes, sensitive layers, the report."""

from __future__ import annotations

import copy
import json
from importlib import import_module

import numpy as np
import onnx
import pytest
import torch
from typer.testing import CliRunner

from adainfer_export import ExportRequest, commands, export
from adainfer_export.errors import UnsupportedError
from adainfer_export.int4 import dequantise_int4, quantise_int4
from adainfer_export.lower import PRECISIONS, TARGETS
from adainfer_export.lower.precision import layer_of_tensor
from adainfer_export.quantise import dequantise_blocks, quantise_blocks
from adainfer_export.storage import (
    StorageRequest,
    choose_storage,
    parse_int8_layers,
    parse_range,
)
from adainfer_models import QuantisationSettings, parse_recipe
from adainfer_runtime import Engine
from adainfer_runtime.commands.app import build_app
from adainfer_runtime.engine_folder import QUANTISATION_REPORT, load_manifest
from adainfer_runtime.manifest import Quantisation

from ..checkpoints import make_checkpoint
from ..conftest import TinyEngine
from ..reference import dequantised_reference, reference_logits

PROMPT = [5, 17, 200, 43, 9, 120, 77, 31, 250, 8, 61, 13, 99, 301, 4, 18, 230, 71]
RECIPE = """
architecture = "llama"
licence = "MIT"
licence_page = "https://example.org"
[[sources]]
kind = "huggingface"
id = "a/b"
revision = "main"
[quantisation]
int8_layers = [1, 4]
int8_head = true
note = "measured"
"""


def products(folder, stage):
    """(bits, block size) of a stage's products."""
    graph = onnx.load(folder / "stages" / f"{stage}.onnx", load_external_data=False).graph
    return {
        tuple(next(a.i for a in node.attribute if a.name == key) for key in ("bits", "block_size"))
        for node in graph.node
        if node.op_type == "MatMulNBits"
    }


def report(folder):
    return json.loads((folder / QUANTISATION_REPORT).read_text())


def test_sensitive_layers_and_the_head_have_8_bits(tiny):
    storage = StorageRequest(int8_layers=frozenset({1, 4}), int8_head=True)
    made = tiny("llama-tied", precision="int4", storage=storage)
    found = {name: products(made.folder, name) for name in
             ("layer_001", "layer_002", "layer_003", "layer_004", "probe")}  # fmt: skip
    eight, four = {(8, 32)}, {(4, 32)}
    assert list(found.values()) == [eight, four, four, eight, eight]
    assert not (made.folder / "stages" / "layer_001.wide.onnx").exists()
    assert (made.folder / "stages" / "layer_002.wide.onnx").exists()
    assert made.engine.manifest.quantisation == Quantisation(
        bits=4, block_size=32, accuracy_level=4, wide_rows=48, int8_layers=(1, 4), int8_head=True
    )
    errors = {entry["place"]: entry["relative_error"] for entry in report(made.folder)["summary"]}
    assert max(errors["layer 1"], errors["layer 4"]) < 0.01 < errors["layer 2"] < 0.2
    prompt = [5, 6, 7] * 20  # both forms of an engine with mixed layers
    assert len(made.engine.generate(prompt, max_new_tokens=4, ignore_eos=True).tokens) == 4


def test_mixed_layers_in_one_engine(tiny):
    storage = StorageRequest(int8_layers=frozenset({2}))
    made = tiny("llama", precision="int4", storage=storage, layers_per_engine=4)
    assert products(made.folder, "layers_001_004") == {(4, 32), (8, 32)}
    prompt = [5, 6, 7] * 20
    assert len(made.engine.generate(prompt, max_new_tokens=4, ignore_eos=True).tokens) == 4


def test_block_size(tiny):
    coarse = tiny("qwen3", precision="int4", storage=StorageRequest(block_size=32))
    fine = tiny("qwen3", precision="int4", storage=StorageRequest(block_size=16))
    assert products(fine.folder, "layer_001") == {(4, 16)}
    errors = [report(made.folder)["summary"][1]["relative_error"] for made in (coarse, fine)]
    assert errors[1] < errors[0]


@pytest.mark.parametrize("variant", ["llama", "opt", "gpt2", "gpt_neox"])
def test_products_that_end_feed_forward_networks_have_blocks_of_their_own(tiny, variant):
    storage = StorageRequest(block_size=16, down_block_size=32)
    made = tiny(variant, precision="int4", storage=storage)
    assert made.engine.manifest.quantisation.down_block_size == 32
    assert products(made.folder, "layer_001") == {(4, 16), (4, 32)}
    sizes = {
        tensor: matrix["block_size"]
        for matrix in report(made.folder)["matrices"]
        for tensor in matrix["tensors"]
    }
    ends = ("down_proj.weight", "fc2.weight", "mlp.c_proj.weight", "dense_4h_to_h.weight")
    assert {size for name, size in sizes.items() if name.endswith(ends)} == {32}
    assert {size for name, size in sizes.items() if not name.endswith(ends)} == {16}
    expected = reference_logits(dequantised_reference(made, "int4"), PROMPT)
    difference = np.abs(logits_of(made.engine, PROMPT) - expected).max()
    assert difference <= 0.08 * np.abs(expected).max()


def test_other_targets_have_one_block_size(checkpoint, tmp_path):
    storage = StorageRequest(down_block_size=64)
    request = ExportRequest(str(checkpoint), tmp_path / "out", target="tensorrt", storage=storage)
    with pytest.raises(UnsupportedError, match="tensorrt does not take --down-block-size"):
        export(request)


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """Exports of a checkpoint that blocks of 128 divide."""
    root = tmp_path_factory.mktemp("wide")
    checkpoint = root / "checkpoint"
    model = make_checkpoint(checkpoint, hidden_size=128, intermediate_size=256, head_dim=32)
    made = {}

    def make(target, block_size, down_block_size=None):
        key = f"{target}-{block_size}-{down_block_size}"
        if key not in made:
            storage = StorageRequest(block_size, down_block_size=down_block_size)
            export(ExportRequest(str(checkpoint), root / key, target=target, storage=storage))
            made[key] = TinyEngine(Engine.load(root / key), model, root / key, checkpoint)
        return made[key]

    return make


def logits_of(engine, prompt):
    session = engine.session()
    session.extend(prompt)
    session.complete()
    return engine.backend.probe_logits(session.hidden())


@pytest.mark.parametrize(("times", "tolerance"), [(1, 0.08), (3, 0.01)])
@pytest.mark.parametrize("block_size", [16, 64, 128])
def test_blocks_of_every_size_equal_their_dequantised_weights(wide, block_size, times, tolerance):
    """Few positions round their activations to int8, block by block; of many the head alone."""
    made, prompt = wide("ort-cpu", block_size), PROMPT * times
    assert (len(prompt) >= made.engine.manifest.quantisation.wide_rows) is (times == 3)
    for stage in ("layer_001", "layer_004", "probe"):
        assert products(made.folder, stage) == {(4, block_size)}
    expected = reference_logits(dequantised_reference(made, "int4"), prompt)
    difference = np.abs(logits_of(made.engine, prompt) - expected).max()
    assert difference <= tolerance * np.abs(expected).max()


@pytest.mark.parametrize(("times", "tolerance"), [(1, 0.08), (3, 0.01)])
def test_the_largest_blocks_equal_their_dequantised_weights(wide, times, tolerance):
    made, prompt = wide("ort-cpu", 64, 256), PROMPT * times
    assert products(made.folder, "layer_001") == {(4, 64), (4, 256)}
    expected = reference_logits(dequantised_reference(made, "int4"), prompt)
    difference = np.abs(logits_of(made.engine, prompt) - expected).max()
    assert difference <= tolerance * np.abs(expected).max()


@pytest.mark.parametrize("block_size", [64, 128])
@pytest.mark.parametrize("target", ["tensorrt", "tensorrt-basic"])
def test_blocks_for_tensorrt_equal_their_dequantised_weights(wide, target, block_size):
    made = wide(target, block_size)
    model = copy.deepcopy(made.reference)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and "layers." in name:
                values = dequantise_int4(*quantise_int4(parameter.numpy(), block_size))
                parameter.copy_(torch.from_numpy(values))
    expected = reference_logits(model, PROMPT)
    difference = np.abs(logits_of(made.engine, PROMPT) - expected).max()
    assert difference <= 0.01 * np.abs(expected).max()


def test_the_help_names_the_block_sizes_that_targets_take():
    shown = commands._block_sizes()
    for target in TARGETS:
        sizes = ", ".join(map(str, sorted(target.block_sizes)))
        assert (f"{target.name}: {sizes}" in shown) is ("int4" in target.precisions)
    assert "ort-cpu: 16, 32, 64, 128; ort-cuda: 32; tensorrt: 32, 64, 128" in shown
    assert commands._block_sizes(of_down=True) == "ort-cpu: 16, 32, 64, 128, 256"


def test_the_report_is_the_error_of_the_weights(tiny):
    made = tiny("llama", precision="int4")
    entry = next(m for m in report(made.folder)["matrices"] if "layers.2.mlp.down" in str(m))
    weight = made.reference.state_dict()["model.layers.2.mlp.down_proj.weight"].numpy()
    stored = quantise_blocks(weight, 4, 32)
    error = dequantise_blocks(stored.packed, stored.scales, 4) - weight
    expected = np.sqrt(np.square(error).sum() / np.square(weight).sum())
    assert entry == {
        "tensors": ["model.layers.2.mlp.down_proj.weight"],
        "bits": 4,
        "block_size": 32,
        "kept": False,
        "layer": 3,
        "relative_error": pytest.approx(expected, rel=1e-3),
    }


def test_fp32_has_no_report(tiny):
    assert not (tiny("llama").folder / "reports").exists()


def test_inspect_shows_the_error_of_every_layer(tiny):
    shown = CliRunner().invoke(
        build_app(), ["inspect", str(tiny("llama", precision="int4").folder)]
    )
    assert shown.exit_code == 0
    for place in ("layer 1", "layer 4", "lm_head.weight", "relative error"):
        assert place in shown.output


def test_calibrating_again_keeps_the_report(tiny):
    manifest = tiny("llama", precision="int4").engine.manifest
    assert QUANTISATION_REPORT in manifest.uncalibrated().files


@pytest.mark.parametrize(
    ("storage", "precision", "message"),
    [
        (StorageRequest(block_size=24), "int4", "--block-size 24: it must be one of 16, 32, 64"),
        (StorageRequest(block_size=32), "fp32", "are for int4 and int8, not fp32"),
        (StorageRequest(int8_head=True), "keep", "are for int4 and int8, not keep"),
        (StorageRequest(int8_layers=frozenset({9})), "int4", "names layer 9: this model has 4"),
        (StorageRequest(block_size=128), "int4", "width 64 is not divisible by the block of 128"),
        (
            StorageRequest(down_block_size=512),
            "int4",
            "--down-block-size 512: it must be one of 16, 32, 64, 128, 256 for target ort-cpu",
        ),
        (StorageRequest(down_block_size=64), "fp32", "are for int4 and int8, not fp32"),
    ],
)
def test_what_cannot_be_stored_so(checkpoint, tmp_path, storage, precision, message):
    request = ExportRequest(str(checkpoint), tmp_path / "out", storage=storage, precision=precision)
    with pytest.raises(UnsupportedError, match=message):
        export(request)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_sensitive_layers_of_an_alias_are_the_exports_default(checkpoint, tmp_path, monkeypatch):
    recipe = parse_recipe("tiny", RECIPE)
    for module in (commands, import_module("adainfer_export.sources.resolve")):
        monkeypatch.setattr(module, "load_recipe", lambda alias: recipe)

    def exported(*options):
        out = tmp_path / "-".join(("out", *options))
        fixed = ["--source", str(checkpoint), "--calibration", "none", "--quiet"]
        given = ["export", "tiny", "--out", str(out), *fixed, *options]
        done = CliRunner().invoke(build_app(), given)
        assert done.exit_code == 0, done.output
        stored = load_manifest(out).quantisation
        return out, (stored.int8_layers, stored.int8_head)

    out, stored = exported()
    assert stored == ((1, 4), True)
    bits = {entry["place"]: entry["bits"] for entry in report(out)["summary"]}
    assert [bits[f"layer {number}"] for number in (1, 2, 3, 4)] == [[8], [4], [4], [8]]
    assert exported("--int8-layers", "2")[1] == ((2,), False)
    assert exported("--int8-layers", "none")[1] == ((), False)
    assert exported("--precision", "int8")[1] == ((), False)
    assert exported("--target", "tensorrt")[1] == ((), False)  # takes none: it is not refused


def test_what_is_known_of_an_alias_goes_with_other_settings():
    known = QuantisationSettings(int8_layers=(3,), note="x")
    both = choose_storage(StorageRequest(64), None, known, "ort-cpu", "int4")
    assert both == StorageRequest(64, frozenset({3}))
    assert choose_storage(StorageRequest(64), None, None, "ort-cpu", "int4") == StorageRequest(64)
    with pytest.raises(UnsupportedError, match="target 'ort-cpx' is unknown"):
        choose_storage(StorageRequest(), None, known, "ort-cpx", "int4")


def test_layers_as_text():
    assert parse_int8_layers("none") == (frozenset(), False)
    assert parse_int8_layers("1-2,29-30") == (frozenset({1, 2, 29, 30}), False)
    assert parse_int8_layers("head, 7") == (frozenset({7}), True)
    assert parse_range("12", "--layers") == (12, 12)
    with pytest.raises(UnsupportedError, match="--int8-layers 'none'"):
        parse_int8_layers("2,none")
    for wrong in ("0-2", "5-3", "a", "", "1-", "-1"):
        with pytest.raises(UnsupportedError, match="--layers"):
            parse_range(wrong, "--layers")


def test_layer_of_a_tensor():
    assert layer_of_tensor("model.layers.0.mlp.up_proj.weight") == 1
    assert layer_of_tensor("transformer.h.11.attn.c_attn.weight") == 12
    assert layer_of_tensor("model.embed_tokens.weight") is None
    assert PRECISIONS["int8"].storage("lm_head.weight").bits == 8


@pytest.mark.parametrize(
    ("option", "storage"),
    [
        ("--prefill int8", StorageRequest(prefill="int8")),
        ("--kv-cache-dtype int8", StorageRequest(kv_cache="int8")),
    ],
)
@pytest.mark.parametrize(
    ("target", "precision", "message"),
    [
        ("ort-cpu", "fp32", "{} is for int4 and int8, not fp32"),
        ("ort-cpu", "keep", "{} is for int4 and int8, not keep"),
        ("tensorrt", "int4", "target tensorrt does not take {}"),
        ("ort-cuda", "int4", "target ort-cuda does not take {}"),
    ],
)
def test_where_8_bits_mean_nothing(tmp_path, option, storage, target, precision, message):
    request = ExportRequest(
        "smollm2-135m", tmp_path / "out", target=target, precision=precision, storage=storage
    )
    with pytest.raises(UnsupportedError, match=message.format(option)):
        export(request)
