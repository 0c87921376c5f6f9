"""Context exits: the context stops early, the answer position runs over translated K and V."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from adainfer_export.calibrate import CalibrationRequest, context, translate
from adainfer_export.calibrate.affine import AffineMap
from adainfer_export.calibrate.pipeline import recalibrate
from adainfer_export.calibrate.recertify import recertify
from adainfer_export.calibrate.translate import (
    Translator,
    Unrotated,
    fit_translators,
    lower_translator,
    most_weights,
    read_rotary,
)
from adainfer_export.graph_builder import serialise
from adainfer_export.progress import SilentReporter
from adainfer_runtime import Engine
from adainfer_runtime.backends.ort_cpu import open_session
from adainfer_runtime.chain import Chain
from adainfer_runtime.engine_folder import load_manifest, verify_files
from adainfer_runtime.errors import ExitUnavailableError, RequestError
from adainfer_runtime.evaluation.curves import measure_curves
from adainfer_runtime.exit_policy import ExitCheck
from adainfer_runtime.kv_fill import Translate
from adainfer_runtime.tasks import TaskExample

from ..runtime.test_parity import PROMPT


class ExactTranslation:
    """A back end that "translates" by looking into a sequence that ran all layers."""

    def __init__(self, backend, full):
        self._backend, self._full = backend, full
        self.asked = []

    def __getattr__(self, name):
        return getattr(self._backend, name)

    def translate(self, exit_layer, hidden, start):
        self.asked.append((exit_layer, start, len(hidden)))
        rows = slice(start, start + len(hidden))
        return {
            layer: tuple(part[:, rows].copy() for part in self._full.kv(layer))
            for layer in range(exit_layer + 1, 5)
        }


@pytest.mark.parametrize("layer", [1, 2, 3])
def test_over_exact_keys_and_values_the_answer_is_the_full_models(tiny, layer):
    engine = tiny("llama").engine
    full = engine.session()
    full.extend(PROMPT)
    full.complete()
    backend = ExactTranslation(engine.backend, full)
    chain = Chain(backend, engine.manifest)
    chain.admit(np.array(PROMPT))
    chain.advance(layer)
    assert chain.can_translate(layer)
    maps = Translate(backend, {layer: 100})
    answer = chain.answers_over_context(layer, [chain.length - 1], 1, maps)[0]
    np.testing.assert_allclose(answer, full.hidden()[-1], atol=1e-4)
    # The first token is computed, the last one is the question.
    assert backend.asked == [(layer, 1, len(PROMPT) - 2)]
    # Nothing counts as filled, and going on from there is exact.
    assert chain.ledger.filled[layer:] == (0,) * (4 - layer)
    chain.advance(4)
    np.testing.assert_array_equal(chain.hidden(0, len(PROMPT)), full.hidden())
    # Again, with the first token's K and V at hand: one position less to run.
    before = chain.ledger.count.executed
    chain.truncate(0)
    chain.admit(np.array(PROMPT))
    chain.advance(layer)
    np.testing.assert_array_equal(
        chain.answers_over_context(layer, [chain.length - 1], 1, maps)[0], answer
    )
    assert chain.ledger.count.executed - before == layer * len(PROMPT) + 4 - layer


@pytest.mark.parametrize("rows", [1, 3, 100])
def test_answers_in_a_context_see_nothing_behind_them(tiny, rows):
    """Over wrong keys and values an answer depends on what is before it, not on later answers."""
    engine = tiny("llama").engine
    noise = engine.session()
    noise.extend(PROMPT[::-1])
    noise.complete()
    backend = ExactTranslation(engine.backend, noise)
    positions = [1, 4, 6, len(PROMPT) - 1]
    together = Chain(backend, engine.manifest)
    together.admit(np.array(PROMPT))
    together.advance(2)
    maps = Translate(backend, {2: 100})
    answers = together.answers_over_context(2, positions, rows, maps)
    translated = max(0, len(PROMPT) - rows - 1)  # neither the first nor the last few
    assert backend.asked == ([(2, 1, translated)] if translated else [])
    for position, answer in zip(positions, answers, strict=True):
        alone = Chain(backend, engine.manifest)
        alone.admit(np.array(PROMPT[: position + 1]))
        alone.advance(2)
        (expected,) = alone.answers_over_context(2, [position], rows, maps)
        np.testing.assert_allclose(answer, expected, atol=1e-4)
    exact = engine.session()
    exact.extend(PROMPT)
    exact.complete()
    same = np.allclose(answers[-1], exact.hidden()[-1], atol=1e-4)
    assert same == (rows == 100)  # all positions but the first run on: nothing is translated


def test_positions_that_wait_elsewhere_are_not_translated(tiny):
    engine = tiny("llama").engine
    chain = Chain(engine.backend, engine.manifest)
    chain.admit(np.array(PROMPT))
    chain.advance(4)
    chain.admit(np.array([7]))
    chain.advance(2)
    assert chain.can_translate(2)  # the new one alone waits
    chain.advance(3)
    assert not chain.can_translate(2)
    session = engine.session()
    session.extend([5])
    with pytest.raises(RequestError, match="two positions or more"):
        session.observe([ExitCheck(2, "context")])


def test_rotation_is_undone_and_done_again(tiny, tmp_path):
    made = tiny("llama")
    manifest = made.engine.manifest
    rotary = read_rotary(made.folder, manifest)
    session = made.engine.session()
    session.extend(PROMPT)
    session.complete()
    keys = np.stack([session.kv(layer)[0] for layer in (3, 4)])
    values = np.stack([session.kv(layer)[1] for layer in (3, 4)])
    flat = np.stack([np.stack([rotary.undo(k), v]) for k, v in zip(keys, values, strict=True)])
    # A translator whose output is its bias: K and V of position 5, wherever it stands.
    bias = flat[:, :, :, 5].reshape(-1)
    translator = Translator(2, AffineMap(np.zeros((64, len(bias)), np.float32), bias))
    path = tmp_path / "stages" / "translate.onnx"
    shutil.copytree(made.folder / "stages", path.parent)
    path.write_bytes(serialise(lower_translator(translator, rotary, manifest)))
    feed = {"hidden": np.zeros((3, 64), np.float32), "start": np.array([4])}
    key, value = open_session(path).run(["key", "value"], feed)
    np.testing.assert_allclose(key[:, :, 1], keys[:, :, 5], atol=1e-5)
    np.testing.assert_allclose(value[:, :, 1], values[:, :, 5], atol=1e-5)
    assert np.abs(key[:, :, 0] - key[:, :, 1]).max() > 1e-3  # another position, another angle


def test_translators_find_an_affine_map(tiny):
    """Hidden states determine the next layer's K and V: not affinely, but better than a mean."""
    made = tiny("llama")
    random = np.random.default_rng(0)
    examples = [TaskExample(prompt="".join(random.choice(list("abc xyz:"), 40))) for _ in range(40)]
    rotary = read_rotary(made.folder, made.engine.manifest)
    maps, _ = fit_translators(made.engine, rotary, examples, (3,), SilentReporter())
    translator = maps[3]
    session = made.engine.session()
    session.extend(made.engine.tokenizer.encode("zxy: abc abc:ab"))
    session.advance(3)
    hidden = session.hidden().copy()
    session.complete()
    value = session.kv(4)[1].transpose(1, 0, 2).reshape(len(hidden), -1)
    found = translator.affine.apply(hidden)[:, value.shape[1] :]
    error = ((found - value)[1:] ** 2).mean()
    assert error < 0.3 * value[1:].var()


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    root = tmp_path_factory.mktemp("context")
    shutil.copytree(tiny("llama").folder, root / "engines")
    prompts = root / "p.jsonl"
    lines = (json.dumps({"prompt": f"{n % 7} {n}: x {n % 5}: y {n}:"}) for n in range(200))
    prompts.write_text("\n".join(lines))
    request = CalibrationRequest((prompts,), target_agreement=0.2, context_exit=True)
    with pytest.MonkeyPatch.context() as patch:
        # Looks cost more than all layers of so small a model.
        patch.setattr(context, "_check_layers", lambda _, __, layers: (0.0,) * len(layers))
        for _ in range(2):  # the second calibration starts where the first one ended
            recalibrate(
                root / "engines", load_manifest(root / "engines"), request, SilentReporter()
            )
    return root / "engines"


