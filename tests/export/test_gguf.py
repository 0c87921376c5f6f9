"""GGUF files: every type, read and kept."""

from __future__ import annotations

import json

import gguf
import numpy as np
import onnx
import pytest
from gguf import GGMLQuantizationType as Type
from gguf import quants

from adainfer_export import ExportRequest, export
from adainfer_export.errors import CheckpointError, SourceError, UnsupportedError
from adainfer_export.sources import resolve
from adainfer_export.sources.gguf import GgufFile
from adainfer_export.sources.gguf_blocks import KEPT_TYPES, read_rows
from adainfer_export.validate import reference_model, validate_folder
from adainfer_runtime import Engine

from .. import checkpoints
from ..checkpoints import make_checkpoint
from ..gguf_files import quantised, write_gguf
from ..reference import reference_greedy, reference_logits

WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "head_dim": 32,
        "num_attention_heads": 8, "num_key_value_heads": 2}  # fmt: skip
PROMPT = [5, 99, 17, 250, 3, 3, 42, 180]
LONG = [int(token) for token in np.random.default_rng(1).integers(2, 320, 96)]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two models whose widths 256-value blocks divide, with and without a tied head."""
    made = {}
    for tied in (False, True):
        checkpoints.VARIANTS["wide"] = ("llama", {**WIDE, "tie_word_embeddings": tied})
        folder = tmp_path_factory.mktemp("wide")
        made[tied] = make_checkpoint(folder / "checkpoint", "wide", tokenizer=False)
        del checkpoints.VARIANTS["wide"]
    return made


@pytest.mark.parametrize("name", KEPT_TYPES)
def test_blocks_taken_apart_are_what_gguf_dequantises(name):
    kind = Type[name]
    values = np.random.default_rng(0).normal(size=(6, 512)).astype(np.float32)
    raw = quantised(values, kind)
    rows = read_rows(name, raw)
    blocks = KEPT_TYPES[name][0]
    assert rows.codes.shape == (6, 512 // blocks.block_size, blocks.block_size)
    assert (rows.shifts is not None) == blocks.shifted
    codes = rows.codes.astype(np.float32) - 2 ** (blocks.bits - 1)
    restored = codes * rows.scales[..., None]
    if rows.shifts is not None:
        restored += rows.shifts[..., None]
    expected = quants.dequantize(raw, kind)
    tolerance = 1e-6 * np.abs(expected).max() if blocks.shifted else 0.0
    np.testing.assert_allclose(restored.reshape(6, 512), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q8_0", "Q5_0"])
def test_every_tensor_is_read_in_hugging_face_order(models, tmp_path, name):
    model = models[False]
    write_gguf(tmp_path / "m.gguf", model, {}, Type[name])
    checkpoint = resolve(str(tmp_path / "m.gguf"))
    bound = {"F32": 0.0, "F16": 1e-3, "BF16": 1e-2, "Q8_0": 1e-2}.get(name, 0.15)
    for key, tensor in model.state_dict().items():
        array = tensor.numpy()
        found = checkpoint.read(key)
        assert found.shape == checkpoint.shape(key) == array.shape
        assert np.abs(found - array).max() <= bound * np.abs(array).max()
        some = slice(array.shape[0] // 8 + 1, array.shape[0] // 2 + 3)
        np.testing.assert_array_equal(checkpoint.read(key, some), found[some])


def check_kept(path, folder):
    """The kept engine is the model of the dequantised weights."""
    result = export(ExportRequest(str(path), folder, precision="keep"))
    assert "four times as long" in result.warnings[0]
    for stage in (folder / "stages").glob("*.onnx"):
        onnx.checker.check_model(str(stage))
    reference = reference_model(resolve(str(path)))
    engine = Engine.load(folder, verify=True)
    session = engine.session()
    session.extend(PROMPT)
    session.complete()
    logits = engine.backend.probe_logits(session.hidden())
    expected = reference_logits(reference, PROMPT)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=3e-5 * np.abs(expected).max())
    result = engine.generate(PROMPT, max_new_tokens=12, ignore_eos=True)
    assert list(result.tokens) == reference_greedy(reference, PROMPT, 12)
    labels = [7, 300, 12]
    chosen = engine.backend.probe_candidates(session.hidden()[-1], np.array(labels))
    np.testing.assert_allclose(chosen.logits, logits[-1, labels], atol=3e-5 * np.abs(logits).max())
    embedded = engine.session()
    embedded.extend(PROMPT)
    first = engine.backend.kv_fill(1, embedded.hidden(), 0)
    for made, own in zip(first, session.kv(1), strict=True):
        np.testing.assert_allclose(made, own, rtol=0, atol=1e-5 * np.abs(own).max())
    return engine


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", KEPT_TYPES)
def test_kept_blocks_equal_the_dequantised_model(models, tmp_path, name, tied):
    write_gguf(tmp_path / "m.gguf", models[tied], {}, Type[name])
    check_kept(tmp_path / "m.gguf", tmp_path / "out")


def test_mixed_types_fall_apart_into_products_of_their_own(models, tmp_path):
    """As in Q4_K_M files: V and down in another type, the embedding in a third."""
    types = {"v_proj": Type.Q6_K, "down_proj": Type.Q6_K, "embed": Type.Q8_0, "o_proj": Type.F16,
             "up_proj": Type.Q5_K}  # fmt: skip
    write_gguf(tmp_path / "m.gguf", models[True], types, Type.Q4_K)
    engine = check_kept(tmp_path / "m.gguf", tmp_path / "out")
    assert engine.manifest.precision == "keep"
    assert engine.manifest.quantisation is None
    report = json.loads((tmp_path / "out" / "reports" / "quantisation.json").read_text())
    found = {tuple(m["tensors"]): (m["bits"], m["block_size"]) for m in report["matrices"]}
    assert found["model.layers.0.self_attn.v_proj.weight",] == (8, 16)
    assert found["model.embed_tokens.weight",] == (8, 32)
    assert all(m["kept"] and m["relative_error"] == 0 for m in report["matrices"])
    assert not any("o_proj" in name or "up_proj" in name for names in found for name in names)
    assert validate_folder(tmp_path / "out", reference=str(tmp_path / "m.gguf")).passed


def test_the_same_file_is_requantised_as_asked(models, tmp_path):
    write_gguf(tmp_path / "m.gguf", models[False], {}, Type.Q8_0)
    export(ExportRequest(str(tmp_path / "m.gguf"), tmp_path / "out", precision="int4"))
    assert Engine.load(tmp_path / "out").manifest.quantisation.bits == 4


def test_keep_needs_blocks(checkpoint, models, tmp_path):
    write_gguf(tmp_path / "m.gguf", models[False], {}, Type.F16)
    for path in (checkpoint, tmp_path / "m.gguf"):
        with pytest.raises(UnsupportedError, match="keep is for quantised checkpoints"):
            export(ExportRequest(str(path), tmp_path / "out", precision="keep"))
    assert not (tmp_path / "out").exists()


def test_a_type_that_cannot_be_read_is_named_before_anything_is_written(models, tmp_path):
    write_gguf(tmp_path / "m.gguf", models[False], {"layers.1.mlp.up_proj": Type.TQ1_0}, Type.F16)
    match = r"blk\.1\.ffn_up\.weight has type TQ1_0, which is not supported \(supported: F32, F16"
    with pytest.raises(UnsupportedError, match=match):
        export(ExportRequest(str(tmp_path / "m.gguf"), tmp_path / "out"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.gguf"]


@pytest.fixture(scope="module")
def llama3(tmp_path_factory):
    """A model whose rotary frequencies are scaled as Llama-3.1's are."""
    return make_checkpoint(tmp_path_factory.mktemp("llama3") / "c", "llama3-rope", tokenizer=False)


