"""The shortlist: a low-rank head proposes tokens, the LM head scores them."""

from __future__ import annotations

import json
import re
import shutil

import numpy as np
import onnx_ir as ir
import pytest

from adainfer_export.calibrate import (
    CalibrationRequest,
    ShortlistRequest,
    low_rank_head,
    shortlist,
)
from adainfer_export.calibrate.data import load_examples, split_parts
from adainfer_export.calibrate.exit_files import Files
from adainfer_export.calibrate.frequent_rows import frequent_rows
from adainfer_export.calibrate.head import Head, read_head
from adainfer_export.calibrate.low_rank_head import fit_low_rank
from adainfer_export.calibrate.pipeline import recalibrate
from adainfer_export.calibrate.shortlist import with_shortlist
from adainfer_export.commands import AdapterChoice, run_calibrate
from adainfer_export.graph_builder import serialise
from adainfer_export.lower.precision import PRECISIONS
from adainfer_export.progress import SilentReporter
from adainfer_runtime import Engine
from adainfer_runtime.backends.ort_cpu import open_session
from adainfer_runtime.backends.rescore import rescored
from adainfer_runtime.decode_options import DecodeOptions
from adainfer_runtime.draft_schedule import Fixed
from adainfer_runtime.engine_folder import load_manifest, verify_files
from adainfer_runtime.errors import ExitUnavailableError