def test_calibrated_context_exit(folder):
    manifest = load_manifest(folder)
    verify_files(folder, manifest, sha256=True)
    assert manifest.context_exit is not None
    assert set(manifest.context_points) <= {*manifest.boundaries}
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert found == {*manifest.files, "manifest.json"}
    stages = (*manifest.stages, *manifest.joined)
    graphs = {
        name
        for stage in stages
        for name in (stage.file, stage.wide_file, stage.logits_file)
        if name
    }
    graphs |= {point.translate for point in manifest.context_points.values()}
    assert {name for name in found if name.startswith("stages/") and name.endswith("x")} == graphs
    engine = Engine.load(folder)
    policy = engine.policy("context", threshold=-1e9)  # every prompt stops
    first = policy.exit_layers[0]
    session = engine.session()
    ids = engine.tokenizer.encode("3 17: x 2: y 17:")
    session.extend(ids)
    assert session.predict(policy).exit_layer == first
    rows = len(ids)
    above = 4 - first
    # Above, the first position and the last eight.
    assert session.count.executed == first * rows + (1 + 8) * above
    assert 0.0 < session.count.layers_saved < 1.0
    assert session.count.compute < session.count.dense_compute


def test_certificate_is_renewed(folder, tmp_path):
    copy = tmp_path / "engines"
    shutil.copytree(folder, copy)
    lines = (json.dumps({"prompt": f"{n % 7} {n}: x {n % 5}: y {n}:"}) for n in range(300, 380))
    (tmp_path / "traffic.jsonl").write_text("\n".join(lines))
    renewed = recertify(copy, [tmp_path / "traffic.jsonl"], SilentReporter()).manifest
    certificate = renewed.named_exits["context"].certificate
    assert certificate.data == ("traffic.jsonl",)
    assert {level.prompts for level in certificate.levels} == {80}
    assert Engine.load(copy).policy("context").promised == pytest.approx(0.8)


