"""Certificates over texts: which requests they are asked for, and what they say of them."""

from __future__ import annotations

import pytest

from adainfer_runtime import DecodeOptions, Engine
from adainfer_runtime.certificate import certified_text_threshold, device_class
from adainfer_runtime.engine_folder import load_manifest, write_manifest
from adainfer_runtime.errors import ExitUnavailableError, RequestError
from adainfer_runtime.evaluation import evaluate, make_methods
from adainfer_runtime.generation_options import GenerationOptions
from adainfer_runtime.long_text import LongText
from adainfer_runtime.manifest import Certificate, CertificateLevel, CombinedExitSpec
from adainfer_runtime.plan_spec import Machine, PlanSpec
from adainfer_runtime.planning import RequestShape
from adainfer_runtime.tasks import TaskExample
from adainfer_runtime.text_certificate_spec import TextCertificate, TextCertificateLevel
from adainfer_runtime.text_request import prepare

from ..export.context_folder import make_context_folder
from .test_planning import TIMES

HERE = device_class()
TEXT = LongText(8, "translated")
ANSWERS = Certificate(
    target="ort-cpu",
    precision="fp32",
    device_class=HERE,
    data=("answers",),
    levels=(CertificateLevel(level=0.1, confidence=0.95, prompts=100, threshold=0.3),),
)
TEXTS = TextCertificate(
    target="ort-cpu",
    precision="fp32",
    device_class=HERE,
    data=("texts",),
    max_new_tokens=8,
    levels=(
        TextCertificateLevel(level=0.02, confidence=0.95, texts=100, texts_needed=149),
        TextCertificateLevel(level=0.05, confidence=0.95, texts=100),
        TextCertificateLevel(level=0.1, confidence=0.95, texts=100, threshold=0.7),
    ),
)

EXACT = TEXTS.model_copy(update={"kv_policy": "deferred"})


@pytest.mark.parametrize(
    ("certificate", "level", "text", "here", "line"),
    [
        (
            None, 0.1, TEXT, HERE,
            "level 0.1 in mode context with kv_policy translated is certified for answers, not for "
            "texts: run `adainfer certify DIR --texts FILE --max-new-tokens 8` (for mode context "
            "with kv_policy translated), or use kv_policy deferred",
        ),
        (
            TEXTS, 0.1, LongText(8, "propagate"), HERE,
            "texts in mode context are certified under kv_policy translated, not propagate: use "
            "that one, or use kv_policy deferred",
        ),
        (
            TEXTS, 0.1, LongText(8, "translated", own_end=False), HERE,
            "level 0.1: texts are certified as the model ends them; leave stop, stop_token_ids and "
            "ignore_eos out, or use kv_policy deferred",
        ),
        (
            TEXTS, 0.1, LongText(9, "translated"), HERE,
            "texts are certified up to 8 new tokens, this one may have 9: ask for fewer, or run "
            "`adainfer certify DIR --texts FILE --max-new-tokens 9`",
        ),
        (
            TEXTS, 0.1, TEXT, "gpu-sm90",
            f"the certificate is of {HERE}, this is gpu-sm90: run `adainfer certify DIR --texts "
            "FILE --max-new-tokens 8 --device cuda` here",
        ),
        (
            TEXTS, 0.02, TEXT, HERE,
            "level 0.02 is not certified for texts (100 texts, at least 149 are needed); "
            "certified: 0.1",
        ),
        (TEXTS, 0.05, TEXT, HERE, "level 0.05 is not certified for texts; certified: 0.1"),
        (TEXTS, 0.2, TEXT, HERE, "level 0.2 is not certified for texts; certified: 0.1"),
    ],
)  # fmt: skip
def test_what_is_not_certified(certificate, level, text, here, line):
    with pytest.raises(ExitUnavailableError) as caught:
        certified_text_threshold(certificate, level, "context", text, here)
    assert str(caught.value) == line


@pytest.mark.parametrize(
    ("certificate", "text", "line"),
    [
        (
            None, LongText(8),
            "level 0.1 in mode adaptive with kv_policy deferred is certified for answers, not for "
            "texts: run `adainfer certify DIR --texts FILE --max-new-tokens 8`, or ask for one new "
            "token",
        ),
        (
            None, LongText(8, "propagate"),
            "level 0.1 in mode adaptive with kv_policy propagate is certified for answers, not for "
            "texts: use kv_policy deferred and run `adainfer certify DIR --texts FILE "
            "--max-new-tokens 8`, or ask for one new token",
        ),
        (
            EXACT, LongText(8, "propagate"),
            "texts in mode adaptive are certified under kv_policy deferred, not propagate: use "
            "that one",
        ),
        (
            EXACT, LongText(8, own_end=False),
            "level 0.1: texts are certified as the model ends them; leave stop, stop_token_ids and "
            "ignore_eos out",
        ),
    ],
)  # fmt: skip
def test_what_is_not_certified_of_adaptive_texts(certificate, text, line):
    with pytest.raises(ExitUnavailableError) as caught:
        certified_text_threshold(certificate, 0.1, "adaptive", text, HERE)
    assert str(caught.value) == line


