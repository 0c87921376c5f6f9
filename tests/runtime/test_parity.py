"""The chain equals transformers on the same weights, for every architecture."""

from __future__ import annotations

import numpy as np
import pytest

from adainfer_runtime import Engine

from ..checkpoints import VARIANTS
from ..reference import reference_greedy, reference_logits

PROMPT = [5, 17, 200, 43, 9, 120, 77, 31, 250, 8, 61, 13, 99, 301, 4, 18, 230, 71]


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_transformers(tiny, variant):
    made = tiny(variant)
    session = made.engine.session()
    session.extend(PROMPT)
    session.complete()
    logits = made.engine.backend.probe_logits(session.hidden())
    expected = reference_logits(made.reference, PROMPT)
    assert np.abs(logits - expected).max() <= 1e-3
    assert np.abs(expected).max() > 0.1  # the model says something


@pytest.mark.parametrize("variant", VARIANTS)
def test_greedy_tokens_equal_transformers(tiny, variant):
    made = tiny(variant)
    result = made.engine.generate(PROMPT, max_new_tokens=24, ignore_eos=True)
    assert list(result.tokens) == reference_greedy(made.reference, PROMPT, 24)
    assert result.layers_saved == 0.0
    assert set(result.exit_layers) == {4}


@pytest.mark.parametrize("layers_per_engine", [2, 3, 4])
def test_joined_layers_equal_single_ones(tiny, layers_per_engine):
    joined = tiny("llama", layers_per_engine=layers_per_engine).engine
    single = tiny("llama").engine
    hidden = []
    for engine in (joined, single):
        session = engine.session()
        session.extend(PROMPT)
        session.complete()
        hidden.append(session.hidden().copy())
    # Inside an engine, addition and norm are one operator: the same but for rounding.
    np.testing.assert_allclose(hidden[0], hidden[1], atol=2e-5)


def test_prompt_in_chunks_equals_one_pass(tiny, monkeypatch):
    engine = tiny("llama").engine
    whole = engine.session()
    whole.extend(PROMPT)
    whole.complete()
    monkeypatch.setattr(type(engine.backend), "max_rows", 5)
    chunked = engine.session()
    chunked.extend(PROMPT)
    chunked.complete()
    np.testing.assert_allclose(chunked.hidden(), whole.hidden(), atol=1e-5)


def dequantised_reference(made, variant, precision):
    """The transformers model with the weights that the engine really has."""
    import copy

    import torch

    from adainfer_export.lower import PRECISIONS
    from adainfer_export.quantise import dequantise_blocks, quantise_blocks

    record = PRECISIONS[precision]
    model = copy.deepcopy(made.reference)
    tied = variant == "llama-tied"
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() != 2:
                continue
            blocks = record.storage(name)
            if "embed_tokens" in name:
                blocks = record.embedding(name, tied=tied)
            made_of = quantise_blocks(parameter.numpy(), blocks.bits, blocks.block_size)
            values = dequantise_blocks(made_of.packed, made_of.scales, blocks.bits)
            parameter.copy_(torch.from_numpy(values))
    return model


@pytest.mark.parametrize("precision", ["int8", "int4"])
@pytest.mark.parametrize("variant", ["llama", "llama-tied", "qwen2", "qwen3"])
def test_quantised_chain_equals_its_dequantised_weights(tiny, variant, precision):
    made = tiny(variant, precision=precision)
    session = made.engine.session()
    session.extend(PROMPT)
    session.complete()
    logits = made.engine.backend.probe_logits(session.hidden())
    expected = reference_logits(dequantised_reference(made, variant, precision), PROMPT)
    # Activations are rounded to int8 (accuracy level 4): close, not equal.
    scale = np.abs(expected).max()
    assert np.abs(logits - expected).max() <= 0.06 * scale
    assert np.corrcoef(logits.ravel(), expected.ravel())[0, 1] > 0.999


@pytest.mark.parametrize("variant", ["llama", "qwen2", "qwen3", "mistral-window"])
def test_wide_passes_compute_in_float32(tiny, variant):
    import torch

    made = tiny(variant, precision="int4")
    wide_rows = made.engine.manifest.quantisation.wide_rows
    prompt = [int(token) for token in np.random.default_rng(0).integers(2, 320, wide_rows)]
    model = dequantised_reference(made, variant, "int4")
    with torch.no_grad():
        expected = model.model(torch.tensor([prompt])).last_hidden_state[0].numpy()

    def largest_difference(engine):
        session = engine.session()
        session.extend(prompt)
        session.complete()
        hidden = session.hidden()
        weight = model.model.norm.weight.detach().numpy()
        norm = hidden / np.sqrt((hidden**2).mean(-1, keepdims=True) + 1e-6) * weight
        return np.abs(norm - expected).max()

    assert largest_difference(made.engine) < 1e-4
    assert largest_difference(Engine.load(made.folder, low_memory=True)) > 1e-3  # int8 activations
