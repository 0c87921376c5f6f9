"""Certificates: they hold at their confidence, and certify nothing that is not there."""

import json
import shutil

import numpy as np
import pytest

from adainfer_export.calibrate import CalibrationRequest
from adainfer_export.calibrate.certify import certify, prompts_needed, threshold_grid
from adainfer_export.calibrate.pipeline import recalibrate
from adainfer_export.calibrate.recertify import recertify
from adainfer_export.calibrate.scored import Scored, observe, score_predictions
from adainfer_export.errors import CalibrationError, OutputError
from adainfer_export.progress import SilentReporter
from adainfer_runtime import Engine
from adainfer_runtime.engine_folder import load_manifest, write_manifest
from adainfer_runtime.errors import ExitUnavailableError, RequestError
from adainfer_runtime.tasks import read_tasks

from .synthetic import fit_classifier, synthetic


def draw(random, prompts):
    """One exit point; a score s disagrees with probability 0.2 (1 − s)."""
    scores = random.random((prompts, 1))
    agrees = random.random((prompts, 1)) >= 0.2 * (1.0 - scores)
    return Scored((5,), 10, scores, agrees, ("a",) * prompts, (0.1,), (0.0,))


def risk(threshold):
    """Exact share of prompts that exit wrongly: the integral of 0.2 (1 − s) above it."""
    return 0.1 * (1.0 - threshold) ** 2


