"""The real model, end to end: SmolLM2-135M-Instruct from its package."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from adainfer_export.calibrate.builtin import builtin_examples
from adainfer_export.export import ExportRequest, export
from adainfer_export.sources import resolve
from adainfer_export.storage import StorageRequest
from adainfer_export.validate import reference_model
from adainfer_runtime import (
    ClassifierExit,
    DecodeOptions,
    Engine,
    Fixed,
    NoExit,
    SamplingOptions,
)
from adainfer_runtime.sampling import make_sampler
from adainfer_runtime.session import log_softmax

from .export.context_folder import make_context_folder
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


@pytest.mark.slow
def test_prompts_in_8_bits_are_nearer_to_transformers(reference, smollm2_int4, tmp_path):
    """Positions of prompts, by the mean divergence of the next token's probabilities."""
    storage = StorageRequest(prefill="int8")
    export(ExportRequest("smollm2-135m", tmp_path / "engines", storage=storage))
    found = {}
    for folder in (smollm2_int4, tmp_path / "engines"):
        engine, divergences = Engine.load(folder), []
        for ids in prompts(engine, 6, shortest=60):
            session = engine.session()
            session.extend(ids)
            expected = log_softmax(reference_logits(reference, ids).astype(np.float64))
            difference = expected - session.log_probs(0)
            divergences.append((np.exp(expected) * difference).sum(axis=-1).mean())
        found[folder] = np.mean(divergences)
    assert found[tmp_path / "engines"] < 0.15
    assert found[smollm2_int4] > 0.25


@pytest.mark.slow
def test_caches_in_8_bits_lose_little(reference, smollm2_int4, tmp_path):
    """Behind a prompt, position by position: by the mean divergence from transformers, and by how
    far that moves the engine's own prediction."""
    storage = StorageRequest(kv_cache="int8")
    export(ExportRequest("smollm2-135m", tmp_path / "engines", storage=storage))
    plain, made = Engine.load(smollm2_int4), Engine.load(tmp_path / "engines")
    divergences: dict[bool, list[float]] = {True: [], False: []}
    moved, same = [], []
    for ids in prompts(plain, 8, shortest=120):
        expected = log_softmax(reference_logits(reference, ids).astype(np.float64))[80:]
        found = {}
        for engine in (plain, made):
            session = engine.session()
            session.extend(ids[:80])
            session.complete()
            for token in ids[80:]:
                session.extend([token])
                session.complete()
            found[engine is made] = session.log_probs(80)
        for key, own in found.items():
            divergences[key].append((np.exp(expected) * (expected - own)).sum(axis=-1).mean())
        change = np.exp(found[False]) * (found[False] - found[True])
        moved.append(change.sum(axis=-1).mean())
        same.append((found[True].argmax(axis=-1) == found[False].argmax(axis=-1)).mean())
    lost = np.mean(divergences[True]) / np.mean(divergences[False])
    print(f"divergence {lost:.3f} times, moved by {np.mean(moved):.4f}, same {np.mean(same):.3f}")
    assert lost < 1.15
    assert np.mean(moved) < 0.03
    assert np.mean(same) > 0.93


def test_weights_equal_transformers_own_reading_of_the_file(smollm2_gguf, reference):
    """Our dequantisation and row order against the loader of transformers."""
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(
        smollm2_gguf.parent, gguf_file=smollm2_gguf.name, trust_remote_code=False
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


def test_the_files_chat_template_is_kept(engine, smollm2_gguf):
    from gguf import GGUFReader
    from transformers import PreTrainedTokenizerFast

    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "Who are you?"},
    ]
    theirs = PreTrainedTokenizerFast(tokenizer_object=engine.tokenizer._inner)
    reader = GGUFReader(smollm2_gguf)
    theirs.chat_template = reader.fields["tokenizer.chat_template"].contents()
    expected = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert expected.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert engine.tokenizer.chat_template.render(messages) == expected
    ids = engine.tokenizer.encode_chat(messages)
    assert ids == theirs.encode(expected, add_special_tokens=False)
    assert ids.count(1) == 5  # <|im_start|> is one token


def test_a_conversation_equals_its_prompts(engine):
    """Four turns over one KV cache, each as if the whole chat had been read anew."""
    talk = engine.conversation()
    for asked in ("Name a fruit.", "Another one, please.", "Où est Paris? 😀", "Thanks!"):
        chat = [*talk.messages, {"role": "user", "content": asked}]
        expected = engine.chat(chat, max_new_tokens=24)
        found = talk.say(asked, max_new_tokens=24)
        assert (found.text, found.finish_reason) == (expected.text, expected.finish_reason)
        new = found.statistics.prompt_tokens - found.statistics.reused_tokens
        assert new <= 40 if len(chat) == 1 else new <= 25
    assert talk.messages[-1]["content"]


def check_generate(engine, reference, count):
    """Penalties, stop strings and the model's own end, as transformers' `generate` has them."""
    from transformers import PreTrainedTokenizerFast

    theirs = PreTrainedTokenizerFast(tokenizer_object=engine.tokenizer._inner)
    random, reasons = np.random.default_rng(5), []
    stops = ["\n\n", ". The", " and ", "?"]
    subjects = ["a river", "three fruits", "my dog", "the moon", "good bread"]
    for number in range(count):
        subject = subjects[number % len(subjects)]
        asked = f"Write {1 + number} short sentence(s) about {subject}."
        ids = engine.tokenizer.encode_chat([{"role": "user", "content": asked}])
        penalty = float(random.choice([1.0, 1.1, 1.3]))
        stop = list(random.choice(stops, 2, replace=False)) if number % 2 else []
        mine = engine.generate(ids, max_new_tokens=48, repetition_penalty=penalty, stop=stop)
        tokens = torch.tensor([ids])
        with torch.no_grad():
            out = reference.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                max_new_tokens=48,
                do_sample=False,
                repetition_penalty=penalty,
                eos_token_id=[2],
                pad_token_id=2,
                **({"stop_strings": stop, "tokenizer": theirs} if stop else {}),
            )[0, len(ids) :]
        text = theirs.decode(out, skip_special_tokens=True)
        places = [place for string in stop if (place := text.find(string)) >= 0]
        assert mine.text == text[: min(places, default=len(text))]
        assert list(mine.tokens) == [token for token in out.tolist() if token != 2]
        reasons.append(mine.finish_reason)
    return reasons