def logits_of(path, out, **settings):
    """The exported file's logits of 96 tokens, beyond the 32 of the original training."""
    export(ExportRequest(str(path), out, precision="fp32", **settings))
    engine = Engine.load(out)
    session = engine.session()
    session.extend(LONG)
    session.complete()
    return engine.backend.probe_logits(session.hidden())


@pytest.mark.parametrize("target", ["ort-cpu", "onnx-std"])
def test_llama_3_rotary_factors_are_applied(llama3, tmp_path, target):
    write_gguf(tmp_path / "m.gguf", llama3, {}, Type.F32)
    logits = logits_of(tmp_path / "m.gguf", tmp_path / "out", target=target)
    assert np.abs(logits - reference_logits(llama3, LONG)).max() <= 1e-4
    report = validate_folder(tmp_path / "out", reference=str(tmp_path / "m.gguf"))
    assert report.logits <= 1e-4


def test_without_rotary_factors_it_is_another_model(llama3, tmp_path):
    """So the test above sees them."""
    ones = {"rope_freqs.weight": np.ones(8, np.float32)}
    write_gguf(tmp_path / "m.gguf", llama3, {}, Type.F32, tensors=ones)
    assert resolve(str(tmp_path / "m.gguf")).config.rope_parameters["rope_type"] == "default"
    logits = logits_of(tmp_path / "m.gguf", tmp_path / "out")
    assert np.abs(logits - reference_logits(llama3, LONG)).max() > 1e-2


