from __future__ import annotations

import json

import numpy as np
import onnx_ir as ir
import pytest

from adainfer_export.calibrate.affine import AffineMap
from adainfer_export.calibrate.distil import distil_adapters
from adainfer_export.calibrate.head import Head, read_head
from adainfer_export.calibrate.head_network import HeadNetwork
from adainfer_export.calibrate.traces import AnswerTraces
from adainfer_export.progress import SilentReporter
from adainfer_runtime.errors import ExitUnavailableError
from adainfer_runtime.tasks import TaskExample


def head_logits(head, hidden, tokens):
    if head.centred:
        hidden = hidden - hidden.mean(axis=-1, keepdims=True)
    square = (hidden**2).mean(axis=-1, keepdims=True)
    normed = hidden / np.sqrt(square + head.epsilon) * head.norm_weight
    if head.norm_bias is not None:
        normed = normed + head.norm_bias
    logits = normed @ head.rows(tokens).T
    return logits if head.cap is None else head.cap * np.tanh(logits / head.cap)


@pytest.mark.parametrize("precision", ["fp32", "int8", "int4"])
@pytest.mark.parametrize("variant", ["llama", "llama-tied", "opt", "gpt_neox", "gemma2"])
def test_head_is_the_probes(tiny, variant, precision):
    made = tiny(variant, precision=precision)
    head = read_head(made.folder, made.engine.manifest)
    hidden = np.random.default_rng(0).normal(size=(5, 64)).astype(np.float32)
    tokens = np.array([3, 200, 7])
    logits = made.engine.backend.probe_logits(hidden)[:, tokens]
    loose = 0.0 if precision == "fp32" else 0.02 * np.abs(logits).max()
    np.testing.assert_allclose(head_logits(head, hidden, tokens), logits, atol=1e-4 + loose)
    assert (head.cap is None) is (variant != "gemma2")


@pytest.mark.parametrize("variant", ["llama", "opt", "gemma2"])
@pytest.mark.parametrize("target", ["ort-cuda", "tensorrt", "tensorrt-basic"])
def test_heads_of_other_targets_are_read(tiny, target, variant):
    """Casts around the norm, and a norm in its parts."""
    made = tiny(variant, target=target, precision="fp16")
    head = read_head(made.folder, made.engine.manifest)
    hidden = np.random.default_rng(0).normal(size=(5, 64)).astype(np.float32)
    tokens = np.array([3, 200, 7])
    logits = made.engine.backend.probe_logits(hidden)[:, tokens]
    found = head_logits(head, hidden, tokens)
    np.testing.assert_allclose(found, logits, atol=0.01 * np.abs(logits).max())


def test_a_probe_that_is_more_than_a_norm_and_a_head_is_not_read(tiny, tmp_path):
    made = tiny("llama")
    manifest = made.engine.manifest
    model = ir.load(made.folder / manifest.probe.file)
    product = next(node for node in model.graph if node.op_type == "Gemm")
    cap = ir.Node("", "Tanh", [product.outputs[0]])
    reader = next(node for node in model.graph if product.outputs[0] in node.inputs)
    reader.replace_input_with(0, cap.outputs[0])
    model.graph.insert_after(product, cap)
    (tmp_path / "stages").mkdir()
    ir.save(model, tmp_path / manifest.probe.file)
    assert read_head(tmp_path, manifest) is None


def test_the_network_is_the_head():
    """With everything that a head may have."""
    random = np.random.default_rng(0)

    def draw(*shape):
        return random.normal(size=shape).astype(np.float32)

    head = Head(draw(32), draw(32), 1e-5, True, draw(90, 32), None, 4, cap=6.0, bias=draw(90))
    tokens, hidden = np.array([3, 80, 41, 7]), draw(5, 32)
    logs, best = HeadNetwork(head, tokens).teach(hidden)
    logits = head.logits(head.normed(hidden), tokens) / 0.5
    expected = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(logs.numpy(), expected, atol=0.02)  # halves
    np.testing.assert_array_equal(best.numpy(), expected.argmax(axis=1))


def test_distillation_raises_agreement_on_other_prompts(tiny):
    """From a start that leaves half of the coordinates out."""
    engine = tiny("llama").engine
    head = read_head(tiny("llama").folder, engine.manifest)
    random = np.random.default_rng(0)

    def make(count):
        final = random.normal(size=(count, 64)).astype(np.float32)
        noise = random.normal(size=(count, 64)).astype(np.float32)
        hidden = np.stack([final + 0.1 * noise, final], axis=1)
        token = engine.backend.probe_features(final)[0]
        return AnswerTraces(
            (2, 3), hidden, final, token, ("a",) * count, np.arange(count), ((),) * count, 1.0
        )

    half = np.diag(np.arange(64) % 2).astype(np.float32)
    start = AffineMap(half, np.zeros(64, np.float32))
    right = AffineMap(np.eye(64, dtype=np.float32), np.zeros(64, np.float32))
    traces, new = make(4000), make(400)
    adapters = distil_adapters(engine, head, traces, {2: start, 3: right}, SilentReporter(), seed=0)

    def agreement(adapter, column):
        token = engine.backend.probe_features(adapter.apply(new.hidden[:, column]))[0]
        return (token == new.token).mean()

    assert agreement(adapters[2], 0) > agreement(start, 0) + 0.1
    assert adapters[3] is right  # nothing can be better, so it is kept