def test_generate_equals_transformers(engine, reference):
    check_generate(engine, reference, 2)


@pytest.mark.slow
def test_generate_equals_transformers_on_50_prompts(engine, reference):
    reasons = check_generate(engine, reference, 50)
    print({reason: reasons.count(reason) for reason in set(reasons)})
    assert {"eos", "stop"} <= set(reasons)


def check_probabilities(engine, reference, count):
    """Over the 49,152 tokens, after texts of either model's own: what `generate` would draw from.

    Logits differ by rounding, so a token at a filter's edge may fall on either side of it: what
    such tokens are worth is counted as a difference.
    """
    warpers = {
        "top_k": (40, TopKLogitsWarper), "top_p": (0.9, TopPLogitsWarper),
        "min_p": (0.05, MinPLogitsWarper),
    }  # fmt: skip
    chosen = [("top_k",), ("top_p",), ("min_p",), ("top_k", "top_p", "min_p")]
    worst, kept = 0.0, []
    for number, ids in enumerate(prompts(engine, count)):
        session = engine.session()
        session.extend(ids)
        mine = session.predict(NoExit()).result.logits
        theirs = torch.tensor(reference_logits(reference, ids)[-1:])
        temperature = (1.0, 1.5, 2.5)[number % 3]
        for names in chosen:
            options = {name: warpers[name][0] for name in names}
            sampler = make_sampler(SamplingOptions(temperature=temperature, **options), len(ids))
            found = sampler.probabilities(mine, ids)
            steps = [TemperatureLogitsWarper(temperature)]
            steps += [warpers[name][1](warpers[name][0]) for name in names]
            scores = LogitsProcessorList(steps)(torch.tensor([ids]), theirs.clone())
            expected = torch.softmax(scores.double(), -1)[0].numpy()
            worst = max(worst, float(np.abs(found - expected).sum()) / 2)
            kept.append(np.count_nonzero(found))
    print(f"largest total variation on {count} prompts: {worst:.2e}; kept {np.median(kept)}")
    assert worst <= 1e-3
    assert min(kept) < 10 < max(kept)  # filters that keep everything, or one token, test nothing


def test_sampling_probabilities_equal_transformers(engine, reference):
    check_probabilities(engine, reference, 3)


@pytest.mark.slow
def test_sampling_probabilities_equal_transformers_on_50_prompts(engine, reference):
    check_probabilities(engine, reference, 50)


def check_logprobs(engine, count):
    """Mode verified's, with drafts of the 27th layer that are mostly wrong, are mode off's."""
    options = DecodeOptions(draft_layer=27, draft_schedule=Fixed(3))
    for ids in prompts(engine, count):
        settings = {"max_new_tokens": 32, "ignore_eos": True, "logprobs": 3}
        off = engine.generate(ids, **settings)
        mine = engine.generate(ids, mode="verified", decoding=options, **settings)
        assert mine.tokens == off.tokens
        assert mine.statistics.drafts.proposed > 0
        for found, full in zip(mine.logprobs, off.logprobs, strict=True):
            assert found.logprob == pytest.approx(full.logprob, abs=1e-3)


def test_verified_logprobs_equal_off(engine):
    check_logprobs(engine, 2)


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


def check_equal(session, off):
    """Tokens, hidden states and KV of two sessions that are complete."""
    assert session.tokens == off.tokens
    np.testing.assert_allclose(
        session.hidden(), off.hidden(), atol=1e-4 * np.abs(off.hidden()).max()
    )
    for layer in range(1, 31):
        for mine, full in zip(session.kv(layer), off.kv(layer), strict=True):
            np.testing.assert_allclose(mine, full, atol=1e-4 * max(1.0, np.abs(full).max()))


@pytest.mark.slow
@pytest.mark.parametrize("accepted", [False, True])
def test_context_exits_are_exact_in_the_end(smollm2_fp32, tmp_path, accepted):
    """Every check refused: all is as in mode off. Every check accepted: the prompt's own tokens'
    K and V, and the text behind the first token, are the full model's.
    """
    examples = builtin_examples(seed=5)
    parts = (examples[:120], examples[120:150])
    engine = Engine.load(make_context_folder(smollm2_fp32, tmp_path / "fp32", (17, 21, 25), parts))
    policy = engine.policy("context", threshold=-float("inf") if accepted else float("inf"))
    early = 0
    for ids in prompts(engine, 30):
        session = engine.session()
        session.extend(ids)
        first = session.predict(policy)
        early += first.exit_layer < 30
        for token in (first.result.token, 100, 2000):
            session.extend([token])
            session.predict(NoExit())
        off = engine.session()
        off.extend(session.tokens)
        off.complete()
        check_equal(session, off)
        if not accepted:
            off.truncate(len(ids))
            assert first.result.token == off.predict(NoExit()).result.token
    assert early == (30 if accepted else 0)


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
