"""Early exits in device memory are those on the CPU: tokens, exit layers, scores, K and V.

The fake device checks every address, and does the work only when somebody waits for it.
"""

from __future__ import annotations

import numpy as np
import pytest

from adainfer_export.build import profiles
from adainfer_runtime import DecodeOptions, FixedExit
from adainfer_runtime.backends import ExitEvidence, device_backend
from adainfer_runtime.errors import ExitUnavailableError
from adainfer_runtime.exit_policy import ExitCheck

from ..export.exit_folder import KINDS, make_exit_folder
from .device_engines import on_both

PROMPT = [5, 17, 200, 43, 9, 120, 77, 31, 250, 8]
LONG = PROMPT * 3  # more than one pass carries
# `onnx-std` has the graphs of `tensorrt` in fp32.
TARGETS = {"tensorrt": "fp16", "onnx-std": "fp32", "tensorrt-basic": "fp32", "ort-cuda": "fp16"}


@pytest.fixture(scope="module", params=TARGETS)
def pair(request, tiny, tmp_path_factory):
    made = tiny("llama", target=request.param, precision=TARGETS[request.param])
    out = tmp_path_factory.mktemp("exits") / "engines"
    return on_both(make_exit_folder(made.folder, out))


def close(pair, mine, theirs):
    atol = 1e-4 if pair.exact else 2e-2
    np.testing.assert_allclose(mine, theirs, atol=atol, rtol=1e-4 if pair.exact else 1e-2)


def scores(engine, kind, prompt=LONG):
    """Of one exit graph at every check of the last position."""
    policy = engine.policy("context" if kind == "context" else "adaptive", classifier=kind)
    session = engine.session()
    session.extend(prompt)
    (seen,) = session.observe(policy.checks)
    return policy.scores(seen.evidence)


@pytest.mark.parametrize("kind", KINDS)
def test_every_classifier_gives_the_scores_of_the_cpu(pair, kind):
    close(pair, scores(pair.device, kind), scores(pair.cpu, kind))


def options(**more):
    return {"max_new_tokens": 6, "ignore_eos": True, **more}


@pytest.mark.parametrize("kv_policy", ["deferred", "translated"])
def test_adaptive_texts_equal_the_cpus(pair, kv_policy):
    first, second = scores(pair.cpu, "svm")
    decoding = DecodeOptions(kv_policy=kv_policy, exit_looks="always")
    left = set()
    # The second point is reached, the first one is, and none.
    for threshold in ((first + second) / 2, min(first, second) - 1e-3, 1e9):
        settings = options(mode="adaptive", threshold=threshold, decoding=decoding)
        mine, theirs = (e.generate(LONG, **settings) for e in (pair.device, pair.cpu))
        assert (mine.tokens, mine.exit_layers) == (theirs.tokens, theirs.exit_layers)
        assert mine.statistics.layers_executed == theirs.statistics.layers_executed
        left |= {*mine.exit_layers}
    assert 4 in left
    assert left & {1, 2}


@pytest.mark.parametrize("mode", ["context", "combined"])
def test_modes_with_contexts_equal_the_cpus(pair, mode):
    threshold = None if mode == "combined" else score_of_a_context(pair)
    settings = options(mode=mode, threshold=threshold)
    mine, theirs = (e.generate(LONG, **settings) for e in (pair.device, pair.cpu))
    assert (mine.tokens, mine.exit_layers) == (theirs.tokens, theirs.exit_layers)
    assert mine.exit_layers[0] < 4


def score_of_a_context(pair):
    """A threshold that the last look reaches."""
    policy, session = pair.cpu.policy("context"), pair.cpu.session()
    session.extend(LONG)
    (seen,) = session.observe(policy.checks)
    return min(policy.scores(seen.evidence)) - 1e-3


def cache(session, layer, length):
    return session._chain._buffers.kv(layer, length)


@pytest.mark.parametrize("layer", [1, 3])
def test_a_context_exit_leaves_the_cpus_keys_and_values(pair, layer):
    """Translated in several runs, and written into the caches of the layers above."""
    sessions = [engine.session() for engine in (pair.device, pair.cpu)]
    for session in sessions:
        session.extend(LONG)
        assert session.predict(FixedExit(layer, kind="context")).exit_layer == layer
    for number in range(1, 5):
        mine, theirs = (cache(session, number, len(LONG)) for session in sessions)
        close(pair, mine, theirs)


@pytest.mark.parametrize("kv_policy", ["deferred", "translated"])
def test_positions_that_stopped_early_leave_the_cpus_keys_and_values(pair, kv_policy):
    sessions = [engine.session() for engine in (pair.device, pair.cpu)]
    for session in sessions:
        session.extend(LONG)
        for _ in range(3):
            session.extend([session.predict(FixedExit(2), kv_policy=kv_policy).result.token])
        session.predict(FixedExit(3, kind="context"))
        session.complete()
    assert sessions[0].tokens == sessions[1].tokens
    for number in range(1, 5):
        close(pair, sessions[0].kv(number), sessions[1].kv(number))