def test_too_few_answers_leave_ridge_alone(tiny):
    engine = tiny("llama").engine
    head = read_head(tiny("llama").folder, engine.manifest)
    hidden, zeros = np.zeros((20, 1, 64), np.float32), np.zeros(20, np.int64)
    traces = AnswerTraces(
        (2,), hidden, hidden[:, 0], zeros, ("a",) * 20, np.arange(20), ((),) * 20, 1.0
    )
    adapters = {2: AffineMap(np.eye(64, dtype=np.float32), np.zeros(64, np.float32))}
    assert distil_adapters(engine, head, traces, adapters, SilentReporter(), 0) == adapters


def test_multiply_adds_are_the_weights(tiny):
    """Of a decoder layer and a head every weight is used once per position."""
    for precision in ("fp32", "int4"):
        manifest = tiny("llama", precision=precision).engine.manifest
        layer = 64 * (64 + 2 * 32) + 64 * 64 + 3 * 64 * 96  # Q, K, V; output; gate, up, down
        assert {stage.multiply_adds for stage in manifest.cut} == {layer}
        assert manifest.probe.multiply_adds == 64 * 320
        assert manifest.embed.multiply_adds == 0


def test_labels_give_an_exit_graph_for_choices(tiny, tmp_path):
    import shutil

    from adainfer_export.calibrate import CalibrationRequest
    from adainfer_export.calibrate.pipeline import recalibrate
    from adainfer_export.calibrate.recertify import recertify
    from adainfer_export.calibrate.traces import candidates_of
    from adainfer_runtime import Engine
    from adainfer_runtime.engine_folder import load_manifest, verify_files

    folder = tmp_path / "engines"
    shutil.copytree(tiny("llama").folder, folder)
    prompts = tmp_path / "choices.jsonl"
    lines = [
        {"prompt": f"{n % 7} {n}: (x {n % 5}: (y {n}: (", "labels": ["a", "b"]} for n in range(260)
    ]
    prompts.write_text("\n".join(map(json.dumps, lines)))
    request = CalibrationRequest((prompts,), target_agreement=0.6, classifiers=("svm", "logistic"))
    manifest = recalibrate(folder, load_manifest(folder), request, SilentReporter())
    verify_files(folder, load_manifest(folder), sha256=True)
    assert manifest.choice_exit is not None
    engine = Engine.load(folder)
    policy = engine.choice_policy("adaptive")
    assert policy.over_candidates
    assert engine.choice_policy("off").checks == ()
    result = engine.choose(lines[0]["prompt"], ["a", "b"], mode="adaptive")
    assert result.exit_layer in (*policy.exit_layers, 4)
    never = engine.choose(lines[0]["prompt"], ["a", "b"], mode="adaptive", threshold=float("inf"))
    off = engine.choose(lines[0]["prompt"], ["a", "b"])
    assert (never.scores, never.exit_layer) == (off.scores, 4)
    # The graphs of both kinds are there, and renewed together.
    assert set(manifest.exit_graphs) <= {"svm", "logistic"}
    renewed = recertify(folder, [prompts], SilentReporter()).manifest
    # A level of theirs is kept by its threshold, for labels of one token.
    spec = renewed.choice_exit
    levels = tuple(
        entry.model_copy(update={"threshold": spec.threshold}) for entry in spec.certificate.levels
    )
    certificate = spec.certificate.model_copy(update={"levels": levels})
    spec = spec.model_copy(update={"certificate": certificate})
    changed = renewed.model_copy(update={"choice_exit": spec})
    engine = Engine.of_manifest(folder, changed)
    certified = engine.choose(lines[0]["prompt"], ["a", "b"], mode="adaptive", level=0.1)
    assert (certified.scores, certified.exit_layer) == (result.scores, result.exit_layer)
    with pytest.raises(ExitUnavailableError, match="by the first token of each label, and one has"):
        engine.choose(lines[0]["prompt"], ["a", "b c"], mode="adaptive", level=0.1)
    example = TaskExample(prompt="x:", labels=("a", "a b"))
    assert candidates_of(engine, example) == ()  # nothing to choose by their first tokens
