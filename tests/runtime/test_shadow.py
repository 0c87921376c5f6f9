"""Live agreement: what is compared, what is counted, when it warns."""

import logging
from math import comb, exp, fsum, log

import numpy as np
import pytest

from adainfer_runtime import ClassifierExit, Engine
from adainfer_runtime.errors import RequestError
from adainfer_runtime.shadow import ShadowMonitor, log_evidence


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


LIMIT = log(1 / 0.05)


def first_alarms(promised, risk, *, runs, looks):
    """Per simulated run, the look of the alarm; `looks` where there was none."""
    least, count = np.empty(looks, np.int64), 0  # disagreements that alarm at each look
    for look in range(looks):
        while log_evidence(count, look + 1, promised) < LIMIT:
            count += 1
        least[look] = count
    seen = (np.random.default_rng(0).random((runs, looks)) < risk).cumsum(axis=1)
    alarmed = seen >= least
    return np.where(alarmed.any(axis=1), alarmed.argmax(axis=1), looks)


@pytest.mark.parametrize("promised", [0.01, 0.05, 0.1])
def test_false_alarms_over_thousands_of_looks(promised):
    alarms = first_alarms(promised, promised, runs=2000, looks=5000)
    assert 0 < (alarms < 5000).mean() <= 0.05


@pytest.mark.parametrize("promised", [0.01, 0.05, 0.1])
def test_alarms_at_twice_the_promise(promised):
    alarms = first_alarms(promised, 2 * promised, runs=500, looks=5000)
    assert np.median(alarms) < 12 / promised  # disagreements: twice as many
    assert (alarms < 40 / promised).mean() > 0.95


@pytest.mark.parametrize("promised", [0.02, 0.3])
def test_evidence_is_fair_where_the_promise_is_just_kept(promised):
    """Its expectation is 1 after any number of comparisons."""
    total = fsum(
        comb(40, k) * promised**k * (1 - promised) ** (40 - k) * exp(log_evidence(k, 40, promised))
        for k in range(41)
    )
    assert total == pytest.approx(1.0)


def test_evidence_at_the_edges():
    assert log_evidence(0, 10, 0.0) == 0.0
    assert log_evidence(1, 10, 0.0) > LIMIT
    assert log_evidence(10, 10, 1.0) == 0.0


def test_shadow_every_must_be_positive(tiny):
    with pytest.raises(RequestError, match="shadow_every must be at least 1, found 0"):
        Engine.load(tiny("llama").folder, shadow_every=0)
