"""Translators distilled through the layers above the exit point."""

from __future__ import annotations

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from adainfer_export.calibrate import distil_translators as module
from adainfer_export.calibrate import translate
from adainfer_export.calibrate.head import read_head
from adainfer_export.calibrate.head_network import HeadNetwork, considered_tokens
from adainfer_export.calibrate.translate import fit_translators, lower_translator, read_rotary
from adainfer_export.graph_builder import serialise
from adainfer_export.progress import SilentReporter
from adainfer_runtime.backends.ort_cpu import open_session
from adainfer_runtime.chain import Chain
from adainfer_runtime.kv_fill import Translate
from adainfer_runtime.tasks import TaskExample

LAYER = 2


class Translating:
    """A back end with a translator that no manifest names."""

    def __init__(self, backend, session):
        self._backend, self._session = backend, session

    def __getattr__(self, name):
        return getattr(self._backend, name)

    def translate(self, exit_layer, hidden, start):
        given = {"hidden": hidden, "start": np.array([start], np.int64)}
        feed = {value.name: given[value.name] for value in self._session.get_inputs()}
        keys, values = self._session.run(["key", "value"], feed)
        return {exit_layer + 1 + n: pair for n, pair in enumerate(zip(keys, values, strict=True))}


def prompts(count, seed=0):
    random = np.random.default_rng(seed)
    texts = ("".join(random.choice(list("abc xyz:"), 20 + n % 17)) for n in range(count))
    return [TaskExample(prompt=f"{text}: a") for text in texts]


def fitted(made, count):
    rotary = read_rotary(made.folder, made.engine.manifest)
    maps, lessons = fit_translators(made.engine, rotary, prompts(count), (LAYER,), SilentReporter())
    stages = module._read_upper(made.folder, made.engine.manifest, LAYER)
    upper = module._Upper(stages, LAYER, rotary, made.engine.manifest)
    return rotary, maps[LAYER], lessons, upper


@pytest.mark.parametrize(
    ("variant", "settings"),
    [
        *(
            (variant, {"precision": precision})
            for variant in ("llama", "mistral-window", "qwen2")
            for precision in ("fp32", "int8")
        ),
        ("llama", {"precision": "fp16", "target": "ort-cuda"}),
        ("llama", {"precision": "int4", "target": "ort-cuda"}),
        *(
            (variant, {"precision": precision, "target": target})
            for variant in ("llama", "qwen2", "opt")
            for target in ("tensorrt", "tensorrt-basic")
            for precision in ("fp16", "fp8", "int4")
        ),
    ],
)
def test_torch_answers_like_the_engine(tiny, tmp_path, variant, settings):
    made = tiny(variant, **settings)
    manifest = made.engine.manifest
    rotary, translator, lessons, upper = fitted(made, 12)
    shutil.copytree(made.folder / "stages", tmp_path / "stages")
    path = tmp_path / "stages" / "translate.onnx"
    path.write_bytes(serialise(lower_translator(translator, rotary, manifest)))
    backend = Translating(made.engine.backend, open_session(path))
    batch = upper.batch(lessons)
    factors = [torch.from_numpy(factor) for factor in translator.affine.factors]
    bias = torch.from_numpy(translator.affine.bias)
    found = upper.answer(batch, factors, bias)[batch.own[batch.there]].numpy()
    for example, mine in zip(prompts(12), found, strict=True):
        chain = Chain(backend, manifest)
        chain.admit(np.array(made.engine.tokenizer.encode(example.prompt)))
        chain.advance(LAYER)
        maps = Translate(backend, {LAYER: 0})
        theirs = chain.answers_over_context(LAYER, [chain.length - 1], 1, maps)[0]
        # float16 hidden states here; the engine rounds activations to int8 with 8-bit weights.
        # Both round to 8-bit floats, but float16 and float32 not always to the same ones.
        tolerance = {"int8": 0.06, "fp8": 0.1}.get(settings["precision"], 0.02)
        assert np.abs(mine - theirs).max() <= tolerance * np.abs(theirs).max()


@pytest.mark.parametrize(("affordable", "most"), [(10**9, 0.9), (64 * 64, 0.95)])
def test_training_lowers_the_loss(tiny, monkeypatch, affordable, most):
    monkeypatch.setattr(translate, "most_weights", lambda manifest: affordable)
    made = tiny("llama")
    _, translator, lessons, upper = fitted(made, 64)
    assert translator.affine.weights <= affordable
    assert len(translator.affine.factors) == (1 if affordable > 64 * 64 else 2)
    finals = np.concatenate([lesson.final for lesson in lessons])
    tokens = considered_tokens(made.engine, finals, np.random.default_rng(0))
    network = HeadNetwork(read_head(made.folder, made.engine.manifest), tokens)

    def loss(candidate):
        with torch.no_grad():
            batch = upper.batch(lessons)
            factors = [torch.from_numpy(factor) for factor in candidate.affine.factors]
            bias = torch.from_numpy(candidate.affine.bias)
            return float(network.loss(upper.answer(batch, factors, bias), *network.teach(finals)))

    course = module._Course(made.engine, network, upper)
    trained = course.train(translator, lessons, np.random.default_rng(0))
    assert loss(trained) < most * loss(translator)


def test_held_out_prompts_decide(tiny, monkeypatch):
    """A training that spoils the map is thrown away."""
    made = tiny("llama")
    rotary, translator, lessons, _ = fitted(made, 130)
    monkeypatch.setattr(module, "_WORTH_IT", (0.0, 1.0))
    head = read_head(made.folder, made.engine.manifest)

    def distil(train):
        monkeypatch.setattr(module._Course, "train", train)
        arguments = (made.engine, made.folder, head, rotary, {LAYER: translator}, lessons)
        return module.distil_translators(*arguments, SilentReporter(), 0)[LAYER]

    affine = replace(translator.affine, matrix=-translator.affine.matrix)
    spoilt = replace(translator, affine=affine)
    assert distil(lambda self, start, *rest: spoilt).affine is translator.affine
    agreements = iter((0.5, 0.6))
    monkeypatch.setattr(module._Course, "agreement", lambda *a: next(agreements))
    assert distil(lambda self, start, *rest: spoilt).affine is affine


def test_too_few_prompts_are_not_trained_on(tiny):
    made = tiny("llama")
    rotary, translator, lessons, _ = fitted(made, 20)
    head = read_head(made.folder, made.engine.manifest)
    arguments = (made.engine, made.folder, head, rotary, {LAYER: translator}, lessons)
    assert module.distil_translators(*arguments, SilentReporter(), 0)[LAYER] is translator


def test_layers_above_with_unknown_operators_are_left_alone(tiny):
    made = tiny("qwen3")  # its norms of Q and K reshape
    assert module._read_upper(made.folder, made.engine.manifest, LAYER) is None


@pytest.mark.parametrize("target", ["tensorrt", "tensorrt-basic"])
def test_ridge_translators_are_said_to_be_kept(tiny, caplog, target):
    """Layers that see a window are not read back from standard operators."""
    made = tiny("mistral-window", target=target, precision="fp16")
    manifest = made.engine.manifest
    rotary = read_rotary(made.folder, manifest)
    maps, lessons = fit_translators(made.engine, rotary, prompts(115), (LAYER,), SilentReporter())
    head = read_head(made.folder, manifest)
    arguments = (made.engine, made.folder, head, rotary, maps, lessons)
    assert module.distil_translators(*arguments, SilentReporter(), 0) == maps
    (warning,) = [record.getMessage() for record in caplog.records]
    assert warning.startswith(f"context exits after layers {LAYER} keep ridge translators: ")
    assert f"as target {target} has them" in warning