def made_up(vocabulary=500, width=32, rows=400, seed=0):
    """A head, and hidden states that live in few directions, not those of the head's largest
    singular values.
    """
    random = np.random.default_rng(seed)
    weight = random.normal(size=(vocabulary, width)) * np.linspace(3.0, 1.0, width)
    head = Head(np.ones(width, np.float32), None, 1e-6, False, weight.astype(np.float32), None, 4)
    scale = np.where(np.arange(width) < width // 2, 0.05, 1.0)
    return head, (random.normal(size=(rows, width)) * scale).astype(np.float32)


def logits_of(head, hidden):
    return head.logits(head.normed(hidden), np.arange(len(head.weight)))


def test_the_full_rank_is_the_head_itself():
    head, hidden = made_up()
    low = fit_low_rank(head, hidden, 32)
    approximate = low.logits(head.normed(hidden))
    np.testing.assert_allclose(approximate, logits_of(head, hidden), atol=1e-3)


def test_a_low_rank_follows_the_data_not_the_weights():
    head, hidden = made_up()
    full = logits_of(head, hidden[200:])
    low = fit_low_rank(head, hidden[:200], 16)
    normed = head.normed(hidden[200:])
    error = np.square(low.logits(normed) - full).mean()
    left, values, right = np.linalg.svd(head.weight, full_matrices=False)
    plain = np.square(normed @ right[:16].T @ (left[:, :16] * values[:16]).T - full).mean()
    assert error < 0.05 * np.square(full).mean()
    assert plain > 5 * error


@pytest.mark.parametrize("precision", ["fp32", "int8", "int4"])
@pytest.mark.parametrize("vocabulary", [16, 500, 4099])  # the latter does not divide into chunks
def test_the_stage_proposes_what_the_low_rank_head_likes(tmp_path, precision, vocabulary):
    head, hidden = made_up(vocabulary)
    low = fit_low_rank(head, hidden, 32)
    model = low.lower(head, PRECISIONS[precision], 16)
    path = tmp_path / "shortlist.onnx"
    path.write_bytes(serialise(model))
    session = open_session(path)
    loose = {"fp32": 1e-3, "int8": 0.02, "int4": 0.02}[precision]
    for row in hidden[:5]:
        logits, total, candidates = session.run(
            ["logits", "log_sum_exp", "candidates"], {"hidden": row.reshape(1, 1, -1)}
        )
        expected = low.logits(head.normed(row[None]))[0]
        np.testing.assert_allclose(logits, expected, atol=loose * np.abs(expected).max())
        assert total[0] == pytest.approx(np.log(np.exp(logits.astype(np.float64)).sum()), abs=1e-3)
        assert len(set(candidates.tolist())) == 16
        assert candidates.max() < vocabulary
        assert int(logits.argmax()) == candidates[0]
        np.testing.assert_array_equal(logits[candidates], np.sort(logits)[:-17:-1])


@pytest.mark.parametrize("precision", ["fp32", "int8", "int4"])
def test_frequent_tokens_rows_are_the_heads(tmp_path, precision):
    head, hidden = made_up(700)
    rows = frequent_rows(head, hidden[:300], hidden[300:], 120)
    own = logits_of(head, hidden[:300]).argmax(axis=1)
    counts = np.bincount(own, minlength=700)
    assert len(set(own.tolist())) > 120  # some are left out
    assert counts[rows.tokens].min() >= np.delete(counts, rows.tokens).max()
    path = tmp_path / "shortlist.onnx"
    path.write_bytes(serialise(rows.lower(head, PRECISIONS[precision], 16)))
    session = open_session(path)
    loose = {"fp32": 1e-3, "int8": 0.02, "int4": 0.02}[precision]
    masses = []
    for row in hidden[300:]:
        outputs = ["logits", "log_sum_exp", "candidates"]
        logits, total, candidates = session.run(outputs, {"hidden": row.reshape(1, 1, -1)})
        full = logits_of(head, row[None])[0]
        known = full[rows.tokens]
        np.testing.assert_allclose(logits[rows.tokens], known, atol=loose * np.abs(full).max())
        assert np.all(np.delete(logits, rows.tokens) < -9000)
        assert set(candidates.tolist()) <= set(rows.tokens.tolist())
        np.testing.assert_array_equal(logits[candidates], np.sort(logits)[:-17:-1])
        masses.append(np.exp(known).sum() / np.exp(full).sum())
        scored = np.log(np.exp(logits[rows.tokens].astype(np.float64)).sum())
        assert total[0] == pytest.approx(scored - np.log(rows.covered), abs=1e-3)
    # What the other tokens may be is the mean of what it was.
    assert rows.covered == pytest.approx(np.mean(masses), abs=1e-3)
    few = frequent_rows(head, hidden[:2], hidden, 120)
    assert set(own[:2]) <= set(few.tokens.tolist())
    assert len(few.tokens) == 120


def test_exact_scores_take_the_place_of_proposed_ones():
    random = np.random.default_rng(0)
    low = random.normal(size=200).astype(np.float32)
    total = float(np.log(np.exp(low.astype(np.float64)).sum()))
    candidates = np.argsort(low)[-10:]
    exact = low[candidates] + random.normal(size=10).astype(np.float32)
    expected = low.copy()
    expected[candidates] = exact
    probabilities = np.exp(expected.astype(np.float64))
    probabilities /= probabilities.sum()
    result = rescored(low.copy(), total, candidates, exact)
    np.testing.assert_array_equal(result.logits, expected)
    assert result.token == candidates[exact.argmax()]
    first, second = np.sort(exact)[::-1][:2]
    scale = np.exp(expected.astype(np.float64)).sum()
    assert result.top_prob == pytest.approx(np.exp(first) / scale, abs=1e-6)
    assert result.gap == pytest.approx((np.exp(first) - np.exp(second)) / scale, abs=1e-6)
    tied = rescored(low.copy(), total, np.array([9, 4]), np.array([50.0, 50.0], np.float32))
    assert (tied.token, tied.gap) == (4, pytest.approx(0.0, abs=1e-6))


def with_bias(made, folder):
    """A copy of an engine whose head has a bias, in all graphs that hold it."""
    shutil.copytree(made.folder, folder)
    manifest = load_manifest(folder)
    bias = np.random.default_rng(5).normal(size=320).astype(np.float32)
    for file in (manifest.probe.file, manifest.probe.logits_file, manifest.candidates.file):
        model = ir.load(folder / file)
        graph = model.graph
        stored = ir.Value(name="head_bias", const_value=ir.tensor(bias, name="head_bias"))
        graph.register_initializer(stored)
        logits = next(value for value in graph.outputs if value.name == "logits")
        readers = list(logits.uses())
        wanted = ir.Node("", "Gather", [stored, graph.inputs[1]]) if len(graph.inputs) > 1 else None
        value = wanted.outputs[0] if wanted else stored
        add = ir.Node("", "Add", [logits, value])
        graph.insert_after(logits.producer(), [node for node in (wanted, add) if node])
        for use in readers:
            use.node.replace_input_with(use.idx, add.outputs[0])
        logits.name, add.outputs[0].name = "unbiased", "logits"
        add.outputs[0].type, add.outputs[0].shape = logits.type, logits.shape
        graph.outputs[list(graph.outputs).index(logits)] = add.outputs[0]
        ir.save(model, folder / file)
    return Engine.of_manifest(folder, manifest)


@pytest.fixture(params=["llama", "biased", "opt", "gpt2", "gpt_neox", "gemma2"])
def form(request, tiny, tmp_path):
    """Every form of norm and head: (folder, engine)."""
    if request.param == "biased":
        return tmp_path / "engines", with_bias(tiny("llama"), tmp_path / "engines")
    made = tiny(request.param)
    return made.folder, made.engine


def stage_of(proposer, head, path, rows=16):
    path.write_bytes(serialise(proposer.lower(head, PRECISIONS["fp32"], rows)))
    session = open_session(path)
    names = ["logits", "log_sum_exp", "candidates"]
    return lambda row: session.run(names, {"hidden": row.reshape(1, 1, -1)})


def looked_through(engine, run, row):
    """As the back end does it."""
    logits, total, candidates = run(row)
    exact = engine.backend.probe_candidates(row, candidates).logits
    return rescored(logits, float(total[0]), candidates, exact)


def hidden_states(rows=300, seed=2):
    return np.random.default_rng(seed).normal(size=(rows, 64)).astype(np.float32)


@pytest.mark.parametrize("proposer", ["low-rank", "frequent"])
def test_norms_biases_and_caps_are_the_probes(form, tmp_path, proposer):
    """At full rank, or with all tokens, nothing is approximate: features are the full probe's."""
    folder, engine = form
    head, hidden = read_head(folder, engine.manifest), hidden_states()
    made = (
        fit_low_rank(head, hidden, 64)
        if proposer == "low-rank"
        else frequent_rows(head, hidden[:200], hidden[200:], 320)
    )
    run = stage_of(made, head, tmp_path / "shortlist.onnx")
    for row in hidden[:10]:
        full = engine.backend.probe(row)
        np.testing.assert_allclose(run(row)[0], full.logits, atol=2e-3)
        few = looked_through(engine, run, row)
        assert few.token == full.token
        assert few.top_prob == pytest.approx(full.top_prob, rel=2e-3)
        assert few.gap == pytest.approx(full.gap, rel=2e-3, abs=1e-5)


def test_few_frequent_tokens_are_capped_like_the_exact_scores(tiny, tmp_path):
    """The mean share of the other tokens is all that is approximate."""
    made = tiny("gemma2")
    head, hidden = read_head(made.folder, made.engine.manifest), hidden_states()
    rows = frequent_rows(head, hidden[:200], hidden[200:], 120)
    run = stage_of(rows, head, tmp_path / "shortlist.onnx", rows=64)
    full = [made.engine.backend.probe(row) for row in hidden[200:]]
    shares = [np.exp(p.logits[rows.tokens]).sum() / np.exp(p.logits).sum() for p in full]
    assert rows.covered == pytest.approx(np.mean(shares), abs=1e-4)
    inside = 0
    for row, exact, share in zip(hidden[200:], full, shares, strict=True):
        few = looked_through(made.engine, run, row)
        if exact.token in run(row)[2]:
            inside += 1
            expected = exact.top_prob * rows.covered / share
            assert few.top_prob == pytest.approx(expected, rel=1e-3)
    assert inside > 20


def test_low_ranks_are_capped_like_the_exact_scores(tiny, tmp_path):
    """The sum over tokens that are not scored is all that is approximate: top probabilities differ
    by no more than it does.
    """
    made = tiny("gemma2")
    head, hidden = read_head(made.folder, made.engine.manifest), hidden_states()
    low = fit_low_rank(head, hidden[:200], 32)
    run = stage_of(low, head, tmp_path / "shortlist.onnx", rows=64)
    inside = 0
    for row in hidden[200:]:
        full, few = made.engine.backend.probe(row), looked_through(made.engine, run, row)
        logits, _, candidates = run(row)
        uncapped = low.logits(head.normed(row[None]))[0]
        np.testing.assert_allclose(logits, 3.0 * np.tanh(uncapped / 3.0), atol=1e-3)
        if full.token in candidates:
            inside += 1
            assert few.token == full.token
            proposed, exact = (
                np.log(np.exp(np.delete(values, candidates)).sum())
                for values in (logits, full.logits)
            )
            apart = abs(np.log(few.top_prob / full.top_prob))
            assert apart <= abs(proposed - exact) + 1e-3
            assert apart < 0.15
    assert inside > 50


def request_for(folder, tokens):
    random = np.random.default_rng(0)
    prompts = folder / "prompts.jsonl"
    texts = {" ".join(map(str, random.integers(0, 99, 6))) for _ in range(160)}
    prompts.write_text("\n".join(json.dumps({"prompt": text, "task": "x"}) for text in texts))
    return CalibrationRequest(
        (prompts,), adapters="ridge", target_agreement=0.5, classifiers=("threshold",),
        shortlist=ShortlistRequest(tokens),
    )  # fmt: skip


@pytest.fixture(scope="module", params=[None, 200], ids=["low-rank", "frequent"])
def folder(request, tiny, tmp_path_factory):
    """A tiny engine with exits and a shortlist; of a random model it cannot be a good one."""
    root = tmp_path_factory.mktemp("shortlist")
    copy = root / "engines"
    shutil.copytree(tiny("llama").folder, copy)
    wanted = request_for(root, request.param)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shortlist, "_ENOUGH_RECALL", 0.6)
        recalibrate(copy, load_manifest(copy), wanted, SilentReporter())
    return copy


