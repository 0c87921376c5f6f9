"""Where tensors lie: inside their buffers, aligned, and caches without overlap."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from adainfer_runtime.backends.layout import ITEM_BYTES, SequenceLayout, kv_geometry
from adainfer_runtime.manifest import KvGeometry

VARIANTS = ("llama", "llama-pruned", "opt", "gemma3")


@pytest.fixture(params=product(["ort-cpu", "onnx-std", "tensorrt-basic"], VARIANTS))
def manifest(tiny, request):
    target, variant = request.param
    return tiny(variant, target=target).engine.manifest


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_regions_lie_inside_their_buffers(tiny, data):
    target = data.draw(st.sampled_from(["ort-cpu", "onnx-std", "tensorrt-basic"]))
    variant = data.draw(st.sampled_from(["llama", "llama-pruned", "opt"]))
    manifest = tiny(variant, target=target).engine.manifest
    layout = SequenceLayout(manifest, 32)
    rows = data.draw(st.integers(1, 32))
    past = data.draw(st.integers(0, manifest.kv.max_length - rows))
    buffers = layout.buffers()
    runs = [layout.embed(rows), layout.stage(data.draw(st.integers(0, 3)), rows, past)]
    runs += [run for run in [layout.positions(rows, past)] if run is not None]
    for run in runs:
        for region in [*run.inputs.values(), *run.outputs.values()]:
            spec = buffers[region.buffer]
            assert region.dtype == spec.dtype
            assert region.offset % ITEM_BYTES[region.dtype] == 0
            assert region.offset + region.bytes <= spec.bytes
        for before, after in run.aliases:
            assert run.inputs[before] == run.outputs[after]


def test_stages_are_bound_by_the_names_of_their_graphs(manifest):
    layout = SequenceLayout(manifest, 8)
    assert set(layout.embed(3).inputs) == set(manifest.embed.inputs)
    for index, stage in enumerate(manifest.layer_stages):
        run = layout.stage(index, 3, 5)
        assert set(run.inputs) == set(stage.inputs)
        assert set(run.outputs) == set(stage.outputs)
    if manifest.positions is not None:
        run = layout.positions(3, 5)
        assert set(run.inputs) == set(manifest.positions.inputs)
        assert set(run.outputs) == set(manifest.positions.outputs)


def test_new_rows_of_a_prefix_cache_lie_right_behind_the_past(tiny):
    manifest = tiny("llama", target="tensorrt-basic").engine.manifest
    layout = SequenceLayout(manifest, 8)
    run = layout.stage(0, 3, 5)
    past, new = run.inputs["past_key.1"], run.outputs["present_key.1"]
    assert (past.offset, past.bytes) == (0, new.offset)
    assert past.shape[1] == 6  # the sink, and five positions
    assert run.aliases == ()


@given(
    heads=st.integers(1, 64),
    width=st.sampled_from([16, 64, 80, 96, 128]),
    dtype=st.sampled_from(["float32", "float16", "bfloat16"]),
)
def test_rows_of_a_prefix_cache_are_aligned_for_tensorrt(heads, width, dtype):
    geometry = kv_geometry("prefix", dtype, (heads,), width, 8)
    stride = geometry.row_elements * ITEM_BYTES[dtype]
    assert stride % 256 == 0
    assert 0 <= stride - heads * width * ITEM_BYTES[dtype] < 256


def test_padding_belongs_to_the_prefix_layout():
    with pytest.raises(ValidationError, match="row_elements belongs to the layout prefix"):
        KvGeometry(num_heads=2, head_dim=16, max_length=8, row_elements=32)
    with pytest.raises(ValidationError, match="row_elements 16 is less than 32"):
        KvGeometry(layout="prefix", num_heads=2, head_dim=16, max_length=8, row_elements=16)
