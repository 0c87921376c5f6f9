"""Certificates over texts: what any threshold writes is known, and levels hold."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from adainfer_export.calibrate.adaptive_texts import AdaptiveTexts
from adainfer_export.calibrate.certify_texts import TEXT_LEVELS, certify_texts
from adainfer_export.calibrate.recertify import recertify
from adainfer_export.calibrate.recertify_texts import recertify_texts
from adainfer_export.calibrate.scored import Scored, observe
from adainfer_export.calibrate.text_loss import WrittenText, differing_shares
from adainfer_export.calibrate.text_scored import TextScored, observe_texts
from adainfer_export.calibrate.text_writer import TextWriter
from adainfer_export.errors import CalibrationError
from adainfer_export.progress import SilentReporter
from adainfer_runtime import DecodeOptions, Engine
from adainfer_runtime.engine_folder import load_manifest, write_manifest
from adainfer_runtime.errors import ExitUnavailableError

from .context_folder import LAYERS, examples, make_context_folder, write_prompts

TOKENS = 12
TRANSLATED = DecodeOptions(kv_policy="translated")


def draw(random, texts, lengths=4):
    """One exit point; a score s differs from some place on with probability 0.6 (1 − s)."""
    scores = random.random((texts, 1))
    lost = random.random((texts, 1)) < 0.6 * (1.0 - scores)
    first = random.integers(0, lengths, (texts, 1))
    place = np.arange(lengths)
    differs = lost[:, :, None] & (place >= first[:, :, None])
    differing = np.cumsum(differs, axis=2) / (place + 1)
    agrees = differing[:, :, 0] == 0
    scored = Scored((5,), 10, scores, agrees, ("a",) * texts, (0.0,), (0.0,))
    return TextScored(scored, differing, differing[:, :, -1] / 2)


def risk(threshold):
    """Of whole texts: (1 + 2 + 3 + 4)/4 of 4 places, times the integral of 0.6 (1 − s) above."""
    return 0.625 * 0.3 * (1.0 - threshold) ** 2


def test_realised_risk_exceeds_the_level_no_more_often_than_delta():
    random = np.random.default_rng(0)
    grid = np.linspace(1.0, 0.0, 40)
    draws = 400
    broken = used = 0
    for _ in range(draws):
        (entry,) = certify_texts(draw(random, 300), grid, (0.05,))
        if entry.threshold is not None:
            used += 1
            broken += risk(entry.threshold) > 0.05
            assert entry.differing == entry.largest_differing <= 0.05
    assert used > draws / 2
    assert broken / draws <= 0.05


def test_levels_hold_for_shorter_texts_too():
    """The first token differs of every text that exits, and nothing else: short texts are lost."""
    texts = draw(np.random.default_rng(0), 1000)
    exits = texts.scored.scores[:, 0] >= 0.9
    differing = np.zeros((1000, 1, 4))
    differing[exits, 0] = 1.0 / np.arange(1, 5)
    differing[~exits] = 1.0
    lost = TextScored(texts.scored, differing, differing[:, :, -1])
    entries = {e.level: e for e in certify_texts(lost, np.linspace(1.0, 0.9, 11), (0.05, 0.2))}
    loose, strict = entries[0.2], entries[0.05]
    assert loose.threshold == pytest.approx(0.9)
    assert loose.largest_differing == pytest.approx(exits.mean(), abs=1e-4)
    assert loose.differing == pytest.approx(exits.mean() / 4, abs=1e-4)
    # A quarter of the exits' share would keep 5% by whole texts alone.
    assert strict.threshold > 0.9 and strict.largest_differing < 0.05


def test_exits_that_are_no_better_than_blind_ones_certify_nothing():
    texts = draw(np.random.default_rng(0), 600)
    grid = np.linspace(1.0, 0.0, 100)
    assert sum(e.threshold is not None for e in certify_texts(texts, grid, (0.05, 0.1))) == 2
    certified = 0
    for seed in range(40):
        order = np.random.default_rng(seed).permutation(600)
        shuffled = TextScored(texts.scored, texts.differing[order], texts.teacher_forced[order])
        certified += sum(
            entry.threshold is not None for entry in certify_texts(shuffled, grid, (0.05, 0.1))
        )
    assert certified <= 0.05 * 40 * 2


def test_groups_and_looser_levels():
    texts = draw(np.random.default_rng(0), 1000)
    scored = Scored(**{**vars(texts.scored), "tasks": ("a",) * 970 + ("b",) * 30})
    texts = TextScored(scored, texts.differing, texts.teacher_forced)
    entries = certify_texts(texts, np.linspace(1.0, 0.0, 100))
    assert [entry.level for entry in entries] == list(TEXT_LEVELS)
    saved = [entry.layers_saved or 0.0 for entry in entries]
    assert saved == sorted(saved) and saved[-1] > 0.3
    groups = entries[2].groups
    assert groups["a"].texts == 970 and groups["a"].upper_bound < 0.06
    assert groups["b"].upper_bound > 0.09  # 30 texts prove little
    both = (970 * groups["a"].differing + 30 * groups["b"].differing) / 1000
    assert both == pytest.approx(entries[2].differing, abs=2e-4)
    assert entries[2].teacher_forced == pytest.approx(entries[2].differing / 2, abs=2e-4)


def test_too_few_texts_say_how_many_are_needed():
    texts = draw(np.random.default_rng(0), 20)
    entries = {e.level: e for e in certify_texts(texts, np.linspace(1.0, 0.0, 20))}
    needed = {level: entry.texts_needed for level, entry in entries.items()}
    assert needed == {0.01: 299, 0.02: 149, 0.05: 59, 0.1: 29, 0.2: None}
    assert all(entries[level].threshold is None for level in (0.01, 0.02, 0.05, 0.1))


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    return make_context_folder(tiny("llama").folder, tmp_path_factory.mktemp("texts") / "engines")


@pytest.fixture(scope="module")
def ending(folder, tmp_path_factory):
    """The same model, in which texts end: at a token that it likes to write."""
    out = tmp_path_factory.mktemp("ending") / "engines"
    shutil.copytree(folder, out)
    engine = Engine.load(out)
    written = [
        token
        for example in examples(60, 90)
        for token in engine.generate(example.prompt, max_new_tokens=TOKENS, ignore_eos=True).tokens[
            1:
        ]
    ]
    manifest = load_manifest(out)
    tokens, counts = np.unique(written, return_counts=True)
    eos = tokens[np.argsort(-counts)[[1, 3]]].tolist()
    model = manifest.model.model_copy(update={"eos_token_ids": tuple(eos)})
    write_manifest(out, manifest.model_copy(update={"model": model}))
    return out


@pytest.mark.parametrize("name", ["folder", "ending"])
def test_the_table_says_what_requests_write(name, request):
    """At every threshold, of every prompt: the share that was looked up is that of a real text."""
    engine = Engine.load(request.getfixturevalue(name))
    prompts = examples(60, 90)
    texts = observe_texts(engine, prompts, TOKENS, SilentReporter())
    full = [engine.generate(example.prompt, max_new_tokens=TOKENS) for example in prompts]
    scores = np.unique(texts.scored.scores)
    exits = set()
    for threshold in [2.0, *np.quantile(scores, [0.97, 0.8, 0.5, 0.2, 0.0])]:
        found = texts.differing_at(threshold)
        forced = texts.teacher_forced_at(threshold)
        for row, (example, own) in enumerate(zip(prompts, full, strict=True)):
            early = engine.generate(
                example.prompt, max_new_tokens=TOKENS, mode="context", threshold=threshold,
                decoding=TRANSLATED,
            )  # fmt: skip
            exits |= {*early.exit_layers[:1]}
            shares = differing_shares(WrittenText.of(early), WrittenText.of(own), TOKENS)
            np.testing.assert_array_equal(found[row], shares)
            assert forced[row] == pytest.approx(by_hand(engine, example.prompt, early))
    assert exits == {*LAYERS, 4}
    ends = {result.finish_reason for result in full}
    assert ends == ({"length"} if name == "folder" else {"length", "eos"})
    # The first token's share is what certificates of answers count, but that all ends are alike.
    wrong = texts.differing[:, :, 0] > 0
    assert (wrong <= ~texts.scored.agrees).all()
    assert name == "ending" or (wrong == ~texts.scored.agrees).all()
    # A text that departs, departs once at least; what follows is often the model's own again.
    whole = texts.differing[:, :, -1]
    departs = whole > 0
    assert 0.0 < departs.mean() < 1.0
    np.testing.assert_array_equal(texts.teacher_forced > 0, departs)
    assert texts.teacher_forced[departs].mean() < whole[departs].mean()


def by_hand(engine, prompt, early):
    """Token by token, in mode off."""
    ids = engine.tokenizer.encode(prompt)
    eos = engine.manifest.model.eos_token_ids
    places = [*early.tokens, *([eos[0]] if early.finish_reason == "eos" else [])]
    wrong = 0
    for place, token in enumerate(places):
        own = engine.generate([*ids, *early.tokens[:place]], max_new_tokens=1, ignore_eos=True)
        (choice,) = own.tokens
        wrong += choice != token and not (choice in eos and token in eos)
    return wrong / len(places)


def test_a_certificate_is_made_and_used(folder, tmp_path):
    copy = tmp_path / "engines"
    shutil.copytree(folder, copy)
    before = load_manifest(copy).context_exit
    traffic = write_prompts(tmp_path / "traffic.jsonl", 100, 140)
    renewal = recertify_texts(copy, [traffic], TOKENS, SilentReporter())
    after = load_manifest(copy).context_exit
    assert renewal.certificates == {"context": after.text_certificate}
    assert after.model_copy(update={"text_certificate": None}) == before
    certificate = after.text_certificate
    assert (certificate.max_new_tokens, certificate.kv_policy) == (TOKENS, "translated")
    assert certificate.data == ("traffic.jsonl",)
    assert {level.texts for level in certificate.levels} == {40}
    # Answers are certified apart, and leave texts alone.
    recertify(copy, [traffic], SilentReporter())
    spec = load_manifest(copy).context_exit
    assert spec.text_certificate == certificate and spec.certificate is not None
    engine = Engine.load(copy)
    if certificate.levels[-1].threshold is None:
        with pytest.raises(ExitUnavailableError, match=r"level 0\.2 is not certified for texts"):
            engine.generate("x y", mode="context", level=0.2, max_new_tokens=4, decoding=TRANSLATED)


def test_prompts_that_do_not_serve(folder, tmp_path):
    copy = tmp_path / "engines"
    shutil.copytree(folder, copy)
    traffic = write_prompts(tmp_path / "traffic.jsonl", 0, 15)
    limit = load_manifest(copy).max_seq_len
    lines = [json.dumps({"prompt": "x" * length}) for length in (1, limit - 10, limit - 11)]
    traffic.write_text(traffic.read_text() + "\n" + "\n".join([*lines, lines[2]]))
    renewal = recertify_texts(copy, [traffic], TOKENS, SilentReporter())
    assert renewal.prompts.not_taken == 2  # one token; one too many with eleven more to come
    assert renewal.certificates["context"].levels[0].texts == 16
    traffic.write_text(json.dumps({"prompt": "x"}))
    with pytest.raises(
        CalibrationError, match=r"^no prompt is left that the exits were not fitted"
    ):
        recertify_texts(copy, [traffic], TOKENS, SilentReporter())


def test_what_has_no_texts_to_certify(tiny, folder, tmp_path):
    traffic = write_prompts(tmp_path / "traffic.jsonl", 0, 5)
    bare = tiny("llama").folder
    with pytest.raises(
        CalibrationError,
        match=r"has no exits of mode adaptive or context.*--context-exit$",
    ):
        recertify_texts(bare, [traffic], TOKENS, SilentReporter())
    with pytest.raises(CalibrationError, match="2 tokens or more, found --max-new-tokens 1: answe"):
        recertify_texts(folder, [traffic], 1, SilentReporter())
    never = tmp_path / "never"
    shutil.copytree(folder, never)
    manifest = load_manifest(never)
    # Calibrated, and the answer was "do not exit": there is nothing to translate by.
    spec = manifest.context_exit.model_copy(update={"points": (), "classifier": None})
    write_manifest(never, manifest.model_copy(update={"context_exit": spec}))
    with pytest.raises(CalibrationError, match="has no exits of mode context, whose texts"):
        recertify_texts(never, [traffic], TOKENS, SilentReporter(), ["context"])


@pytest.fixture(scope="module")
def adaptive(folder, tmp_path_factory):
    """With answer exits at the same layers, accepted by top prob."""
    out = tmp_path_factory.mktemp("adaptive") / "engines"
    shutil.copytree(folder, out)
    manifest = load_manifest(out)
    spec = manifest.context_exit
    points = tuple(point.model_copy(update={"translate": None}) for point in spec.points)
    answers = spec.model_copy(update={"points": points, "answer_rows": 1})
    write_manifest(out, manifest.model_copy(update={"exit": answers}))
    scores = observe(Engine.load(out), examples(40, 60), {}, SilentReporter())["threshold"].scores
    grid = tuple(np.quantile(np.unique(scores), np.linspace(1.0, 0.0, 20)).tolist())
    answers = answers.model_copy(update={"thresholds": grid})
    write_manifest(out, manifest.model_copy(update={"exit": answers}))
    return out


def test_adaptive_texts_are_those_that_requests_write(adaptive):
    """Threshold after threshold, though few of them are written anew."""
    engine = Engine.load(adaptive)
    prompts = examples(60, 70)
    grid = engine.manifest.exit.thresholds
    reporter = CountingReporter()
    policy = engine.policy("adaptive")
    texts = AdaptiveTexts(engine, policy, prompts, TOKENS, 1 + len(grid), reporter)
    full = [engine.generate(example.prompt, max_new_tokens=TOKENS) for example in prompts]
    always = DecodeOptions(exit_looks="always")
    for threshold in (2.0, *grid):
        found = texts.at(threshold)
        saved = []
        for row, (example, own) in enumerate(zip(prompts, full, strict=True)):
            early = engine.generate(
                example.prompt, max_new_tokens=TOKENS, mode="adaptive", threshold=threshold,
                decoding=always,
            )  # fmt: skip
            shares = differing_shares(WrittenText.of(early), WrittenText.of(own), TOKENS)
            np.testing.assert_array_equal(found.differing[row], shares)
            assert found.exits[row] == any(layer < 4 for layer in early.exit_layers)
            saved.append(early.layers_saved)
            if threshold == grid[10]:
                assert found.teacher_forced[row] == pytest.approx(
                    by_hand(engine, example.prompt, early)
                )
        assert found.layers_saved == pytest.approx(np.mean(saved))
        assert texts.means_something(found, 0.1, 0.95) == found.exits.any()
    assert found.exits.all() and texts.at(-1.0).differing.max() > 0.0
    assert reporter.steps == reporter.total + 1  # one threshold more was asked for


class CountingReporter(SilentReporter):
    steps = total = 0

    def begin(self, what, total):
        self.total += total

    def step(self, detail=""):
        self.steps += 1


def test_texts_that_stay_the_same_are_not_written_again(adaptive, monkeypatch):
    engine = Engine.load(adaptive)
    written = []
    write = TextWriter.write
    monkeypatch.setattr(
        TextWriter, "write", lambda self, *given: written.append(given) or write(self, *given)
    )
    policy = engine.policy("adaptive")
    texts = AdaptiveTexts(engine, policy, examples(60, 62), 2, 100, SilentReporter())
    for threshold in np.linspace(3.0, 1.5, 100):  # no score is so high
        texts.at(float(threshold))
    assert len(written) == 4


def test_adaptive_texts_are_certified_and_served(adaptive, tmp_path):
    copy = tmp_path / "engines"
    shutil.copytree(adaptive, copy)
    traffic = write_prompts(tmp_path / "traffic.jsonl", 100, 120)
    before = load_manifest(copy)
    renewal = recertify_texts(copy, [traffic], 4, SilentReporter(), ["adaptive"])
    after = load_manifest(copy)
    certificate = after.exit.text_certificate
    assert renewal.certificates == {"adaptive": certificate}
    assert (certificate.kv_policy, certificate.max_new_tokens) == ("deferred", 4)
    assert after.context_exit == before.context_exit
    level = certificate.levels[-1]
    assert (level.level, level.texts) == (0.2, 20)
    assert level.threshold in after.exit.thresholds and level.exits > 0
    assert level.largest_differing <= 0.2
    engine = Engine.load(copy)
    asked = {"mode": "adaptive", "max_new_tokens": 4}
    always = DecodeOptions(exit_looks="always")
    for example in examples(100, 105):
        done = engine.generate(example.prompt, **asked, level=0.2)
        same = engine.generate(example.prompt, **asked, threshold=level.threshold, decoding=always)
        assert done.tokens == same.tokens
    both = recertify_texts(copy, [traffic], 4, SilentReporter())
    assert list(both.certificates) == ["adaptive", "context"]
    shown = " ".join(adainfer("inspect", copy).stdout.split())
    assert "certificate of texts up to 4 tokens in mode adaptive, kv_policy deferred" in shown


def adainfer(*arguments, code=0):
    command = [Path(sys.executable).parent / "adainfer", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    return done


def test_the_command(folder, tmp_path):
    copy = tmp_path / "engines"
    shutil.copytree(folder, copy)
    traffic = write_prompts(tmp_path / "traffic.jsonl", 0, 20)
    done = adainfer("certify", copy, "--texts", traffic, "--max-new-tokens", 4, "--json")
    data = json.loads(done.stdout)["texts"]
    assert (data["fitted_on"], data["not_taken"]) == (0, 0)
    certificate = data["certificates"]["context"]
    assert certificate["max_new_tokens"] == 4
    assert [level["level"] for level in certificate["levels"]] == list(TEXT_LEVELS)
    assert certificate["levels"][0]["texts_needed"] == 299
    shown = adainfer("certify", copy, "--texts", traffic, "--prompts", traffic).stdout
    assert "certificate of texts up to 64 tokens" in " ".join(shown.split())
    assert "certificate of context" in shown
    assert "at least 299" in " ".join(shown.split())
    run = ("run", copy, "--prompt", "x y", "--mode", "context", "--kv-policy", "translated")
    failed = adainfer(*run, "--level", "0.01", code=2)
    assert failed.stderr == (
        "error: level 0.01 is not certified for texts (20 texts, at least 299 are needed); "
        "certified: none\n"
    )
    failed = adainfer("certify", copy, code=2)
    assert failed.stderr == (
        "error: nothing to certify on: give --prompts FILE, --texts FILE, or both\n"
    )
    failed = adainfer("certify", copy, "--prompts", traffic, "--mode", "context", code=2)
    assert failed.stderr == "error: --mode speaks of texts: it goes with --texts\n"
    failed = adainfer("certify", copy, "--texts", traffic, "--mode", "adaptive", code=2)
    assert failed.stderr == (
        f"error: {copy} has no exits of mode adaptive, whose texts could be certified: run "
        "`adainfer calibrate DIR`, for mode context with --context-exit\n"
    )
    failed = adainfer("certify", copy, "--texts", traffic, "--against", "gold", code=2)
    assert failed.stderr == "error: --against gold speaks of answers: it goes with --prompts\n"
