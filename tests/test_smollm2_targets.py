"""The real model in every dialect, on ONNX Runtime's CPU provider, against `ort-cpu` in fp32."""

from __future__ import annotations

import numpy as np
import pytest

from adainfer_export import ExportRequest, export
from adainfer_runtime import Engine

pytestmark = pytest.mark.slow

TEXTS = (
    "The capital of France is",
    "Once upon a time, in a small village by the sea, there lived an old fisherman who",
    "def fibonacci(n):\n    if n < 2:\n        return n\n",
)
PROSE = (
    "The history of the Roman Empire spans more than a thousand years, from the founding of the "
    "Republic to the fall of Constantinople. In the beginning the city was ruled by kings, and "
    "later by elected magistrates who shared their power with the senate.",
    "To make a good vegetable soup, start by heating two tablespoons of olive oil in a large pot. "
    "Add the onions, carrots and celery, and cook until they are soft, about ten minutes. Then add "
    "the garlic and stir for one more minute before pouring in the stock.",
    "Photosynthesis is the process by which green plants use sunlight to make their own food. It "
    "takes place in the chloroplasts, where chlorophyll absorbs light, and water and carbon "
    "dioxide are turned into glucose and oxygen.",
)
FLOAT32 = [("onnx-std", "fp32"), ("tensorrt-basic", "fp32")]
HALF = [("tensorrt", "fp16"), ("tensorrt-basic", "fp16"), ("ort-cuda", "fp16")]
PASSES = [(17, 0), (1, 17), (9, 18), (1, 27)]  # prefill, decode, chunk, decode


@pytest.fixture(scope="module")
def reference(smollm2_fp32):
    return Engine.load(smollm2_fp32)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """One folder at a time: each holds a few hundred MB."""
    made = {}

    def make(target, precision):
        key = (target, precision)
        if key not in made:
            made.clear()
            out = tmp_path_factory.mktemp("targets") / "engines"
            export(ExportRequest("smollm2-135m", out, target=target, precision=precision))
            made[key] = Engine.load(out)
        return made[key]

    return make


def stage_differences(engine, reference):
    """Largest difference of a stage's output and of a cache, relative to the largest value."""
    mine, theirs = (made.backend.open_sequence() for made in (engine, reference))
    worst = 0.0
    random = np.random.default_rng(0)
    for rows, past in PASSES:
        theirs.embed(random.integers(0, 49152, rows), past)
        for index in range(30):
            # The same input for both: what a stage adds is compared, not what came before it.
            given = np.array(theirs.hidden(index, rows))
            mine.hidden(index, rows)[:] = given
            mine.run_stage(index, rows, past)
            theirs.run_stage(index, rows, past)
            pairs = [(mine.hidden(index + 1, rows), theirs.hidden(index + 1, rows))]
            caches = (sequence.kv(index + 1, past + rows) for sequence in (mine, theirs))
            pairs += zip(*caches, strict=True)
            for a, b in pairs:
                worst = max(worst, float(np.abs(a - b).max() / max(1.0, np.abs(b).max())))
    return worst


@pytest.mark.parametrize(("target", "precision"), FLOAT32)
def test_float32_stages_and_tokens_are_those_of_ort_cpu(exported, reference, target, precision):
    engine = exported(target, precision)
    worst = stage_differences(engine, reference)
    print(f"{target} {precision}: largest relative stage difference {worst:.1e}")
    assert worst <= 1e-4
    for text in TEXTS:
        mine = engine.generate(text, max_new_tokens=32, ignore_eos=True)
        theirs = reference.generate(text, max_new_tokens=32, ignore_eos=True)
        assert mine.tokens == theirs.tokens


@pytest.mark.parametrize(("target", "precision"), FLOAT32)
def test_forced_exits_leave_the_full_models_cache(exported, target, precision):
    engine = exported(target, precision)
    session = engine.session()
    session.extend(engine.tokenizer.encode(TEXTS[1]))
    for layer in (7, 22, 30, 13):
        session.advance(layer)
        session.extend([1000 + layer])
    session.complete()
    off = engine.session()
    off.extend(session.tokens)
    off.complete()
    for layer in range(1, 31):
        for mine, full in zip(session.kv(layer), off.kv(layer), strict=True):
            np.testing.assert_allclose(mine, full, atol=1e-4 * max(1.0, np.abs(full).max()))


@pytest.mark.parametrize(("target", "precision"), HALF)
def test_half_precision_says_the_same(exported, reference, target, precision):
    engine = exported(target, precision)
    worst = stage_differences(engine, reference)
    print(f"{target} {precision}: largest relative stage difference {worst:.1e}")
    assert worst <= 5e-3  # a few roundings to 11 digits
    same = total = 0
    for text in TEXTS:
        ids = reference.tokenizer.encode(text)
        continued = [*ids, *reference.generate(text, max_new_tokens=32, ignore_eos=True).tokens]
        tokens = []
        for made in (engine, reference):
            session = made.session()
            session.extend(continued)
            tokens.append(session.log_probs(0).argmax(-1))
        same += int((tokens[0] == tokens[1]).sum())
        total += len(continued)
    print(f"{target} {precision}: same next token at {same} of {total} positions")
    assert same / total >= 0.97


def divergence(engine, reference):
    """Mean KL divergence from the reference's next token, over every position of the texts."""
    found = []
    for text in (*TEXTS, *PROSE):
        ids = reference.tokenizer.encode(text)
        logs = []
        for made in (engine, reference):
            session = made.session()
            session.extend(ids)
            logs.append(session.log_probs(0))
        found.append((np.exp(logs[1]) * (logs[1] - logs[0])).sum(-1))
    return float(np.concatenate(found).mean())


@pytest.fixture(scope="module")
def cpu_int4(tmp_path_factory, reference):
    """How far the CPU target's int4 is off, whose LM head has 4 bits as well."""
    out = tmp_path_factory.mktemp("cpu") / "engines"
    export(ExportRequest("smollm2-135m", out, precision="int4"))
    return divergence(Engine.load(out), reference)


@pytest.mark.parametrize("target", ["tensorrt", "tensorrt-basic", "ort-cuda"])
def test_int4_is_no_worse_than_on_cpus(exported, reference, cpu_int4, target):
    found = divergence(exported(target, "int4"), reference)
    print(f"{target} int4: KL divergence from fp32 {found:.3f}, of ort-cpu {cpu_int4:.3f}")
    assert found <= cpu_int4
    assert found <= 0.5  # of any one sentence it may be more: one counts a few near ties


@pytest.mark.parametrize("target", ["tensorrt", "tensorrt-basic"])
def test_8_bit_floats_lose_little(exported, reference, target):
    found = divergence(exported(target, "fp8"), reference)
    print(f"{target} fp8: KL divergence from fp32 {found:.4f}")
    assert found <= 0.1
