"""`--kv-cache-dtype int8`: keys and values in codes."""

from __future__ import annotations

import dataclasses
import shutil
from importlib import import_module

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from adainfer_export import ExportRequest, export, kv_ranges
from adainfer_export.calibrate.builtin import builtin_examples
from adainfer_export.calibrate.exit_files import join_calibrated
from adainfer_export.errors import OutputError, UnsupportedError
from adainfer_export.float_decoder import builtin_prompts
from adainfer_export.kv_ranges import _pairs, scales_of
from adainfer_export.storage import StorageRequest
from adainfer_runtime import DecodeOptions, Engine
from adainfer_runtime.backends.kv_scales import KV_SCALES
from adainfer_runtime.backends.ort_cpu import open_session
from adainfer_runtime.commands.app import build_app
from adainfer_runtime.engine_folder import load_manifest, write_manifest

from ..checkpoints import make_checkpoint
from ..scripted import ScriptedExit

INT8 = StorageRequest(kv_cache="int8")
PLAIN = StorageRequest()
VARIANTS = [
    "llama",
    "llama-mqa",
    "llama-pruned",  # other heads in other layers
    "llama-bias",
    "mistral-window",
    "qwen2",
    "qwen3",  # norms between product and attention
    "opt",  # no rotary
    "gemma2",  # a window, a cap
    "phi3",
    "gpt2",
    "gpt_neox",  # a part of each head is rotated
]


def text(engine, length):
    """Token ids such as scales were measured on."""
    return engine.tokenizer.encode(builtin_examples(20260)[0].prompt)[:length]


def step_by_step(engine, tokens, prompt):
    """Logits of every position behind a prompt."""
    session = engine.session()
    session.extend(tokens[:prompt])
    session.complete()
    found = []
    for token in tokens[prompt:]:
        session.extend([token])
        session.complete()
        found.append(engine.backend.probe_logits(session.hidden())[-1])
    return np.array(found), session


def error(found, expected):
    return float(np.sqrt(((found - expected) ** 2).mean() / (expected**2).mean()))


@pytest.mark.parametrize("variant", VARIANTS)
def test_decoding_equals_float_caches_but_for_rounding(tiny, variant):
    made = tiny(variant, precision="int4", storage=INT8)
    plain = tiny(variant, precision="int4", storage=PLAIN).engine
    tokens = text(plain, 90)
    found, session = step_by_step(made.engine, tokens, 60)
    expected, reference = step_by_step(plain, tokens, 60)
    assert error(found, expected) < 0.08
    assert made.engine.manifest.kv.dtype == "int8"
    assert session._chain._buffers._caches[1][0].dtype == np.int8
    # The first layer's keys and values depend on nothing that was rounded.
    steps = made.engine.backend.kv_scales.of(1, len(session.kv(1)[0]))
    for mine, full, step in zip(session.kv(1), reference.kv(1), steps, strict=True):
        assert (np.abs(mine - full) <= 0.51 * step[:, None]).all()


def in_passes(engine, tokens, *ends):
    """Logits of the last 50 positions, read in passes that end there."""
    session = engine.session()
    for start, end in zip((0, *ends), (*ends, len(tokens)), strict=True):
        session.extend(tokens[start:end])
        session.complete()
    return engine.backend.probe_logits(session.hidden())[-50:]


@pytest.mark.parametrize("precision", ["int4", "int8"])
@pytest.mark.parametrize("prefill", ["stored", "int8"])
def test_prompts_attend_in_float(tiny, precision, prefill):
    """What is before them is unpacked; in one pass nothing is, and it equals float caches."""
    storage = StorageRequest(prefill=prefill)
    plain = tiny("llama", precision=precision, storage=storage).engine
    made = tiny("llama", precision=precision, storage=dataclasses.replace(storage, kv_cache="int8"))
    tokens = text(plain, 120)
    expected = in_passes(plain, tokens)
    np.testing.assert_allclose(in_passes(made.engine, tokens), expected, atol=1e-5)
    assert 0 < error(in_passes(made.engine, tokens, 60), expected) < 0.06