@pytest.mark.parametrize("draws", [300, pytest.param(5000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("level", [0.02, 0.05])
def test_realised_risk_exceeds_the_level_no_more_often_than_delta(level, draws):
    random = np.random.default_rng(0)
    grid = np.linspace(1.0, 0.0, 50)
    broken = used = 0
    for _ in range(draws):
        (entry,) = certify(draw(random, 400), grid, (level,))
        if entry.threshold is not None:
            used += 1
            broken += risk(entry.threshold) > level
    assert used > draws / 2
    assert broken / draws <= 0.05 + 3 * (0.05 * 0.95 / draws) ** 0.5


def test_shuffled_labels_certify_nothing():
    scored = score_predictions(fit_classifier("svm", synthetic(noise=0.02)), synthetic(600, 1))
    grid = threshold_grid(scored)
    assert sum(entry.threshold is not None for entry in certify(scored, grid)) >= 3
    certified = 0
    for seed in range(40):
        labels = np.random.default_rng(seed).permutation(scored.agrees.ravel()).reshape(-1, 3)
        shuffled = Scored(**{**vars(scored), "agrees": labels})
        certified += sum(entry.threshold is not None for entry in certify(shuffled, grid))
    assert certified <= 0.05 * 40 * 5


def test_looser_levels_save_no_less():
    scored = score_predictions(fit_classifier("svm", synthetic(noise=0.02)), synthetic(2000, 1))
    saved = [entry.layers_saved or 0.0 for entry in certify(scored, threshold_grid(scored))]
    assert saved == sorted(saved)
    assert saved[-1] > 0.2


def test_too_few_prompts_say_how_many_are_needed():
    scored = score_predictions(fit_classifier("svm", synthetic()), synthetic(100, 1))
    entries = {entry.level: entry for entry in certify(scored, threshold_grid(scored))}
    assert entries[0.01].threshold is None
    assert entries[0.01].prompts_needed == prompts_needed(0.01) == 299
    assert entries[0.05].threshold is not None
    assert prompts_needed(0.05) == 59


def test_groups_have_bounds_of_their_own():
    scored = draw(np.random.default_rng(0), 1000)
    scored = Scored(**{**vars(scored), "tasks": ("a",) * 970 + ("b",) * 30})
    (entry,) = certify(scored, np.linspace(1.0, 0.0, 100), (0.05,))
    assert entry.groups["a"].prompts == 970
    assert entry.groups["a"].upper_bound < 0.06
    assert entry.groups["b"].upper_bound > 0.09  # 30 prompts prove little
    assert sum(group.disagreements for group in entry.groups.values()) == entry.disagreements


@pytest.fixture
def folder(tiny, tmp_path):
    """A tiny engine whose exits are as good as certain: it exits after its last layer but one."""
    shutil.copytree(tiny("llama").folder, tmp_path / "engines")
    write_prompts(tmp_path / "fit.jsonl", 0, 240)
    request = CalibrationRequest(files=(tmp_path / "fit.jsonl",), target_agreement=0.5)
    manifest = recalibrate(
        tmp_path / "engines",
        load_manifest(tmp_path / "engines"),
        request,
        SilentReporter(),
    )
    if not manifest.exit.points:
        pytest.fail("the tiny model should exit at so low a target")
    return tmp_path / "engines"


def write_prompts(path, first, last):
    lines = (json.dumps({"prompt": f"{n % 7} {n}: x {n % 5}: y {n}:"}) for n in range(first, last))
    path.write_text("\n".join(lines))


def test_shares_by_length_are_renewed_with_the_certificate(folder, tmp_path):
    prompts = [f"{n}: y {n}:" + f" and {n}, so on:" * (n % 2) for n in range(300, 520)]
    lines = (json.dumps({"prompt": prompt}) for prompt in prompts)
    (tmp_path / "traffic.jsonl").write_text("\n".join(lines))
    recertify(folder, [tmp_path / "traffic.jsonl"], SilentReporter())
    spec = load_manifest(folder).exit
    encode = Engine.load(folder).tokenizer.encode
    medians = [np.median([len(encode(p)) for p in prompts[kind::2]]) for kind in (0, 1)]
    assert [shares.tokens for shares in spec.length_shares] == medians
    assert [shares.prompts for shares in spec.length_shares] == [110, 110]
    # Shrunk towards those of all, which lie in between.
    both = np.array([shares.exit_shares for shares in spec.length_shares])
    assert both.mean(axis=0) == pytest.approx(np.array(spec.exit_shares), abs=2e-4)


def test_renewed_certificate_uses_new_prompts_alone(folder, tmp_path):
    before = load_manifest(folder)
    write_prompts(tmp_path / "traffic.jsonl", 200, 420)
    renewal = recertify(folder, [tmp_path / "traffic.jsonl"], SilentReporter())
    assert renewal.prompts.fitted_on > 0
    after = load_manifest(folder)
    certificate = after.exit.certificate
    assert certificate.data == ("traffic.jsonl",)
    assert certificate.levels[0].prompts == 220 - renewal.prompts.fitted_on
    renewed = {
        "certificate": None,
        "exit_shares": (),
        "length_shares": (),
    }  # nothing else: the graph is frozen
    assert after.exit.model_copy(update=renewed) == before.exit.model_copy(update=renewed)
    assert len(after.exit.exit_shares) == len(after.exit.thresholds)
    write_prompts(tmp_path / "same.jsonl", 0, 240)
    fitted = 240 - sum(
        count for part, count in before.exit.calibration["prompts"].items()
        if part == "certification"
    )  # fmt: skip
    assert (
        recertify(folder, [tmp_path / "same.jsonl"], SilentReporter()).prompts.fitted_on == fitted
    )


def test_the_folder_is_checked_before_the_prompts_are_run(folder, monkeypatch):
    def refuse(*arguments, **settings):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    missing = folder / "missing.jsonl"  # read after it
    with pytest.raises(OutputError, match="engines cannot be written: Read-only file system"):
        recertify(folder, [missing], SilentReporter())
    request = CalibrationRequest(files=(missing,))
    with pytest.raises(OutputError, match="engines cannot be written: Read-only file system"):
        recalibrate(folder, load_manifest(folder), request, SilentReporter())


def test_a_level_chooses_its_threshold(folder):
    manifest = load_manifest(folder)
    certificate = manifest.exit.certificate
    levels = [
        entry.model_copy(update={"threshold": 0.25} if entry.level == 0.05 else {"threshold": None})
        for entry in certificate.levels
    ]

    def rewrite(**changes):
        changed = certificate.model_copy(update={"levels": tuple(levels), **changes})
        exit_spec = manifest.exit.model_copy(update={"certificate": changed})
        write_manifest(folder, manifest.model_copy(update={"exit": exit_spec}))
        return Engine.load(folder)

    engine = rewrite()
    assert engine.policy("adaptive", level=0.05).threshold == 0.25
    with pytest.raises(ExitUnavailableError, match=r"level 0\.01 is not certified.*: 0\.05$"):
        engine.generate("hello", mode="adaptive", level=0.01, max_new_tokens=1)
    with pytest.raises(RequestError, match="not both"):
        engine.choose("hello", ["a", "b"], mode="adaptive", level=0.05, threshold=1.0)
    engine = rewrite(device_class="gpu-sm90")
    with pytest.raises(ExitUnavailableError, match="certificate is of gpu-sm90, this is cpu-"):
        engine.policy("adaptive", level=0.05)


def test_what_cannot_be_certified(tiny, tmp_path):
    shutil.copytree(tiny("llama").folder, tmp_path / "engines")
    write_prompts(tmp_path / "traffic.jsonl", 0, 20)
    with pytest.raises(CalibrationError, match="has no exits to certify"):
        recertify(tmp_path / "engines", [tmp_path / "traffic.jsonl"], SilentReporter())


def test_gold_certificates_count_answers_that_are_spoilt(folder, tmp_path):
    """An exit that differs where the full model is wrong anyway is no harm."""
    engine = Engine.load(folder)
    lines = []
    for n in range(200, 400):
        prompt = f"{n % 7} {n}: x {n % 5}: y {n}:"
        token = engine.generate(prompt, max_new_tokens=1, ignore_eos=True).tokens[0]
        text = engine.tokenizer.decode([token])
        right = n % 2 and engine.label_tokens(prompt, [text])[0][:1] == [token]
        lines.append({"prompt": prompt, "answer": text if right else "~"})
    path = tmp_path / "gold.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    gold = recertify(folder, [path], SilentReporter(), "gold").manifest.exit.certificate
    assert gold.against == "gold"
    examples = read_tasks([path])
    (strict,) = observe(engine, examples, {}, SilentReporter()).values()
    (spoilt,) = observe(engine, examples, {}, SilentReporter(), "gold").values()
    right = np.array([line["answer"] != "~" for line in lines])
    assert 0 < right.sum() < 200
    np.testing.assert_array_equal(spoilt.agrees, strict.agrees | ~right[:, None])
    assert not strict.agrees[~right].all()
    write_prompts(tmp_path / "bare.jsonl", 400, 480)
    with pytest.raises(CalibrationError, match="needs an `answer` with every prompt"):
        recertify(folder, [tmp_path / "bare.jsonl"], SilentReporter(), "gold")