def test_shorter_texts_are_certified_too():
    for tokens in (2, 8):
        text = LongText(tokens, "translated")
        assert certified_text_threshold(TEXTS, 0.1, "context", text, HERE) == 0.7


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, LongText(64)),
        ({"max_new_tokens": 1}, None),
        ({"decoding": DecodeOptions(kv_policy="translated"), "max_new_tokens": 1}, None),
        ({"decoding": DecodeOptions(kv_policy="translated")}, LongText(64, "translated")),
        (
            {"decoding": DecodeOptions(kv_policy="propagate"), "stop": "x"},
            LongText(64, "propagate", own_end=False),
        ),
        (
            {"decoding": DecodeOptions(kv_policy="translated"), "stop_token_ids": [5]},
            LongText(64, "translated", own_end=False),
        ),
        (
            {"decoding": DecodeOptions(kv_policy="translated"), "ignore_eos": True},
            LongText(64, "translated", own_end=False),
        ),
    ],
)
def test_which_requests_are_long_texts(options, expected):
    assert GenerationOptions(mode="context", **options).long_text == expected


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    out = make_context_folder(tiny("llama").folder, tmp_path_factory.mktemp("texts") / "engines")
    manifest = load_manifest(out)
    spec = manifest.context_exit.model_copy(
        update={"certificate": ANSWERS, "text_certificate": TEXTS}
    )
    # The same graph as answer exits: what is asked for is their certificate, not their answers.
    answers = spec.model_copy(
        update={
            "points": tuple(point.model_copy(update={"translate": None}) for point in spec.points),
            "text_certificate": None,
            "answer_rows": 1,
        }
    )
    write_manifest(out, manifest.model_copy(update={"context_exit": spec, "exit": answers}))
    assert load_manifest(out).context_exit.text_certificate == TEXTS
    return out


def test_requests_use_the_certificate_that_speaks_of_them(folder):
    engine = Engine.load(folder)
    translated = DecodeOptions(kv_policy="translated")
    text = GenerationOptions(max_new_tokens=8, mode="context", decoding=translated)
    policy = engine.policy("context", level=0.1, text=text.long_text)
    assert (policy.threshold, policy.promised) == (0.7, 0.1)
    # One token, or exact K and V behind it: answers.
    for exact in (
        GenerationOptions(max_new_tokens=1, mode="context", decoding=translated),
        GenerationOptions(max_new_tokens=8),
    ):
        policy = engine.policy("context", level=0.1, text=exact.long_text)
        assert (policy.threshold, policy.promised) == (0.3, 0.1)
    # Without a level nothing is certified that could fail to hold.
    assert engine.policy("context", text=text.long_text).threshold == 2.0


def test_certified_texts_are_written_at_their_threshold(folder):
    engine = Engine.load(folder, shadow_every=1)
    translated = DecodeOptions(kv_policy="translated")
    prompts = [f"{n % 7} {n}: x {n % 5}: y {n}: and {n % 3}" for n in range(200, 220)]
    for prompt in prompts:
        asked = {"mode": "context", "max_new_tokens": 8, "decoding": translated}
        certified = engine.generate(prompt, **asked, level=0.1)
        assert certified.tokens == engine.generate(prompt, **asked, threshold=0.7).tokens
    assert {entry.promised for entry in engine.shadow} == {0.1, None}


@pytest.fixture(scope="module")
def exact(folder):
    """With a certificate of adaptive texts."""
    engine = Engine.load(folder)
    spec = engine.manifest.exit.model_copy(update={"text_certificate": EXACT, "thresholds": ()})
    manifest = engine.manifest.model_copy(update={"exit": spec})
    return Engine(manifest, engine.backend, engine.tokenizer)


def test_adaptive_texts_are_written_as_they_were_certified(exact):
    """At the texts' threshold, with a look at every exit point; answers keep their own."""
    for n in range(200, 210):
        asked = {"mode": "adaptive", "max_new_tokens": 8}
        prompt = f"{n % 7} {n}: x {n % 5}"
        certified = exact.generate(prompt, **asked, level=0.1)
        always = DecodeOptions(exit_looks="always")
        plain = exact.generate(prompt, **asked, threshold=0.7, decoding=always)
        assert (certified.tokens, certified.exit_layers) == (plain.tokens, plain.exit_layers)
    assert exact.policy("adaptive", level=0.1).threshold == 0.3
    assert exact.policy("adaptive", level=0.1, text=LongText(8)).promised == 0.1
    with pytest.raises(ExitUnavailableError) as caught:
        exact.generate("x y", mode="adaptive", level=0.1, max_new_tokens=9)
    assert str(caught.value) == (
        "texts are certified up to 8 new tokens, this one may have 9: ask for fewer, or run "
        "`adainfer certify DIR --texts FILE --max-new-tokens 9`"
    )


