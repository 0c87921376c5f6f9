"""Settings of configurations that no variant of `checkpoints` has."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from adainfer_export import ExportRequest, export
from adainfer_export.architectures import find_architecture
from adainfer_export.frontend import build_decoder
from adainfer_export.sources import resolve
from adainfer_runtime import Engine

from ..checkpoints import PARTIAL_ROPE, edit_config, longrope, make_checkpoint
from ..reference import reference_logits

YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
SETTINGS = {
    "yarn": ("llama", {"rope_parameters": YARN}),
    "linear": ("llama", {"rope_parameters": LINEAR}),
    "longrope": ("llama", longrope(32)),
    "gelu": ("llama", {"hidden_act": "gelu_pytorch_tanh"}),
    # ONNX Runtime's attention rotates multiples of 16 alone: these are rotated before it.
    "head-24": ("llama", {"head_dim": 24}),
    "head-40-partial": ("gpt_neox", {"hidden_size": 160, "rope_parameters": PARTIAL_ROPE}),
    "no-bias": ("opt", {"enable_bias": False}),
    "scale-by-layer": ("gpt2", {"scale_attn_by_inverse_layer_idx": True, "n_inner": None}),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_logits_equal_transformers(tmp_path, name):
    variant, settings = SETTINGS[name]
    model = make_checkpoint(tmp_path / "checkpoint", variant, tokenizer=False, **settings)
    export(ExportRequest(str(tmp_path / "checkpoint"), tmp_path / "out", precision="fp32"))
    engine = Engine.load(tmp_path / "out")
    session = engine.session()
    prompt = list(range(5, 45))
    session.extend(prompt[:30])
    session.complete()
    session.extend(prompt[30:])
    session.complete()
    logits = engine.backend.probe_logits(session.hidden())
    assert np.abs(logits - reference_logits(model, prompt)).max() <= 1e-3
    graph = onnx.load(tmp_path / "out" / "stages" / "layer_001.onnx", load_external_data=False)
    apart = [node.op_type for node in graph.graph.node].count("RotaryEmbedding")
    assert apart == (2 if name.startswith("head") else 0)


@pytest.mark.parametrize("variant", ["llama", "llama3-rope", "gpt_neox"])
def test_rotary_tables_are_as_long_as_the_engine(tmp_path, variant):
    """Those of a context of 10⁹ positions would take 64 GB."""
    make_checkpoint(tmp_path / "checkpoint", variant, tokenizer=False)
    edit_config(tmp_path / "checkpoint", max_position_embeddings=10**9)
    checkpoint = resolve(str(tmp_path / "checkpoint"))
    architecture = find_architecture(checkpoint.config.model_type)
    decoder = build_decoder(checkpoint.config, architecture, 50, checkpoint.shape)
    tables = {
        value.name: value.const_value.shape.numpy()
        for value in decoder.model.graph.initializers.values()
        if value.const_value is not None and value.const_value.nbytes > 100
    }
    assert len(tables) == 2
    assert {shape[0] for shape in tables.values()} == {50}