@pytest.mark.parametrize(
    "keys",
    [
        {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0},
        {"llama.rope.scaling.factor": 4.0},
        {"llama.rope.scale_linear": 4.0},
    ],
)
def test_linear_scaling(tmp_path, keys):
    linear = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
    model = make_checkpoint(tmp_path / "c", "llama", tokenizer=False, rope_parameters=linear)
    write_gguf(tmp_path / "m.gguf", model, {}, Type.F32, keys=keys)
    logits = logits_of(tmp_path / "m.gguf", tmp_path / "out")
    assert np.abs(logits - reference_logits(model, LONG)).max() <= 1e-4


@pytest.mark.parametrize(
    ("further", "error", "message"),
    [
        ({"keys": {"llama.rope.dimension_count": 8}}, UnsupportedError,
         r"positions in 8 of each head's 16 values are not supported in GGUF; export from"),
        ({"keys": {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0}},
         UnsupportedError, r"rope scaling 'yarn' in GGUF is not supported \(supported: none, lin"),
        ({"keys": {"llama.rope.scaling.attn_factor": 1.5}}, UnsupportedError,
         r"rope scaling 'linear' with attention factor 1.5 in GGUF is not supported"),
        ({"keys": {"llama.attention.sliding_window": 64}}, UnsupportedError,
         r"a sliding window \(64 of 128 positions\) in GGUF is not supported"),
        ({"tensors": {"rope_factors_long.weight": np.ones(8, np.float32)}}, UnsupportedError,
         r"no place in the graph of architecture llama: rope_factors_long.weight(\n|$)"),
        ({"tensors": {"rope_freqs.weight": np.ones(16, np.float32)}}, CheckpointError,
         r"rope_freqs.weight must hold 8 positive numbers, found shape \[16\]"),
        ({"tensors": {"rope_freqs.weight": np.zeros(8, np.float32)}}, CheckpointError,
         r"rope_freqs.weight must hold 8 positive numbers"),
    ],
)  # fmt: skip
def test_what_a_file_says_of_positions_and_is_not_known_is_refused(
    llama3, tmp_path, further, error, message
):
    write_gguf(tmp_path / "m.gguf", llama3, {}, Type.F32, **further)
    with pytest.raises(error, match=message) as caught:
        export(ExportRequest(str(tmp_path / "m.gguf"), tmp_path / "out", precision="fp32"))
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.gguf"]


@pytest.mark.usefixtures("unsized_recipes")
def test_a_llama_file_may_be_a_mistral(models, tmp_path):
    write_gguf(tmp_path / "m.gguf", models[False], {}, Type.F16)
    weights = tmp_path / "m.gguf"
    assert isinstance(resolve("mistral-7b", weights=weights), GgufFile)
    assert isinstance(resolve("llama2-7b", weights=weights), GgufFile)
    for alias, architecture in (("qwen3-8b", "qwen3"), ("opt-13b", "opt")):
        match = f"holds a model of architecture llama; {alias} is of architecture {architecture}"
        with pytest.raises(SourceError, match=match):
            resolve(alias, weights=weights)
    make_checkpoint(tmp_path / "folder", "llama", tokenizer=False)
    with pytest.raises(SourceError, match="mistral-7b is of architecture mistral"):
        resolve("mistral-7b", weights=tmp_path / "folder")


@pytest.mark.usefixtures("unsized_recipes")
def test_a_mistral_from_a_llama_file_equals_transformers(tmp_path):
    model = make_checkpoint(tmp_path / "c", "mistral", tokenizer=False)
    write_gguf(tmp_path / "m.gguf", model, {}, Type.F32)
    logits = logits_of("mistral-7b", tmp_path / "out", weights=tmp_path / "m.gguf")
    assert np.abs(logits - reference_logits(model, LONG)).max() <= 1e-4


