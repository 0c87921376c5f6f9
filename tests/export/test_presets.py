"""Boards: the target's form by TensorRT version, and lengths that fit."""

from __future__ import annotations

import pytest
from transformers import AutoConfig

from adainfer_export import ExportRequest, export
from adainfer_export.build.builder import _NEEDS
from adainfer_export.errors import UnsupportedError
from adainfer_export.lower import find_target
from adainfer_export.presets import PRESETS, find_preset, fitting_length

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


def test_the_length_shrinks_until_weights_and_cache_fit():
    nano = find_preset("jetson-orin-nano")
    length = fitting_length(nano, LLAMA2_7B, "int4")
    cache = length * 32 * 2 * 4096 * 2
    assert 0 < length < nano.max_seq_len
    assert cache < nano.memory_bytes - 3_600_000_000  # 6.5 G weights at 4.5 bits
    assert fitting_length(find_preset("jetson-thor"), LLAMA2_7B, "bf16") == 8192


def test_weights_that_do_not_fit_are_refused():
    match = "weights of 12.8 GiB do not fit the 5 GiB .* choose another precision"
    with pytest.raises(UnsupportedError, match=match):
        fitting_length(find_preset("jetson-orin-nano"), LLAMA2_7B, "fp16")


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
