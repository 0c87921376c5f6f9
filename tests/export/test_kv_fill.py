"""`kv_fill` stages: a layer's K and V, on the layer's own weights, without another byte of them."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from adainfer_export.errors import LoweringError
from adainfer_export.layout import StageLayout
from adainfer_export.storage import StorageRequest
from adainfer_export.weights import Dense, Rows

PROMPT = [5, 17, 200, 43, 9, 120, 77]
VARIANTS = (
    *("llama-tied", "llama-mha", "llama3-rope", "llama-bias", "llama-pruned", "qwen2", "qwen3"),
    *("opt", "opt-350m", "gemma2", "gemma3", "phi3", "gpt2", "gpt_neox", "gpt_neox-serial"),
)


def inputs_of_layers(engine):
    """Hidden states before every layer, and the K and V that the layer made of them."""
    session = engine.session()
    session.extend(PROMPT)
    before = {1: session.hidden().copy()}
    for layer in engine.manifest.boundaries[:-1]:
        session.advance(layer)
        before[layer + 1] = session.hidden().copy()
    session.complete()
    return before, session


@pytest.mark.parametrize("precision", ["fp32", "int8", "int4"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_of_its_own_input_a_layer_makes_its_own_keys_and_values(tiny, variant, precision):
    engine = tiny(variant, precision=precision).engine
    assert set(engine.manifest.kv_fills) == {1, 2, 3, 4}
    before, session = inputs_of_layers(engine)
    # Products of another width may sum in another order; int8 activations round.
    loose = 1e-5 if precision == "fp32" else 2e-2
    for layer, hidden in before.items():
        for start in (0, 3):
            made = engine.backend.kv_fill(layer, hidden[start:], start)
            for mine, own in zip(made, session.kv(layer), strict=True):
                np.testing.assert_allclose(mine, own[:, start:], atol=loose * np.abs(own).max())


def test_sensitive_layers_have_theirs_in_8_bits(tiny):
    storage = StorageRequest(int8_layers=frozenset({2}))
    engine = tiny("llama", precision="int4", storage=storage).engine
    before, session = inputs_of_layers(engine)
    for layer in (1, 2):
        made = engine.backend.kv_fill(layer, before[layer], 0)
        for mine, own in zip(made, session.kv(layer), strict=True):
            np.testing.assert_allclose(mine, own, atol=2e-2 * np.abs(own).max())


def test_layers_within_an_engine_have_theirs_too(tiny):
    """Their input norm is part of the engine's graph: the same stages as those of single layers."""
    single, joint = (tiny("llama", layers_per_engine=n).engine for n in (1, 2))
    hidden = np.random.default_rng(0).normal(size=(5, 64)).astype(np.float32)
    for layer in (1, 2, 3, 4):
        one, two = (engine.backend.kv_fill(layer, hidden, 2) for engine in (single, joint))
        np.testing.assert_allclose(one, two, atol=1e-5)
        assert joint.manifest.kv_fills[layer].multiply_adds == 64 * 2 * 2 * 16


def spans(path):
    """(file, first byte, last byte + 1) of a graph's external tensors by name."""
    found = {}
    for tensor in onnx.load(path, load_external_data=False).graph.initializer:
        if tensor.external_data:
            fields = {entry.key: entry.value for entry in tensor.external_data}
            offset = int(fields.get("offset", 0))
            found[tensor.name] = (fields["location"], offset, offset + int(fields["length"]))
    return found


@pytest.mark.parametrize("precision", ["fp32", "int4"])
@pytest.mark.parametrize("variant", ["llama", "llama-bias", "qwen3"])
def test_they_hold_no_weights_of_their_own(tiny, variant, precision):
    made = tiny(variant, precision=precision)
    stages = made.folder / "stages"
    assert not list(stages.glob("kv_fill*.data"))
    for layer in range(1, 5):
        own = spans(stages / f"layer_{layer:03d}.onnx")
        fill = spans(stages / f"kv_fill_{layer:03d}.onnx")
        assert fill
        for name, (file, start, end) in fill.items():
            assert any(
                file == other and first <= start and end <= last
                for other, first, last in own.values()
            ), name
    rows = [name for name in spans(stages / "kv_fill_001.onnx") if ".rows_" in name]
    assert bool(rows) == (precision == "int4" or variant == "llama-bias")


def test_rows_of_what_nobody_stored_are_refused(tmp_path):
    layout = StageLayout(tmp_path)
    with pytest.raises(LoweringError, match=r"rows of a\+b, which no stage holds"):
        layout._place_of_rows(Rows(Dense(("a", "b")), 0, 1, 2))