def test_choices_equal_the_cpus(pair):
    labels = ["a", "b c", "x", "y"]
    for threshold in (-1e9, 1e9):
        mine, theirs = (
            engine.choose(LONG, labels, mode="adaptive", threshold=threshold)
            for engine in (pair.device, pair.cpu)
        )
        assert (mine.index, mine.exit_layer) == (theirs.index, theirs.exit_layer)
        assert mine.exit_layer == (1 if threshold < 0 else 4)
        close(pair, mine.scores, theirs.scores)


def test_more_candidates_than_a_plan_takes_are_scored_in_runs(pair, monkeypatch):
    for module in (profiles, device_backend):
        monkeypatch.setattr(module, "CANDIDATE_ROWS", 8)
    few = on_both(pair.folder)
    hidden = np.random.default_rng(0).normal(size=64).astype(np.float32)
    for count in (1, 2, 8, 9, 21):
        tokens = np.random.default_rng(count).permutation(320)[:count]
        mine = few.device.backend.probe_candidates(hidden, tokens)
        logits = pair.cpu.backend.probe_logits(hidden[None])[0][tokens]
        close(pair, mine.logits, logits)
        weights = np.sort(np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum())
        assert mine.token == tokens[np.argmax(logits)]
        close(pair, mine.top_prob, weights[-1])
        close(pair, mine.gap, weights[-1] - (weights[-2] if count > 1 else 0.0))


def test_an_exit_look_reads_back_once(pair):
    backend = pair.device.backend
    session = pair.device.session()
    session.extend(PROMPT)
    session.advance(2)
    pair.driver.log.clear()
    evidence = session.look(ExitCheck(2))
    spec = pair.device.manifest.exit_graphs["crf"].classifier
    score, state = backend.classify(spec.graph, evidence, 0.5, np.zeros(3, np.float32))
    downloads = [size for kind, _, size in pair.driver.log if kind == "download"]
    assert len(downloads) == 1
    assert downloads[0] <= 2048
    assert np.isfinite(score)
    assert state[0] == evidence.result.token + 1
    assert float(evidence.trust) == pytest.approx(float(evidence.trust))
    assert len([kind for kind, *_ in pair.driver.log if kind == "download"]) == 1


def test_adapted_rows_of_two_looks_do_not_mix(pair):
    """Whoever comes between adapter and probe changes neither's answer."""
    rows = np.random.default_rng(3).normal(size=(2, 64)).astype(np.float32)
    cpu, device = pair.cpu.backend, pair.device.backend
    adapted = [device.adapt(1, row) for row in rows]
    results = [ExitEvidence(device.probe(row), trust) for row, trust in adapted]
    spec = pair.cpu.manifest.exit_graphs["logistic"].classifier
    state = np.zeros(3, np.float32)
    for row, mine in zip(rows, results, strict=True):
        seen, trust = cpu.adapt(1, row)
        theirs = ExitEvidence(cpu.probe(seen), trust)
        found, expected = (
            engine.classify(spec.graph, evidence, 0.25, state)
            for engine, evidence in ((device, mine), (cpu, theirs))
        )
        close(pair, found[0], expected[0])
        assert mine.result.token == theirs.result.token
        close(pair, float(mine.trust), theirs.trust)
        close(pair, mine.result.logits, theirs.result.logits)


def test_a_long_state_has_room(pair, tmp_path):
    """Of a user's own classifier; the first ones had room for 64 numbers."""
    spec = pair.cpu.manifest.exit.classifier.model_copy(update={"state_size": 100})
    exit_spec = pair.cpu.manifest.exit.model_copy(update={"classifier": spec})
    manifest = pair.cpu.manifest.model_copy(update={"exit": exit_spec})
    wide = device_backend.DeviceBackend(manifest, None, pair.driver, 16)
    evidence = ExitEvidence(pair.cpu.backend.probe(np.zeros(64, np.float32)), 0.0)
    wide._classifiers = {spec.graph: spec.model_copy(update={"inputs": ("state", "depth")})}
    state = np.arange(100, dtype=np.float32)
    inputs = wide._classifier_inputs(spec.graph, evidence, 0.5, state, set())
    host = np.empty((1, 100), np.float32)
    pair.driver.download(host, inputs["state"].address)
    np.testing.assert_array_equal(host[0], state)
    assert wide._outputs.offsets["next_state"] + 400 <= wide._outputs.bytes


def test_a_shortlist_is_no_part_of_these_targets(pair):
    decoding = DecodeOptions(probe="shortlist")
    with pytest.raises(ExitUnavailableError, match="shortlist"):
        pair.device.generate(PROMPT, mode="adaptive", max_new_tokens=1, decoding=decoding)