def test_layer_norms_have_one_too(tiny, tmp_path, monkeypatch, caplog):
    """OPT is the family that AdaInfer was written on."""
    copy = tmp_path / "engines"
    shutil.copytree(tiny("opt").folder, copy)
    monkeypatch.setattr(shortlist, "_ENOUGH_RECALL", 0.6)
    parts = split_parts(load_examples(request_for(tmp_path, None)))
    made = with_shortlist(
        Files(copy), load_manifest(copy), parts, ShortlistRequest(), SilentReporter()
    )
    assert not caplog.messages
    assert made.shortlist.rank == 32
    assert 0.6 < made.shortlist.recall["4"] <= 1.0
    engine = Engine.of_manifest(copy, made)
    both = [(engine.backend.probe(row), engine.backend.shortlist(row)) for row in hidden_states()]
    same = [(full, few) for full, few in both if full.token == few.token]
    assert len(same) > 150
    for full, few in same:
        assert few.logits[few.token] == pytest.approx(full.logits[full.token], abs=1e-4)


def test_why_none_was_made_is_said_once(tiny, tmp_path, monkeypatch, caplog):
    parts = split_parts(load_examples(request_for(tmp_path, None)))

    def warning(variant):
        caplog.clear()
        made = tiny(variant)
        before = made.engine.manifest
        wanted = ShortlistRequest()
        after = with_shortlist(Files(made.folder), before, parts, wanted, SilentReporter())
        assert after is before
        (message,) = caplog.messages
        assert message.startswith("no shortlist was made: ") and "\n" not in message
        return message

    assert "more than a norm and a matrix" in warning("opt-350m")
    monkeypatch.setattr(shortlist, "_ENOUGH_RECALL", 1.01)
    assert re.search(r"rank 32, .* [0-9.]+% .* try --shortlist-tokens", warning("llama"))
    monkeypatch.setattr(low_rank_head, "_RANKS", (64,))
    assert "width of 64 is too small" in warning("llama")