def test_texts_of_certificates_against_gold_are_still_the_models(exact):
    gold = ANSWERS.model_copy(update={"against": "gold"})
    spec = exact.manifest.exit.model_copy(update={"certificate": gold})
    changed = exact.manifest.model_copy(update={"exit": spec})
    engine = Engine(changed, exact.backend, exact.tokenizer)
    assert engine.policy("adaptive", level=0.1).promised is None
    assert engine.policy("adaptive", level=0.1, text=LongText(8)).promised == 0.1


def test_at_a_level_a_context_exit_sees_the_whole_conversation(folder):
    engine = Engine.load(folder)
    session = engine.session()
    for level, reused in ((None, 7), (0.1, 0)):
        for tokens in ([5, 6, 7, 8, 9, 10, 11], [5, 6, 7, 8, 9, 10, 11, 12, 13]):
            options = GenerationOptions(max_new_tokens=1, mode="context", level=level)
            result = yield_all(prepare(engine, tokens, options, session).run(session))
        assert result.statistics.reused_tokens == reused


def yield_all(events):
    while True:
        try:
            next(events)
        except StopIteration as end:
            return end.value.result


def test_evaluations_at_a_level_ask_for_one_token(folder):
    """In every mode; of choices only what is certified."""
    engine = Engine.load(folder)
    both = CombinedExitSpec(
        answer="threshold",
        path=((2.0, 2.0), (0.3, 0.3)),
        threshold=0.0,
        target_agreement=0.9,
        certificate=ANSWERS.model_copy(
            update={"levels": (ANSWERS.levels[0].model_copy(update={"threshold": -1.0}),)}
        ),
    )
    plan = PlanSpec(
        machine=Machine(device_class=engine.device_class, processor="y", threads=1), times=TIMES
    )
    manifest = engine.manifest.model_copy(update={"combined_exit": both, "plan": plan})
    engine = Engine(manifest, engine.backend, engine.tokenizer)
    names = ["adaptive", "context", "combined", "auto"]
    methods = make_methods(names, folder, engine, level=0.1)
    found = evaluate(methods, [TaskExample(prompt="x y", task="a", answer="z")])
    assert [result.method for result in found.methods] == ["off", *names]
    for name in names[:3]:
        with pytest.raises(ExitUnavailableError, match=f"not for choices in mode {name}: use mode"):
            make_methods([name], folder, engine, level=0.1, labels_only=True)
    off, auto = make_methods(["auto"], folder, engine, level=0.1, labels_only=True)
    assert auto.policy_of(RequestShape(4, candidates=True)).checks == ()
    off, adaptive = make_methods(["adaptive"], folder, engine, threshold=0.5)
    assert (off.policy_of(RequestShape(4)).checks, adaptive.name) == ((), "adaptive")


def test_what_no_certificate_covers_is_refused(folder):
    engine = Engine.load(folder)
    translated, propagate = (DecodeOptions(kv_policy=p) for p in ("translated", "propagate"))
    for decoding in (DecodeOptions(), translated, propagate):
        with pytest.raises(ExitUnavailableError, match="is certified for answers, not for texts"):
            engine.generate("x y", mode="adaptive", level=0.1, max_new_tokens=4, decoding=decoding)
    with pytest.raises(ExitUnavailableError, match=r"^prompt 0: level 0\.1 in mode adapt"):
        engine.generate_batch(["x y"], mode="adaptive", level=0.1, max_new_tokens=4)
    assert engine.generate("x y", mode="adaptive", level=0.1, max_new_tokens=1).tokens
    assert engine.generate("x y", mode="context", level=0.1, max_new_tokens=4, stop="z").tokens
    with pytest.raises(ExitUnavailableError, match="under kv_policy translated, not propagate"):
        engine.generate("x y", mode="context", level=0.1, max_new_tokens=4, decoding=propagate)
    with pytest.raises(ExitUnavailableError, match="texts are certified as the model ends them"):
        engine.generate(
            "x y", mode="context", level=0.1, max_new_tokens=4, decoding=translated, stop="z"
        )
    with pytest.raises(RequestError, match="certificates speak of greedy decoding"):
        engine.generate(
            "x y", mode="context", level=0.1, max_new_tokens=4, decoding=translated, temperature=1.0
        )
    # Modes whose text is the full model's keep any level.
    for mode in ("off", "verified"):
        assert engine.generate("x y", mode=mode, level=0.1, max_new_tokens=4).tokens