@pytest.mark.parametrize("variant", VARIANTS)
def test_long_passes_behind_others(tiny, variant):
    engines = [tiny(variant, precision="int4", storage=storage).engine for storage in (INT8, PLAIN)]
    tokens = text(engines[0], 128)
    found, expected = (in_passes(engine, tokens, 20, 70) for engine in engines)
    assert 0 < error(found, expected) < 0.08


def test_engines_without_the_form_for_prompts(tiny):
    made = tiny("llama", precision="int4", storage=INT8)
    plain = tiny("llama", precision="int4", storage=PLAIN)
    small, reference = (Engine.load(one.folder, low_memory=True) for one in (made, plain))
    tokens = text(small, 120)
    assert small.backend.stage(0, 60) is small.backend.stage(0, 1)
    found, expected = (in_passes(engine, tokens, 60) for engine in (small, reference))
    assert 0 < error(found, expected) < 0.08


@pytest.mark.parametrize("variant", ["llama", "qwen2", "gpt_neox", "opt"])
def test_both_graphs_write_the_same_codes(tiny, variant):
    made = tiny(variant, precision="int4", storage=INT8)
    stage, kv = made.engine.manifest.layer_stages[0], made.engine.manifest.kv
    random = np.random.default_rng(0)
    shape = (1, kv.heads(1), 24, kv.head_dim)
    feed = {
        "hidden": made.engine.backend.embed.run(
            ["hidden"], embedded(made.engine, range(40, 45), 11)
        )[0],
        "seqlens_k": np.array([15], np.int32),
        "total_sequence_length": np.array(16, np.int32),
        "past_key.1": random.integers(-90, 90, shape).astype(np.int8),
        "past_value.1": random.integers(-90, 90, shape).astype(np.int8),
    }
    found = []
    for file in (stage.file, stage.wide_file):
        outputs = open_session(made.folder / file).run(None, feed)
        found.append(outputs)
        for name, present in zip(("past_key.1", "past_value.1"), outputs[1:], strict=True):
            assert present.dtype == np.int8
            np.testing.assert_array_equal(present[:, :, :11], feed[name][:, :, :11])
            assert present[:, :, 11:16].any()
    for one, other in zip(found[0][1:], found[1][1:], strict=True):
        assert np.abs(one[:, :, :16].astype(int) - other[:, :, :16]).max() <= 1
    assert error(found[0][0], found[1][0]) < 0.05


def embedded(engine, tokens, start):
    feed = {"input_ids": np.array([list(tokens)], np.int64)}
    if len(engine.manifest.embed.inputs) > 1:
        feed["position_ids"] = np.arange(start, start + len(tokens))[None]
    return feed


@settings(max_examples=30)
@given(exits=st.lists(st.integers(0, 3), min_size=1, max_size=10))
def test_cache_after_the_deferred_fill_equals_off(tiny, exits):
    """But for values that round to the code beside, and what that changes above."""
    engine = tiny("llama", precision="int4", storage=INT8).engine
    policy = ScriptedExit(exits, engine.manifest.boundaries[:-1])
    tokens = text(engine, 20 + len(exits))
    session = engine.session()
    session.extend(tokens[:20])
    for token in tokens[20:]:
        policy.next()
        session.predict(policy)
        session.extend([token])
    session.complete()
    off = engine.session()
    off.extend(session.tokens[:20])
    off.complete()
    for token in session.tokens[20:]:
        off.extend([token])
        off.complete()
    for layer in range(1, engine.manifest.model.num_layers + 1):
        codes = [s._chain._buffers._caches[layer] for s in (session, off)]
        for mine, full in zip(*codes, strict=True):
            assert np.abs(mine.astype(int) - full).max() <= 2