def test_json_says_it_too(tiny, tmp_path, monkeypatch, capsys):
    copy = tmp_path / "engines"
    shutil.copytree(tiny("llama").folder, copy)
    request_for(tmp_path, None)
    monkeypatch.setattr(shortlist, "_ENOUGH_RECALL", 1.01)
    run_calibrate(
        copy, [str(tmp_path / "prompts.jsonl")], adapters=AdapterChoice.ridge, target_agreement=0.5,
        shortlist=True, json_output=True,
    )  # fmt: skip
    done = json.loads(capsys.readouterr().out)
    assert done["shortlist"] is None
    assert any("no shortlist was made" in warning for warning in done["warnings"])


def test_calibration_measures_its_recall_on_other_prompts(folder):
    manifest = load_manifest(folder)
    verify_files(folder, manifest, sha256=True)
    spec = manifest.shortlist
    if spec.tokens is None:
        assert spec.rank == 32
        assert spec.multiply_adds == 32 * (64 + 320) + 64 * 64
    else:
        assert (spec.tokens, spec.rank) == (200, None)
        assert spec.multiply_adds == 200 * 64 + 64 * 64
    assert set(spec.recall) == {*map(str, manifest.exit_points), "4"}
    assert all(0.6 < recall <= 1.0 for recall in spec.recall.values())
    engine = Engine.load(folder)
    hidden = np.random.default_rng(1).normal(size=(50, 64)).astype(np.float32)
    for row in hidden:
        full, few = engine.backend.probe(row), engine.backend.shortlist(row)
        if few.token == full.token:
            # Exact scores; only the sum over the tokens that were not proposed is approximate.
            assert few.logits[few.token] == pytest.approx(full.logits[full.token], abs=1e-4)
    bare = manifest.uncalibrated()
    assert bare.shortlist is None
    assert spec.file not in bare.files


