"""The deferred KV policy: whatever exits happen, what is kept equals the full model's."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adainfer_runtime import ClassifierExit, NoExit

from ..scripted import ScriptedExit

PROMPT = [5, 17, 200, 43, 9, 120, 77]


@settings(max_examples=60, deadline=None)
@given(
    exits=st.lists(st.integers(0, 3), min_size=1, max_size=12),
    truncations=st.dictionaries(st.integers(1, 11), st.integers(1, 3), max_size=2),
    layers_per_engine=st.sampled_from([1, 2]),
    target=st.sampled_from(["ort-cpu", "onnx-std", "tensorrt-basic"]),
)
def test_cache_after_fill_equals_off(tiny, exits, truncations, layers_per_engine, target):
    engine = tiny("llama", layers_per_engine=layers_per_engine, target=target).engine
    boundaries = engine.manifest.boundaries[:-1]
    policy = ScriptedExit(exits, boundaries)
    random = np.random.default_rng(len(exits))
    session = engine.session()
    session.extend(PROMPT)
    for step, _ in enumerate(exits):
        policy.next()
        prediction = session.predict(policy)
        assert prediction.exit_layer in engine.manifest.boundaries
        assert all(a >= b for a, b in zip(session.filled, session.filled[1:], strict=False))
        if step in truncations and session.length > truncations[step] + 1:
            session.truncate(session.length - truncations[step])
        session.extend([int(random.integers(2, 320))])
    session.complete()
    off = engine.session()
    off.extend(session.tokens)
    off.complete()
    assert session.filled == (session.length,) * len(engine.manifest.layer_stages)
    for layer in range(1, engine.manifest.model.num_layers + 1):
        for mine, full in zip(session.kv(layer), off.kv(layer), strict=True):
            np.testing.assert_allclose(mine, full, atol=1e-4)
    np.testing.assert_allclose(session.hidden(), off.hidden(), atol=1e-4)


def test_waiting_positions_are_counted_when_they_are_filled(tiny):
    engine = tiny("llama").engine
    session = engine.session()
    policy = ScriptedExit([2, 0], engine.manifest.boundaries[:-1])
    session.extend(PROMPT)
    policy.next()
    assert session.predict(policy).exit_layer == 2
    assert session.count.executed == 2 * len(PROMPT)
    assert session.count.layers_saved == pytest.approx(0.5)
    session.extend([9])
    policy.next()
    assert session.predict(policy).exit_layer == 4
    assert session.count.layers_saved == 0.0  # the debt of the first exit was paid


def test_more_waiting_positions_than_a_pass_carries(tiny, monkeypatch):
    engine = tiny("llama").engine
    monkeypatch.setattr(type(engine.backend), "max_rows", 3)
    session = engine.session()
    session.extend(PROMPT)
    session.advance(2)
    session.extend([9, 11])
    session.complete()
    off = engine.session()
    off.extend([*PROMPT, 9, 11])
    off.complete()
    np.testing.assert_allclose(session.hidden(), off.hidden(), atol=1e-4)


def test_predicting_again_after_a_deeper_pass_uses_the_full_model(tiny):
    engine = tiny("llama").engine
    session = engine.session()
    session.extend(PROMPT)
    first = session.predict(NoExit())
    policy = ScriptedExit([1], engine.manifest.boundaries[:-1])
    policy.next()
    again = session.predict(policy)
    assert (again.exit_layer, again.result.token) == (4, first.result.token)


def test_impossible_threshold_equals_off(tiny):
    engine = tiny("llama").engine
    always_asked = ClassifierExit(
        _Scorer(engine.backend, 1e9), "svm", (1, 2, 3), {1: 0.25, 2: 0.5, 3: 0.75}, float("inf"), 1
    )
    session = engine.session()
    session.extend(PROMPT)
    tokens = []
    for _ in range(16):
        prediction = session.predict(always_asked)
        tokens.append(prediction.result.token)
        session.extend([tokens[-1]])
    off = engine.generate(PROMPT, max_new_tokens=16, ignore_eos=True)
    assert tuple(tokens) == off.tokens


class _Scorer:
    """A back end whose classifier is sure every time."""

    def __init__(self, backend, score):
        self._backend, self._score = backend, score

    def __getattr__(self, name):
        return getattr(self._backend, name)

    def classify(self, kind, result, depth, state):
        return self._score, state