def test_what_a_policy_makes_up_is_written_in_codes(tiny, monkeypatch):
    engine = tiny("llama", precision="int4", storage=INT8).engine
    fill, made = engine.backend.kv_fill, {}

    def kept(layer, hidden, start):
        made[layer, start] = fill(layer, hidden, start)
        return made[layer, start]

    monkeypatch.setattr(engine.backend, "kv_fill", kept)
    tokens = text(engine, 20)
    session, policy = engine.session(), ScriptedExit([2, 0], engine.manifest.boundaries[:-1])
    session.extend(tokens[:-1])
    policy.next()
    assert session.predict(policy, kv_policy="propagate").exit_layer == 2
    session.extend(tokens[-1:])
    policy.next()
    session.predict(policy, kv_policy="propagate")
    assert {layer for layer, _ in made} == {3, 4}
    for (layer, start), parts in made.items():
        rows = slice(start, start + parts[0].shape[1])
        steps = engine.backend.kv_scales.of(layer, 2)
        for values, stored, step in zip(parts, session.kv(layer), steps, strict=True):
            assert (np.abs(stored[:, rows] - values) <= 0.51 * step[:, None]).all()


def test_verified_text_equals_off(tiny):
    engine = tiny("llama", precision="int4", storage=INT8).engine
    for number in range(4):
        prompt = text(engine, 20 + 3 * number)
        off = engine.generate(prompt, max_new_tokens=24, ignore_eos=True)
        drafted = engine.generate(
            prompt,
            max_new_tokens=24,
            ignore_eos=True,
            mode="verified",
            decoding=DecodeOptions(draft_layer=2),
        )
        assert drafted.tokens == off.tokens


def test_a_batch_equals_its_texts_alone(tiny):
    engine = tiny("llama", precision="int4", storage=INT8).engine
    prompts = [text(engine, 12 + 5 * number) for number in range(4)]
    alone = [engine.generate(prompt, max_new_tokens=12, ignore_eos=True) for prompt in prompts]
    together = engine.generate_batch(prompts, max_new_tokens=12, ignore_eos=True)
    assert [result.tokens for result in together] == [result.tokens for result in alone]


