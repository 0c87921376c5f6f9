"""The real model, end to end: SmolLM2-135M-Instruct from its package."""

from __future__ import annotations

import numpy as np
import pytest

from adainfer_export.calibrate.builtin import builtin_examples
from adainfer_export.sources import resolve
from adainfer_export.validate import reference_model
from adainfer_runtime import ClassifierExit, Engine

from .reference import reference_greedy, reference_logits


@pytest.fixture(scope="module")
def reference(smollm2_gguf):
    return reference_model(resolve("smollm2-135m"))


@pytest.fixture(scope="module")
def engine(smollm2_fp32):
    return Engine.load(smollm2_fp32, verify=True)


def prompts(engine, count, shortest=20, longest=200):
    """Few-shot prompts, strung together and cut to random lengths."""
    random = np.random.default_rng(1)
    texts = [example.prompt for example in builtin_examples(seed=7)]
    for _ in range(count):
        chosen = random.choice(len(texts), 8, replace=False)
        ids = engine.tokenizer.encode("\n\n".join(texts[i] for i in chosen))
        yield ids[: int(random.integers(shortest, longest + 1))]


def check_logits(engine, reference, count):
    worst = 0.0
    for ids in prompts(engine, count):
        session = engine.session()
        session.extend(ids)
        session.complete()
        logits = engine.backend.probe_logits(session.hidden())
        worst = max(worst, float(np.abs(logits - reference_logits(reference, ids)).max()))
    print(f"largest logit difference on {count} prompts: {worst:.2e}")
    assert worst <= 1e-3


def check_greedy(engine, reference, count):
    for ids in prompts(engine, count):
        result = engine.generate(ids, max_new_tokens=64, ignore_eos=True)
        assert list(result.tokens) == reference_greedy(reference, ids, 64)


def test_logits_equal_transformers(engine, reference):
    check_logits(engine, reference, 6)


@pytest.mark.slow
def test_logits_equal_transformers_on_100_prompts(engine, reference):
    check_logits(engine, reference, 100)


def test_greedy_text_equals_transformers(engine, reference):
    check_greedy(engine, reference, 2)


@pytest.mark.slow
def test_greedy_text_equals_transformers_on_30_prompts(engine, reference):
    check_greedy(engine, reference, 30)


@pytest.mark.parametrize(
    "count", [1, pytest.param(30, marks=pytest.mark.slow)], ids="{}-prompts".format
)
def test_kept_blocks_give_the_greedy_text_of_dequantised_weights(smollm2_kept, reference, count):
    """llama.cpp's blocks as they are, against transformers on what they stand for."""
    check_greedy(Engine.load(smollm2_kept), reference, count)


def test_weights_equal_transformers_own_reading_of_the_file(smollm2_gguf, reference):
    """Our dequantisation and row order against the loader of transformers."""
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(
        smollm2_gguf.parent, gguf_file=smollm2_gguf.name
    ).state_dict()
    for name, tensor in reference.state_dict().items():
        np.testing.assert_allclose(tensor.numpy(), theirs[name].float().numpy(), atol=1e-6)


def test_tokenizer(engine):
    tokenizer = engine.tokenizer
    text = "In 2018, it's 3 o'clock:\n\tcafé — naïve?"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert len(tokenizer.encode("2018")) == 4  # this model's digits stand alone
    assert tokenizer.encode("<|im_start|>user") == [1, *tokenizer.encode("user")]
    assert tokenizer.decode([1]) == ""


def test_end_of_turn_stops_the_text(engine):
    prompt = "<|im_start|>user\nName three fruits.<|im_end|>\n<|im_start|>assistant\n"
    result = engine.generate(prompt, max_new_tokens=200)
    assert result.finish_reason == "eos"
    assert "anana" in result.text or "pple" in result.text
    assert engine.manifest.model.eos_token_ids == (2,)


@pytest.mark.parametrize("policy", ["all", "random"])
def test_cache_after_forced_exits_equals_off(engine, policy):
    """Exits at random layers, then the deferred fill: the KV cache of the full model."""
    random = np.random.default_rng(3)
    ids = next(iter(prompts(engine, 1, 40, 60)))
    session = engine.session()
    session.extend(ids)
    for _ in range(10):
        layer = 24 if policy == "all" else int(random.choice([0, 7, 13, 22, 29]))
        if layer:
            session.advance(layer)
        else:
            session.complete()
        session.extend([int(random.integers(1000, 40000))])
    session.complete()
    off = engine.session()
    off.extend(session.tokens)
    off.complete()
    for layer in range(1, 31):
        for mine, full in zip(session.kv(layer), off.kv(layer), strict=True):
            np.testing.assert_allclose(mine, full, atol=1e-4 * max(1.0, np.abs(full).max()))


def test_calibrated_engine_exits_early_and_mostly_agrees(smollm2_int4, tmp_path):
    """The whole way on the real model with few prompts: what is counted is consistent."""
    import shutil

    from adainfer_export.calibrate import CalibrationRequest
    from adainfer_export.calibrate.pipeline import recalibrate
    from adainfer_export.progress import SilentReporter
    from adainfer_runtime.engine_folder import load_manifest
    from adainfer_runtime.evaluation import evaluate, make_methods

    folder = tmp_path / "engines"
    shutil.copytree(smollm2_int4, folder)
    request = CalibrationRequest(limit=160, target_agreement=0.9)
    manifest = recalibrate(folder, load_manifest(folder), request, SilentReporter())
    assert manifest.exit is not None
    engine = Engine.load(folder, verify=True)
    examples = builtin_examples(seed=99)[::30]
    result = evaluate(make_methods(["adaptive"], folder, engine), examples)["adaptive"]
    if manifest.exit.points:
        assert 0.0 < result.mean.layers_saved < 0.5
    assert result.mean.agreement >= 0.75  # a loose floor: 160 prompts are few
    policy = engine.policy("adaptive", threshold=float("inf"))
    if isinstance(policy, ClassifierExit):
        prompt = examples[0].prompt
        never = engine.generate(prompt, max_new_tokens=12, mode="adaptive", threshold=float("inf"))
        assert never.tokens == engine.generate(prompt, max_new_tokens=12).tokens
        assert never.layers_saved == 0.0