def test_another_family_s_file_is_refused(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "gemma2")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    match = r"'gemma2' is not supported \(supported: llama, qwen2, qwen3\)"
    with pytest.raises(UnsupportedError, match=match):
        export(ExportRequest(str(tmp_path / "m.gguf"), tmp_path / "out"))


def test_layers_of_different_widths(tmp_path):
    """As llama.cpp writes them of pruned models: a number for each layer."""
    model = make_checkpoint(tmp_path / "c", "llama-pruned", tokenizer=False)
    keys = {
        "llama.attention.head_count": [4, 2, 4, 4],
        "llama.attention.head_count_kv": [2, 1, 2, 2],
        "llama.feed_forward_length": [96, 64, 32, 96],
    }
    write_gguf(tmp_path / "m.gguf", model, {}, Type.F32, keys=keys)
    logits = logits_of(tmp_path / "m.gguf", tmp_path / "out")
    assert np.abs(logits - reference_logits(model, LONG)).max() <= 1e-4


def test_numbers_of_all_layers_may_stand_for_each(models, tmp_path):
    keys = {"llama.feed_forward_length": [512, 512], "llama.attention.head_count_kv": [2, 2]}
    write_gguf(tmp_path / "m.gguf", models[False], {}, Type.F32, keys=keys)
    config = resolve(str(tmp_path / "m.gguf")).config
    assert (config.intermediate_size, config.num_key_value_heads) == (512, 2)
    assert config.num_attention_heads == 8
    write_gguf(tmp_path / "m.gguf", models[False], {}, Type.F32, keys={"llama.block_count": 2,
               "llama.feed_forward_length": 0})  # fmt: skip
    with pytest.raises(CheckpointError, match="feed_forward_length is 0, expected a number"):
        _ = resolve(str(tmp_path / "m.gguf")).config


def test_biases_are_read(tmp_path):
    model = make_checkpoint(tmp_path / "c", "llama-bias", tokenizer=False)
    write_gguf(tmp_path / "m.gguf", model, {}, Type.F32)
    logits = logits_of(tmp_path / "m.gguf", tmp_path / "out")
    assert np.abs(logits - reference_logits(model, LONG)).max() <= 1e-4


@pytest.mark.parametrize(
    ("key", "plain", "other"),
    [
        ("attention.scale", 32**-0.5, 0.3),
        ("attention.clamp_kqv", 0.0, 8.5),
        ("attention.causal", True, False),
        ("attention.max_alibi_bias", 0.0, 8.0),
        ("logit_scale", 1.0, 0.125),
        ("embedding_scale", 1.0, 12.0),
        ("residual_scale", 0.0, 0.22),
        ("final_logit_softcapping", 0.0, 30.0),
        ("attn_logit_softcapping", 0.0, 50.0),
        ("expert_count", 0, 8),
        ("use_parallel_residual", False, True),
    ],
)
def test_keys_that_change_the_computation_are_refused(models, tmp_path, key, plain, other):
    path = tmp_path / "m.gguf"
    write_gguf(path, models[False], {}, Type.F16, keys={f"llama.{key}": plain})
    assert resolve(str(path)).config.hidden_size == 256
    write_gguf(path, models[False], {}, Type.F16, keys={f"llama.{key}": other})
    shown = f"{other:g}" if isinstance(other, float) else other
    with pytest.raises(UnsupportedError, match=rf"m.gguf: {key} {shown} in GGUF is not supp") as no:
        export(ExportRequest(str(path), tmp_path / "out", precision="fp32"))
    assert "\n" not in str(no.value)
    assert [file.name for file in tmp_path.iterdir()] == ["m.gguf"]


def test_a_part_of_a_split_file_is_named(models, tmp_path):
    write_gguf(tmp_path / "m.gguf", models[False], {}, Type.F16, keys={"split.count": 1})
    assert resolve(str(tmp_path / "m.gguf")).config.num_hidden_layers == 2
    write_gguf(tmp_path / "m.gguf", models[False], {}, Type.F16, keys={"split.count": 3})
    with pytest.raises(UnsupportedError, match=r"one of 3 parts .*`llama-gguf-split --merge FIRST"):
        _ = resolve(str(tmp_path / "m.gguf")).config