def attentions(folder, file):
    graph = onnx.load(folder / file, load_external_data=False).graph
    return [
        {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        for node in graph.node
        if node.op_type == "GroupQueryAttention"
    ]


def test_even_layers_have_one_scale_for_a_tensor():
    even = np.random.default_rng(0).uniform(1, 4, (2, 2, 8)).astype(np.float32)
    uneven = even.copy()
    uneven[0, 1, 3] = 100.0
    unused = np.zeros_like(even)
    values = scales_of([even, uneven, unused[:, :1]]).values
    assert values.shape == (3, 2, 2, 8)
    assert (values[0] == values[0, :, :1, :1]).all()
    np.testing.assert_allclose(values[0, :, 0, 0] * 127, even.max((1, 2)) * 1.25, rtol=1e-6)
    np.testing.assert_allclose(values[1] * 127, uneven * 1.25, rtol=1e-6)
    assert (values[2] > 0).all()
    with pytest.raises(UnsupportedError, match="keys or values of layer 1 are not finite"):
        scales_of([even * np.float32(np.inf)])


def test_channels_that_are_rotated_together_have_one_scale():
    assert _pairs(8, 8, interleaved=0).tolist() == [4, 5, 6, 7, 0, 1, 2, 3]
    assert _pairs(8, 8, interleaved=1).tolist() == [1, 0, 3, 2, 5, 4, 7, 6]
    assert _pairs(8, 4, interleaved=0).tolist() == [2, 3, 0, 1, 4, 5, 6, 7]


def largest_magnitudes(model, passes):
    """Of transformers' keys and values: `[layers, 2, heads, head_dim]`."""
    found = []
    with torch.no_grad():
        for tokens in passes:
            cache = model(torch.tensor([tokens]), use_cache=True).past_key_values
            pairs = [(held.keys[0], held.values[0]) for held in cache.layers]
            found.append([[part.abs().amax(dim=1).numpy() for part in pair] for pair in pairs])
    return np.max(found, axis=0)


@pytest.mark.parametrize(
    ("variant", "rotated"), [("llama", 16), ("gpt2", 0), ("gpt_neox-serial", 8)]
)
def test_scales_are_of_the_largest_keys_and_values(tiny, monkeypatch, variant, rotated):
    monkeypatch.setattr(kv_ranges, "_MOST_UNEVEN", 0.0)  # a scale for every channel
    made = tiny(variant, precision="int4", storage=dataclasses.replace(INT8, block_size=16))
    engine, length = made.engine, made.engine.manifest.max_seq_len
    passes = kv_ranges._with_later_positions(builtin_prompts(engine.tokenizer, length), length)
    assert max(map(len, passes)) == length
    largest = largest_magnitudes(made.reference, passes)
    keys, half = largest[:, 0], rotated // 2
    first, second = keys[..., :half].copy(), keys[..., half:rotated].copy()
    keys[..., :half] = keys[..., half:rotated] = np.hypot(first, second)
    np.testing.assert_allclose(
        engine.backend.kv_scales.values * 127, largest * 1.25, rtol=1e-3, atol=1e-5
    )


def test_later_positions_are_seen():
    passes = kv_ranges._with_later_positions([[1, 2], [3, 4, 5], [6], [7, 8, 9]], most=4)
    assert passes == [[1, 2], [6], [3, 4, 5, 7], [8, 9]]


def test_uneven_layers_have_a_scale_for_every_channel(tmp_path):
    """A bias that makes one channel's keys large, as in Qwen2."""
    model = make_checkpoint(tmp_path / "checkpoint", "qwen2")
    with torch.no_grad():
        model.model.layers[1].self_attn.k_proj.bias[5] = 80.0
    model.save_pretrained(tmp_path / "checkpoint")
    for name, storage in (("plain", PLAIN), ("int8", INT8)):
        request = ExportRequest(str(tmp_path / "checkpoint"), tmp_path / name, storage=storage)
        export(request)
    kinds = [
        attentions(tmp_path / "int8", stage.file)[0]["k_quant_type"].decode()
        for stage in load_manifest(tmp_path / "int8").layer_stages
    ]
    assert kinds[1] == "PER_CHANNEL"
    assert kinds[0] == "PER_TENSOR"
    values = np.load(tmp_path / "int8" / KV_SCALES)[1, 0, 0]
    assert values[5] == values[13] > 5 * np.median(values)  # its partner in the rotation
    plain, made = (Engine.load(tmp_path / name) for name in ("plain", "int8"))
    tokens = text(plain, 90)
    found, expected = (step_by_step(engine, tokens, 60)[0] for engine in (made, plain))
    assert error(found, expected) < 0.06
    found, expected = (in_passes(engine, text(plain, 120), 60) for engine in (made, plain))
    assert error(found, expected) < 0.06


def test_what_is_written(tiny):
    made = tiny("llama", precision="int4", storage=INT8)
    manifest = made.engine.manifest
    assert manifest.kv.scales == KV_SCALES
    assert KV_SCALES in manifest.files
    for stage in manifest.layer_stages:
        (few,) = attentions(made.folder, stage.file)
        assert few["k_quant_type"] == few["v_quant_type"] == b"PER_TENSOR"
        assert few["kv_cache_bit_width"] == 8
        (many,) = attentions(made.folder, stage.wide_file)
        assert not {"k_quant_type", "v_quant_type", "kv_cache_bit_width"} & many.keys()
    plain = tiny("llama", precision="int4", storage=PLAIN).engine.manifest
    assert KV_SCALES not in plain.files
    costs = [[s.multiply_adds for s in m.layer_stages] for m in (manifest, plain)]
    assert costs[0] == costs[1]


def test_joined_engines_equal_single_ones(tiny, tmp_path):
    made = tiny("llama", precision="int4", storage=INT8)
    shutil.copytree(made.folder, tmp_path / "engines")
    manifest = load_manifest(made.folder).model_copy(update={"layers_per_engine": None})
    write_manifest(tmp_path / "engines", join_calibrated(tmp_path / "engines", manifest))
    joined = Engine.load(tmp_path / "engines", verify=True)
    assert len(joined.manifest.layer_stages) == 1
    tokens = text(joined, 90)
    found, expected = (step_by_step(engine, tokens, 60)[0] for engine in (joined, made.engine))
    assert error(found, expected) < 0.03  # sums in another order may round to the code beside


def test_layers_are_written_again_with_the_scales_that_are_there(tiny, tmp_path, monkeypatch):
    made = tiny("llama", precision="int4", storage=INT8)
    folder = tmp_path / "engines"
    shutil.copytree(made.folder, folder)
    (folder / "stages" / "layer_002.data").write_bytes(b"")
    monkeypatch.setattr(kv_ranges, "FloatDecoder", None)  # not again
    request = ExportRequest(str(made.checkpoint), folder, storage=INT8, layers=(2, 2))
    export(request)
    Engine.load(folder, verify=True)
    with pytest.raises(OutputError, match="has caches of int8, not float32; give its settings"):
        export(dataclasses.replace(request, storage=PLAIN))
    plain = tiny("llama", precision="int4", storage=PLAIN)
    with pytest.raises(OutputError, match="has caches of float32, not int8; give its settings"):
        export(dataclasses.replace(request, out=plain.folder))


def test_a_deeper_model_is_refused(tiny, tmp_path):
    made = tiny("llama", precision="int4", storage=INT8)
    make_checkpoint(tmp_path / "deeper", num_hidden_layers=6)
    request = ExportRequest(str(tmp_path / "deeper"), made.folder, storage=INT8, layers=(2, 2))
    with pytest.raises(OutputError, match=r"has caches of another model: \[4, 2, 2, 16\]"):
        export(request)


@pytest.mark.parametrize("stop_behind", [0, 3])
def test_a_resumed_export_writes_the_same_bytes_and_measures_once(
    checkpoint, tmp_path, monkeypatch, stop_behind
):
    """Here with scales that stand among the tables of the data files, as large models' do."""
    monkeypatch.setattr(kv_ranges, "_MOST_UNEVEN", 0.0)
    monkeypatch.setattr(import_module("adainfer_export.layout"), "_INLINE_BYTES", 64)
    whole = export(ExportRequest(str(checkpoint), tmp_path / "whole", storage=INT8)).manifest
    journal = import_module("adainfer_export.journal").Journal
    note, noted = journal.note, []

    def stopping(self, file, written):
        if not self._path.parent.name.startswith(".out"):  # the float model's own
            note(self, file, written)
            return
        if len(noted) > stop_behind:
            raise KeyboardInterrupt
        noted.append(file)
        note(self, file, written)

    monkeypatch.setattr(journal, "note", stopping)
    out = tmp_path / "out"
    request = ExportRequest(str(checkpoint), out, storage=INT8, resume=True, workers=1)
    with pytest.raises(KeyboardInterrupt):
        export(request)
    assert noted[0] == KV_SCALES
    monkeypatch.setattr(journal, "note", note)
    monkeypatch.setattr(kv_ranges, "FloatDecoder", None)  # not again
    with pytest.raises(OutputError, match="it had kv_cache int8, now float32 is asked for"):
        export(dataclasses.replace(request, storage=PLAIN))
    assert export(request).manifest.files == whole.files


def test_refused_before_the_model_is_run(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(kv_ranges, "FloatDecoder", None)
    storage = dataclasses.replace(INT8, int8_layers=frozenset({9}))
    with pytest.raises(UnsupportedError, match="names layer 9: this model has 4"):
        export(ExportRequest(str(checkpoint), tmp_path / "out", storage=storage))


def test_command_line(checkpoint, tmp_path):
    out = tmp_path / "engines"
    arguments = ["export", str(checkpoint), "--out", str(out), "--calibration", "none"]
    done = CliRunner().invoke(build_app(), [*arguments, "--kv-cache-dtype", "int8", "--quiet"])
    assert done.exit_code == 0, done.output
    manifest = load_manifest(out)
    assert manifest.kv.dtype == "int8"
    shown = CliRunner().invoke(build_app(), ["inspect", str(out)]).output
    assert f"{4 * 2 * 2 * 16 * 128 / 1e6:.1f} MB per sequence, int8" in shown


def test_without_a_tokenizer(checkpoint, tmp_path):
    (checkpoint / "tokenizer.json").unlink()
    with pytest.raises(UnsupportedError, match="the checkpoint has no tokenizer"):
        export(ExportRequest(str(checkpoint), tmp_path / "out", storage=INT8))
    assert not (tmp_path / "out").exists()