def test_after_the_answer_everything_is_exact(folder):
    engine = Engine.load(folder)
    early = engine.generate("3 17: x 2: y 17:", max_new_tokens=6, mode="context", threshold=-1e9,
                            ignore_eos=True)  # fmt: skip
    assert early.exit_layers[0] < 4
    assert set(early.exit_layers[1:]) == {4}
    prompt = [*engine.tokenizer.encode("3 17: x 2: y 17:"), early.tokens[0]]
    rest = engine.generate(prompt, max_new_tokens=5, ignore_eos=True)
    assert early.tokens[1:] == rest.tokens


def test_context_mode_needs_a_context_exit(tiny):
    with pytest.raises(ExitUnavailableError, match=r"has no context exit: run .*--context-exit"):
        tiny("llama").engine.generate("x", mode="context")


@pytest.mark.parametrize("rank", [None, 5])
@pytest.mark.parametrize("variant", ["opt", "gpt2"])
def test_learned_positions_are_translated_without_rotation(tiny, variant, rank):
    made = tiny(variant)
    rotary = read_rotary(made.folder, made.engine.manifest)
    assert isinstance(rotary, Unrotated)
    random = np.random.default_rng(0)
    total, width = 3 * 2 * 64, 64  # three layers, K and V, all heads
    translator = Translator(
        1,
        AffineMap(
            random.normal(size=(width, rank or total)).astype(np.float32),
            random.normal(size=total).astype(np.float32),
            None if rank is None else random.normal(size=(rank, total)).astype(np.float32),
        ).as_stored(),
    )
    path = made.folder / "stages" / "translate.onnx"
    path.write_bytes(serialise(lower_translator(translator, rotary, made.engine.manifest)))
    hidden = random.normal(size=(5, width)).astype(np.float32)
    key, value = open_session(path).run(None, {"hidden": hidden})  # wherever they stand
    path.unlink()
    expected = translator.affine.apply(hidden).reshape(5, 3, 2, 4, 16)
    np.testing.assert_allclose(key, expected[:, :, 0].transpose(1, 2, 0, 3), atol=1e-4)
    np.testing.assert_allclose(value, expected[:, :, 1].transpose(1, 2, 0, 3), atol=1e-4)


def test_translators_cost_no_more_than_what_is_affordable(tiny, monkeypatch):
    made = tiny("opt")
    manifest = made.engine.manifest
    layers = [stage.multiply_adds for stage in manifest.cut]
    assert most_weights(manifest) == sum(layers) // 4  # one layer's
    monkeypatch.setattr(translate, "most_weights", lambda manifest: 64 * 2 * 64)
    random = np.random.default_rng(0)
    prompts = ["".join(random.choice(list("abc xyz:"), 40)) for _ in range(20)]
    examples = [TaskExample(prompt=prompt) for prompt in prompts]
    rotary = read_rotary(made.folder, manifest)
    maps, _ = fit_translators(made.engine, rotary, examples, (1, 3), SilentReporter())
    assert maps[3].affine.up is None  # K and V of one layer
    assert maps[1].affine.rank == 64 * 2 * 64 // (64 + 3 * 2 * 64)  # of three


@pytest.mark.parametrize("variant", ["gemma3", "gpt_neox", "llama-pruned"])
def test_layers_that_differ_are_not_translated(tiny, variant):
    made = tiny(variant)
    assert read_rotary(made.folder, made.engine.manifest) is None


def test_curves_with_and_without_translation(folder):
    """A score of -1e9 stops at the first point: what is saved does not depend on K and V."""
    engine = Engine.load(folder)
    prompts = [TaskExample(prompt=f"{n} 17: x 2: y 1{n}:", task="t") for n in range(8)]
    curves = {curve.method: curve for curve in measure_curves(engine, prompts)}
    assert {"context", "propagated"} <= set(curves)
    first = 1.0 - engine.policy("context").exit_layers[0] / 4
    for name in ("context", "propagated"):
        assert curves[name].layers_saved[0] == 0.0 and curves[name].agreement[0] == 1.0
        assert max(curves[name].layers_saved) == pytest.approx(first)
    together = curves["combined" if engine.manifest.combined_exit else "both"]
    # The last pair lets every first look through that a held-out prompt's equalled.
    answer = engine.policy("adaptive").exit_layers[0]
    earliest = 1.0 - min(answer, engine.policy("context").exit_layers[0]) / 4
    assert 0.8 * earliest <= max(together.layers_saved) <= earliest + 1e-9
    session = engine.session()
    session.extend(engine.tokenizer.encode("3 17: x 2: y 17: z 11: and 3"))
    layer, last = engine.policy("context").exit_layers[0], session.length - 1
    over = {
        policy: session.answers_over_context(layer, [last], policy)
        for policy in ("translated", "propagate")
    }
    assert np.abs(over["translated"] - over["propagate"]).max() > 1e-4
    with pytest.raises(RequestError, match="is no point of a context exit"):
        session.answers_over_context(layer, [last], "deferred")