def test_calibration_measures_its_agreement_on_other_prompts(folder):
    engine = Engine.load(folder)
    spec = engine.manifest.shortlist
    assert set(spec.agreement) == set(map(str, engine.manifest.exit_points))
    prompts = split_parts(load_examples(request_for(folder.parent, spec.tokens))).certification
    assert len(prompts) < shortlist._PROMPTS  # all are measured
    for layer in engine.manifest.exit_points:
        agrees = []
        for example in prompts:
            full = engine.generate(example.prompt, max_new_tokens=1, ignore_eos=True).tokens[0]
            with engine.borrow() as session:
                session.extend(engine.tokenizer.encode(example.prompt))
                agrees.append(session.draft(layer, "shortlist").token == full)
        assert spec.agreement[str(layer)] == pytest.approx(np.mean(agrees), abs=1e-4)


def test_it_drafts_but_never_has_the_last_word(folder):
    engine = Engine.load(folder)
    layer = engine.manifest.boundaries[0]
    off = engine.generate("3 17: x 2:", max_new_tokens=24, ignore_eos=True)
    options = DecodeOptions(draft_layer=layer, draft_schedule=Fixed(3), probe="shortlist")
    verified = engine.generate(
        "3 17: x 2:", max_new_tokens=24, ignore_eos=True, mode="verified", decoding=options
    )
    assert verified.tokens == off.tokens
    assert verified.statistics.drafts.proposed > 0


@pytest.mark.parametrize("threshold", [-1e9, 0.0, 1e9])
def test_exits_are_confirmed_by_the_full_probe(folder, threshold):
    engine = Engine.load(folder)
    if not engine.manifest.exit_points:
        pytest.fail("the calibration found no exits: nothing is tested")
    settings = {
        "max_new_tokens": 12,
        "ignore_eos": True,
        "mode": "adaptive",
        "threshold": threshold,
    }
    always = DecodeOptions(exit_looks="always")
    shortlist = DecodeOptions(exit_looks="always", probe="shortlist")
    full = engine.generate("3 17: x 2:", decoding=always, **settings)
    cheap = engine.generate("3 17: x 2:", decoding=shortlist, **settings)
    if threshold:
        # Always or never: then both decide alike, and the token is the full probe's.
        assert cheap.tokens == full.tokens
        assert cheap.exit_layers == full.exit_layers
    assert cheap.compute_saved != full.compute_saved


def test_a_folder_without_one_says_so(tiny):
    with pytest.raises(ExitUnavailableError, match="no shortlist: run `adainfer calibrate DIR"):
        decoding = DecodeOptions(draft_layer=3, probe="shortlist")
        tiny("llama").engine.generate([5], mode="verified", decoding=decoding)
