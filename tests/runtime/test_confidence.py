"""A threshold that falls over the text."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from adainfer_runtime import ClassifierExit, NoExit
from adainfer_runtime.confidence import ConfidenceDecay, DecayingExit
from adainfer_runtime.decoding import PolicyDecoder
from adainfer_runtime.errors import RequestError
from adainfer_runtime.sampling import Greedy

from .test_deferred import PROMPT, _Scorer


def test_the_formula():
    decay = ConfidenceDecay(tau=4.0, tokens=100)
    assert decay.confidence(0.8, 0) == pytest.approx(0.9 * 0.8 + 0.1)
    assert decay.confidence(0.8, 50) == pytest.approx(0.72 + 0.1 * math.exp(-2.0))
    assert decay.confidence(0.8, 10_000) == pytest.approx(0.72)
    assert decay.confidence(1.0, 0) == 1.0
    assert decay.confidence(-1.0, 0) == 0.0
    assert decay.confidence(math.inf, 3) == math.inf  # "never exit" stays
    steps = [decay.confidence(0.5, step) for step in range(200)]
    assert steps == sorted(steps, reverse=True)


def test_settings_of_the_wrong_kind():
    with pytest.raises(RequestError, match="tau must be a number, found '4'"):
        ConfidenceDecay("4", 10)
    with pytest.raises(RequestError, match=r"tokens must be a whole number, found 10\.5"):
        ConfidenceDecay(4.0, 10.5)


@pytest.mark.parametrize("arguments", [(-1.0, 10), (math.nan, 10), (1.0, 0)])
def test_bad_settings(arguments):
    with pytest.raises(RequestError, match="tau of at least 0 and tokens of at least 1, found"):
        ConfidenceDecay(*arguments)


def base(engine, score, threshold):
    depths = {1: 0.25, 2: 0.5, 3: 0.75}
    scorer = _Scorer(engine.backend, score)
    return ClassifierExit(scorer, "svm", (1, 2, 3), depths, threshold, 1, promised=0.02)


def test_scores_are_scaled_by_the_range_of_thresholds(tiny):
    policy = base(tiny("llama").engine, 0.0, threshold=1.0)
    decaying = DecayingExit.of(policy, ConfidenceDecay(4.0, 10), (5.0, 1.0, -3.0))
    assert decaying.at(0).threshold == pytest.approx(-3.0 + 8.0 * (0.9 * 0.5 + 0.1))
    assert decaying.at(10**6).threshold == pytest.approx(-3.0 + 8.0 * 0.45)
    assert decaying.at(0).promised is None  # what was certified had a constant threshold
    with pytest.raises(RequestError, match="needs the exit graph's range of thresholds"):
        DecayingExit.of(policy, ConfidenceDecay(4.0, 10), (1.0, 1.0))


def test_a_decoder_exits_once_the_threshold_fell(tiny):
    engine = tiny("llama").engine
    # Starts at 0.55, ends at 0.45: a score of 0.5 is enough from the eighth token on.
    policy = base(engine, 0.5, threshold=0.5)
    decaying = DecayingExit.of(policy, ConfidenceDecay(1.0, 10), (1.0, 0.0))
    session = engine.session()
    session.extend(PROMPT)
    decoder = PolicyDecoder(session, NoExit(), Greedy(), schedule=decaying)
    assert [decoder.step().exit_layer for _ in range(9)] == [4] * 7 + [1] * 2
    constant = PolicyDecoder(engine.session(), replace(policy, threshold=0.5), Greedy())
    constant._session.extend(PROMPT)
    assert constant.step().exit_layer == 1
