"""Live agreement: what is compared, what is counted, when it warns."""

import logging
from math import comb

import numpy as np
import pytest

from adainfer_runtime import ClassifierExit, Engine
from adainfer_runtime.errors import RequestError
from adainfer_runtime.shadow import ShadowMonitor, evidence


@pytest.fixture
def engine(tiny, monkeypatch):
    """Every second adaptive request is compared; adaptive stops after layer 1 of 4."""
    engine = Engine.load(tiny("llama").folder, shadow_every=2)
    policy = engine.policy

    class Sure:
        def classify(self, kind, evidence, depth, state):
            return 1.0, state

        def __getattr__(self, name):
            return getattr(engine.backend, name)

    def exits(mode, *, threshold=None, level=None, shape=None, text=None, longest_label=1):
        return (
            ClassifierExit(Sure(), "svm", (1,), {1: 0.25}, 0.0, 1, promised=level)
            if mode == "adaptive"
            else policy(mode)
        )

    monkeypatch.setattr(engine, "policy", exits)
    monkeypatch.setattr(engine, "choice_policy", exits)
    return engine


def test_every_nth_adaptive_request_is_compared(engine):
    prompts = [[5, 6, n] for n in range(10, 22)]
    off = [engine.generate(prompt, max_new_tokens=1, ignore_eos=True) for prompt in prompts]
    assert engine.shadow == ()
    early = [
        engine.generate(prompt, max_new_tokens=1, ignore_eos=True, mode="adaptive", level=0.05)
        for prompt in prompts
    ]
    (entry,) = engine.shadow
    assert (entry.promised, entry.checked) == (0.05, 6)
    pairs = list(zip(early, off, strict=True))[1::2]
    assert entry.disagreed == sum(a.tokens != b.tokens for a, b in pairs)
    assert entry.disagreed > 0  # a random model's first layer does not know its last
    assert entry.agreement == 1.0 - entry.disagreed / 6
    assert [result.tokens for result in off] == [
        engine.generate(prompt, max_new_tokens=1, ignore_eos=True).tokens for prompt in prompts
    ]


def test_choices_are_compared_by_label(engine):
    for _ in range(4):
        engine.choose("hello", ["a", "b", "c"], mode="adaptive", threshold=0.0)
    (entry,) = engine.shadow
    assert (entry.promised, entry.checked, entry.holds) == (None, 2, True)


def test_warns_once_when_the_promise_does_not_fit(caplog):
    monitor = ShadowMonitor(1)
    with caplog.at_level(logging.WARNING):
        for index in range(200):
            monitor.record(0.02, agrees=index % 50 != 0)  # as promised
        assert not caplog.records
        for _ in range(15):
            monitor.record(0.02, agrees=False)
    assert len(caplog.records) == 1
    assert "certificate no longer fits" in caplog.text
    assert not monitor.report()[0].holds


def first_alarms(share, promised, runs, looks):
    """Of each run, after how many comparisons it alarms; infinite where it does not."""
    random = np.random.default_rng(0)
    disagreed = (random.random((runs, looks)) < share).cumsum(axis=1)
    found = []
    for run in disagreed:
        alarms = (n for n in range(looks) if evidence(int(run[n]), n + 1, promised) >= 100.0)
        found.append(next(alarms, np.inf))
    return np.array(found)


def test_false_alarms_stay_rare_however_long_it_is_watched():
    alarms = np.isfinite(first_alarms(0.02, 0.02, runs=300, looks=2000))
    assert alarms.mean() <= 0.01 + 3 * (0.01 * 0.99 / 300) ** 0.5
    assert not np.isfinite(first_alarms(0.01, 0.02, runs=100, looks=2000)).any()


def test_a_promise_that_is_broken_is_noticed():
    after = first_alarms(0.04, 0.02, runs=100, looks=4000)
    assert np.isfinite(after).mean() > 0.95
    assert np.median(after) < 1500
    assert np.median(first_alarms(0.2, 0.02, runs=100, looks=200)) < 40


@pytest.mark.parametrize("promised", [0.005, 0.02, 0.1])
def test_evidence_is_worth_one_in_expectation_under_the_promise(promised):
    total = sum(
        comb(12, k) * promised**k * (1 - promised) ** (12 - k) * evidence(k, 12, promised)
        for k in range(13)
    )
    assert total == pytest.approx(1.0)


def test_evidence_at_its_ends():
    assert evidence(0, 0, 0.02) == pytest.approx(1.0)
    assert evidence(0, 100, 0.0) == 1.0
    assert evidence(1, 100, 0.0) == evidence(5000, 5000, 0.02) == np.inf


def test_shadow_every_must_be_positive(tiny):
    with pytest.raises(RequestError, match="shadow_every must be at least 1, found 0"):
        Engine.load(tiny("llama").folder, shadow_every=0)
