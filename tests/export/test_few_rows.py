"""Attention of int4 graphs: one kernel for few positions, the tiled one for many."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from adainfer_export.storage import StorageRequest
from adainfer_runtime import Engine
from adainfer_runtime.backends.ort_cpu import open_session

from ..reference import dequantised_reference, reference_logits


def attentions(folder, file):
    graph = onnx.load(folder / file, load_external_data=False).graph
    return [
        ({a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}, list(node.input))
        for node in graph.node
        if node.op_type == "GroupQueryAttention"
    ]


def has_sink(inputs):
    return len(inputs) == 12 and inputs[11] != ""


@pytest.mark.parametrize("prefill", ["stored", "int8"])
@pytest.mark.parametrize("variant", ["llama", "llama-bias", "qwen2"])
def test_few_positions_and_many(tiny, variant, prefill):
    made = tiny(variant, precision="int4", storage=StorageRequest(prefill=prefill))
    for stage in made.engine.manifest.layer_stages:
        ((attributes, inputs),) = attentions(made.folder, stage.file)
        assert attributes["scale"] == 1.0
        assert has_sink(inputs)
        ((attributes, inputs),) = attentions(made.folder, stage.wide_file)
        assert attributes["scale"] == pytest.approx(16**-0.5)
        assert not has_sink(inputs)


@pytest.mark.parametrize(
    ("variant", "precision"),
    [
        ("llama", "fp32"),  # one graph for all passes
        ("llama", "int8"),
        ("mistral-window", "int4"),
        ("qwen3", "int4"),  # norms between product and attention
    ],
)
def test_others_stay_as_they_are(tiny, variant, precision):
    made = tiny(variant, precision=precision)
    for stage in made.engine.manifest.layer_stages:
        for attributes, inputs in attentions(made.folder, stage.file):
            assert attributes["scale"] != 1.0
            assert not has_sink(inputs)


@pytest.mark.parametrize("variant", ["llama", "llama-bias", "qwen2"])
def test_both_graphs_attend_alike(tiny, variant):
    """Float32 arithmetic of the wide graph apart, which the model with the same weights tells."""
    made = tiny(variant, precision="int4")
    stage = made.engine.manifest.layer_stages[0]
    narrow, wide = (open_session(made.folder / file) for file in (stage.file, stage.wide_file))
    random = np.random.default_rng(0)
    kv = made.engine.manifest.kv
    cache = random.normal(size=(1, kv.num_heads, 24, kv.head_dim)).astype(np.float32)
    feed = {
        "hidden": random.normal(size=(1, 5, 64)).astype(np.float32),
        "seqlens_k": np.array([15], np.int32),
        "total_sequence_length": np.array(16, np.int32),
        "past_key.1": cache,
        "past_value.1": cache[::-1].copy(),
    }
    for one, other in zip(narrow.run(None, feed), wide.run(None, feed), strict=True):
        assert np.abs(one - other).max() < 0.03 * np.abs(other).max()


def test_tokens_one_by_one_equal_the_float_model(tiny):
    made = tiny("qwen2", precision="int4")
    prompt = [int(token) for token in np.random.default_rng(3).integers(2, 320, 30)]
    session = Engine.load(made.folder).session()
    for token in prompt:
        session.extend([token])
        session.complete()
    found = made.engine.backend.probe_logits(session.hidden())
    expected = reference_logits(dequantised_reference(made, "int4"), prompt)
    error = np.sqrt(((found - expected) ** 2).mean() / (expected**2).mean())
    assert error < 0.05  # activations have 8 bits
