"""Boards: the target's form by TensorRT version, and lengths that fit."""

from __future__ import annotations

import copy
import dataclasses

import pytest
from transformers import AutoConfig

from adainfer_export import ExportRequest, export
from adainfer_export.build.builder import _NEEDS
from adainfer_export.errors import UnsupportedError
from adainfer_export.footprint import build_bytes, footprint
from adainfer_export.join import join_engines
from adainfer_export.lower import find_target
from adainfer_export.presets import (
    PRESETS,
    find_preset,
    fitting_length,
    most_layers_per_engine,
)

LLAMA2_7B = AutoConfig.for_model(
    "llama",
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=32,
    vocab_size=32000,
)


@pytest.mark.parametrize("preset", PRESETS, ids=lambda preset: preset.name)
def test_every_preset_names_a_target_that_its_tensorrt_runs(preset):
    find_target(preset.target, preset.precision)
    version = tuple(int(part) for part in preset.tensorrt.split(".")[:2])
    assert version >= _NEEDS[preset.target]


def fitting(name, precision, **settings):
    preset = find_preset(name)
    return fitting_length(preset, LLAMA2_7B, precision, preset.target, **settings)


def test_the_length_shrinks_until_all_fits():
    nano = find_preset("jetson-orin-nano")
    length = fitting("jetson-orin-nano", "int4")
    need = footprint(LLAMA2_7B, "int4", nano.target, context_exit=False)
    assert 0 < length < nano.max_seq_len
    assert need.fixed + length * need.per_position <= nano.memory_bytes
    assert need.fixed + (length + 1) * need.per_position > nano.memory_bytes
    assert fitting("jetson-thor", "bf16") == 8192


def test_a_footprint_counts_what_plans_hold():
    """Llama-2-7B: 6.48 G weights in layers, 131 M in a table."""
    layer = 4 * 4096 * 4096 + 3 * 4096 * 11008
    need = footprint(LLAMA2_7B, "int4", "tensorrt", context_exit=False)
    assert need.layers == pytest.approx(32 * layer * 4.5 / 8)
    assert need.tables == 2 * 2 * 32000 * 4096  # embedding and head, which plans share
    tied = copy.deepcopy(LLAMA2_7B)
    tied.tie_word_embeddings = True
    tied_need = footprint(tied, "int4", "tensorrt", context_exit=False)
    assert tied_need.tables == need.tables // 2
    for config, copies in ((LLAMA2_7B, 3), (tied, 2)):  # the probe's own as well
        padded = copy.deepcopy(config)
        padded.vocab_size = 32001
        more = footprint(padded, "int4", "tensorrt", context_exit=False)
        assert more.tables == copies * 2 * 32001 * 4096
    # 16-bit weights twice: once for each profile.
    assert footprint(LLAMA2_7B, "bf16", "tensorrt", context_exit=False).layers == 32 * layer * 4
    assert footprint(LLAMA2_7B, "fp8", "tensorrt", context_exit=False).layers == 32 * layer * 2
    translated = footprint(LLAMA2_7B, "int4", "tensorrt", context_exit=True)
    assert translated.exits - need.exits == 2 * 4 * layer
    assert need.exits > 0.1 * need.layers  # adapters: a twentieth, in 32 bits
    plain = footprint(LLAMA2_7B, "int4", "tensorrt-basic", context_exit=False)
    assert plain.per_position - need.per_position == 2 * 2 * 512 * 32  # scores
    assert need.per_position > 32 * 2 * 4096 * 2  # the cache, and what waits
    assert need.scratch > 512 * 4 * 4096


def test_weights_that_do_not_fit_are_refused():
    match = (
        r"GiB \(layers 24.1, embedding and head 0.5, exit graphs 1.3, scratch 0.1\) do not fit the "
        r"5 GiB .* choose another precision"
    )
    with pytest.raises(UnsupportedError, match=match):
        fitting("jetson-orin-nano", "fp16")


@pytest.mark.parametrize("preset", PRESETS, ids=lambda preset: preset.name)
def test_boards_do_not_get_32_bits(preset, tmp_path):
    """Lengths count 16: refused before the checkpoint is even looked for."""
    request = ExportRequest(
        "no-such-model", tmp_path / "x", target="tensorrt-basic", precision="fp32", preset=preset
    )
    match = rf"^preset {preset.name}: precision fp32 .*; export with --precision {preset.precision}"
    with pytest.raises(UnsupportedError, match=match):
        export(request)


def test_engines_are_no_larger_than_a_board_can_build():
    most = {p.name: most_layers_per_engine(p, LLAMA2_7B, p.precision) for p in PRESETS}
    assert 1 < most["jetson-orin-nano"] < most["jetson-orin"] < 32
    for preset in PRESETS:
        count, half = most[preset.name], preset.memory_bytes // 2
        assert build_bytes(LLAMA2_7B, preset.precision, count) <= half
        assert build_bytes(LLAMA2_7B, preset.precision, count + 1) > half
    small = AutoConfig.for_model("llama", hidden_size=576, num_hidden_layers=30)
    assert most_layers_per_engine(find_preset("jetson-orin-nano"), small, "int4") == 30
    # Never none at all.
    tight = dataclasses.replace(find_preset("jetson-orin-nano"), memory_bytes=1 << 20)
    assert most_layers_per_engine(tight, LLAMA2_7B, "int4") == 1


def test_joined_engines_keep_within_the_boards_bound(checkpoint, tmp_path):
    config = AutoConfig.from_pretrained(checkpoint, trust_remote_code=False)
    board = find_preset("jetson-orin")
    preset = dataclasses.replace(board, memory_bytes=2 * build_bytes(config, "fp16", 3))
    request = ExportRequest(
        str(checkpoint),
        tmp_path / "engines",
        target=preset.target,
        precision="fp16",
        preset=preset,
    )
    manifest = export(request).manifest
    assert manifest.most_layers_per_engine == 3
    _, dialect, _ = find_target(manifest.target, manifest.precision)
    joined = join_engines(tmp_path / "engines", manifest, dialect)
    assert [stage.last_layer for stage in joined.joined] == [2, 4]  # in parts of one size
    fixed = dataclasses.replace(request, layers_per_engine=4, force=True)
    assert export(fixed).manifest.most_layers_per_engine is None


def test_unknown_presets_suggest_near_names():
    with pytest.raises(UnsupportedError, match="preset 'jetson-orn' is unknown; did you mean jet"):
        find_preset("jetson-orn")


def test_export_for_a_board(checkpoint, tmp_path):
    preset = find_preset("jetson-orin")
    request = ExportRequest(
        str(checkpoint),
        tmp_path / "engines",
        target=preset.target,
        precision=preset.precision,
        preset=preset,
    )
    manifest = export(request).manifest
    assert (manifest.target, manifest.precision) == ("tensorrt-basic", "int4")
    assert manifest.max_seq_len == 128  # the model's own limit
    assert manifest.kv.layout == "prefix"
