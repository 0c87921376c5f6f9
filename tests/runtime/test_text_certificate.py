"""Certificates over texts: which requests they are asked for, and what they say of them."""

from __future__ import annotations

import pytest

from adainfer_runtime import DecodeOptions, Engine
from adainfer_runtime.approximate_text import ApproximateText
from adainfer_runtime.certificate import certified_text_threshold, device_class
from adainfer_runtime.engine_folder import load_manifest, write_manifest
from adainfer_runtime.errors import ExitUnavailableError, RequestError
from adainfer_runtime.generation_options import GenerationOptions
from adainfer_runtime.manifest import Certificate, CertificateLevel
from adainfer_runtime.text_certificate_spec import TextCertificate, TextCertificateLevel

from ..export.context_folder import make_context_folder

HERE = device_class()
TEXT = ApproximateText(8, "translated")
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


@pytest.mark.parametrize(
    ("certificate", "level", "text", "here", "line"),
    [
        (
            None, 0.1, TEXT, HERE,
            "level 0.1 with kv_policy translated is certified for answers, not for texts: run "
            "`adainfer certify DIR --texts FILE --max-new-tokens 8` (for mode context with "
            "kv_policy translated), or use kv_policy deferred",
        ),
        (
            TEXTS, 0.1, ApproximateText(8, "propagate"), HERE,
            "texts are certified under kv_policy translated, not propagate: use that one, or "
            "deferred",
        ),
        (
            TEXTS, 0.1, ApproximateText(8, "translated", own_end=False), HERE,
            "level 0.1: texts are certified as the model ends them; leave stop, stop_token_ids and "
            "ignore_eos out, or use kv_policy deferred",
        ),
        (
            TEXTS, 0.1, ApproximateText(9, "translated"), HERE,
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
        certified_text_threshold(certificate, level, text, here)
    assert str(caught.value) == line


def test_shorter_texts_are_certified_too():
    for tokens in (2, 8):
        text = ApproximateText(tokens, "translated")
        assert certified_text_threshold(TEXTS, 0.1, text, HERE) == 0.7


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, None),
        ({"decoding": DecodeOptions(kv_policy="translated"), "max_new_tokens": 1}, None),
        ({"decoding": DecodeOptions(kv_policy="translated")}, ApproximateText(64, "translated")),
        (
            {"decoding": DecodeOptions(kv_policy="propagate"), "stop": "x"},
            ApproximateText(64, "propagate", own_end=False),
        ),
        (
            {"decoding": DecodeOptions(kv_policy="translated"), "stop_token_ids": [5]},
            ApproximateText(64, "translated", own_end=False),
        ),
        (
            {"decoding": DecodeOptions(kv_policy="translated"), "ignore_eos": True},
            ApproximateText(64, "translated", own_end=False),
        ),
    ],
)
def test_which_requests_are_approximate_texts(options, expected):
    assert GenerationOptions(mode="context", **options).approximate_text == expected


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
    policy = engine.policy("context", level=0.1, text=text.approximate_text)
    assert (policy.threshold, policy.promised) == (0.7, 0.1)
    # One token, or exact K and V behind it: answers.
    for exact in (
        GenerationOptions(max_new_tokens=1, mode="context", decoding=translated),
        GenerationOptions(max_new_tokens=8),
    ):
        policy = engine.policy("context", level=0.1, text=exact.approximate_text)
        assert (policy.threshold, policy.promised) == (0.3, 0.1)
    # Without a level nothing is certified that could fail to hold.
    assert engine.policy("context", text=text.approximate_text).threshold == 2.0


def test_certified_texts_are_written_at_their_threshold(folder):
    engine = Engine.load(folder, shadow_every=1)
    translated = DecodeOptions(kv_policy="translated")
    prompts = [f"{n % 7} {n}: x {n % 5}: y {n}: and {n % 3}" for n in range(200, 220)]
    for prompt in prompts:
        asked = {"mode": "context", "max_new_tokens": 8, "decoding": translated}
        certified = engine.generate(prompt, **asked, level=0.1)
        assert certified.tokens == engine.generate(prompt, **asked, threshold=0.7).tokens
    assert {entry.promised for entry in engine.shadow} == {0.1, None}


def test_what_no_certificate_covers_is_refused(folder):
    engine = Engine.load(folder)
    translated, propagate = (DecodeOptions(kv_policy=p) for p in ("translated", "propagate"))
    for mode, decoding in (("adaptive", translated), ("adaptive", propagate)):
        with pytest.raises(ExitUnavailableError, match="is certified for answers, not for texts"):
            engine.generate("x y", mode=mode, level=0.1, max_new_tokens=4, decoding=decoding)
    assert engine.generate("x y", mode="adaptive", level=0.1, max_new_tokens=4).tokens
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
    # Mode off keeps any level.
    assert engine.generate("x y", level=0.1, max_new_tokens=4).tokens
