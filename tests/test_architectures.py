"""Every architecture, and every form of it, by the same checks (parity is in runtime/)."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from adainfer_export.architectures import ARCHITECTURES
from adainfer_export.validate import validate_folder
from adainfer_runtime.batch import ContinuousBatching, TakeTurns

from .checkpoints import VARIANTS
from .reference import dequantised_reference, reference_logits
from .scripted import ScriptedExit

PROMPT = [5, 17, 200, 43, 9, 120, 77, 31, 250, 8, 61, 13, 99, 301, 4, 18, 230, 71]
EXITS = [2, 1, 0, 3, 1, 1, 2, 0, 3, 1]


def whole(engine, tokens):
    session = engine.session()
    session.extend(tokens)
    session.complete()
    return session


def test_every_architecture_has_a_checkpoint():
    assert {model_type for model_type, _ in VARIANTS.values()} == {
        entry.model_type for entry in ARCHITECTURES
    }


@pytest.mark.parametrize("variant", VARIANTS)
def test_prompt_in_chunks_equals_one_pass(tiny, variant, monkeypatch):
    engine = tiny(variant).engine
    expected = whole(engine, PROMPT)
    monkeypatch.setattr(type(engine.backend), "max_rows", 5)
    np.testing.assert_allclose(whole(engine, PROMPT).hidden(), expected.hidden(), atol=1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_forced_exits_leave_the_full_models_cache(tiny, variant):
    engine = tiny(variant).engine
    policy = ScriptedExit(EXITS, engine.manifest.boundaries[:-1])
    session = engine.session()
    session.extend(PROMPT)
    for token in range(len(EXITS)):
        policy.next()
        session.predict(policy)
        session.extend([7 + token])
    assert session.count.layers_saved > 0
    session.complete()
    off = whole(engine, session.tokens)
    for layer in range(1, engine.manifest.model.num_layers + 1):
        for mine, full in zip(session.kv(layer), off.kv(layer), strict=True):
            np.testing.assert_allclose(mine, full, atol=1e-4)
    np.testing.assert_allclose(session.hidden(), off.hidden(), atol=1e-4)


def continued(prompt, exits):
    """A text that goes on with given tokens, exits now and then, and returns its logits."""

    def text(session):
        logits, policy = [], ScriptedExit(exits, [1, 2, 3])
        session.extend(prompt)
        for token in range(len(exits)):
            policy.next()
            logits.append(session.predict(policy).result.logits.copy())
            yield
            session.extend([7 + token])
        return np.stack(logits)

    return text


@pytest.mark.parametrize("variant", VARIANTS)
def test_texts_that_share_passes_are_what_they_are_alone(tiny, variant):
    engine = tiny(variant).engine
    prompts = [PROMPT[:3], PROMPT[:11], PROMPT[4:9], PROMPT[7:8]]
    texts = [
        continued(prompt, EXITS if place == 2 else [0] * len(EXITS))
        for place, prompt in enumerate(prompts)
    ]
    together = ContinuousBatching().run(texts, engine)
    alone = TakeTurns().run(texts, engine)
    for mine, expected in zip(together, alone, strict=True):
        np.testing.assert_allclose(mine, expected, atol=1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_int4_equals_its_dequantised_weights(tiny, variant):
    made = tiny(variant, precision="int4")
    logits = made.engine.backend.probe_logits(whole(made.engine, PROMPT).hidden())
    expected = reference_logits(dequantised_reference(made, "int4"), PROMPT)
    # Activations are rounded to int8 (accuracy level 4): close, not equal.
    assert np.abs(logits - expected).max() <= 0.08 * np.abs(expected).max()
    assert np.corrcoef(logits.ravel(), expected.ravel())[0, 1] > 0.998


@pytest.mark.parametrize("precision", ["fp32", "int4"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_stages_pass_the_onnx_checker(tiny, variant, precision):
    made = tiny(variant, precision=precision)
    files = sorted((made.folder / "stages").glob("*.onnx"))
    assert len(files) >= len(made.engine.manifest.stages)
    for path in files:
        onnx.checker.check_model(str(path), full_check=True)


@pytest.mark.parametrize("variant", VARIANTS)
def test_validate_passes(tiny, variant):
    made = tiny(variant)
    report = validate_folder(made.folder, str(made.checkpoint))
    assert report.passed
    assert report.logits <= 1e-3
    assert max(stage.largest for stage in report.stages) <= 1e-3
    assert len(report.stages) == made.engine.manifest.model.num_layers - 1
