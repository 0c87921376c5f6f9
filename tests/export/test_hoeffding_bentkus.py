"""The p-value of bounded losses: valid, ordered, and what it must be where that is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from adainfer_export.calibrate.hoeffding_bentkus import p_value, upper_bound

COUNTS = st.integers(1, 400)
LEVELS = st.floats(0.005, 0.6)
SHARES = st.floats(0.0, 1.0)


def bernoulli(random, mean, shape):
    return (random.random(shape) < mean).astype(float)


def constant(random, mean, shape):
    return np.full(shape, mean)


def few_lost_wholly(random, mean, shape):
    """Most texts are right, some differ in any share: what is observed of texts."""
    return np.where(random.random(shape) < 2 * mean, random.random(shape), 0.0)


def beta(random, mean, shape):
    return random.beta(2 * mean, 2 * (1 - mean), shape)


def shares_of_tokens(random, mean, shape):
    return random.binomial(8, mean, shape) / 8


@pytest.mark.parametrize("draw", [bernoulli, constant, few_lost_wholly, beta, shares_of_tokens])
@pytest.mark.parametrize(("count", "level"), [(60, 0.05), (300, 0.02), (300, 0.2)])
def test_true_hypotheses_are_rejected_no_more_often_than_delta(draw, count, level):
    """The expectation is the level itself, the hardest case."""
    random = np.random.default_rng(0)
    draws = 8000
    totals = draw(random, level, (draws, count)).sum(axis=1)
    values = p_value(totals, count, level)
    for delta in (0.01, 0.05, 0.2):
        rejected = float((values <= delta).mean())
        assert rejected <= delta + 3 * math.sqrt(delta * (1 - delta) / draws)


def test_it_rejects_what_is_false():
    random = np.random.default_rng(0)
    totals = few_lost_wholly(random, 0.02, (1000, 400)).sum(axis=1)
    assert (p_value(totals, 400, 0.05) <= 0.05).mean() > 0.8


@given(COUNTS, LEVELS, st.data())
def test_of_losses_of_0_and_1_it_lies_between_one_and_e_binomial_ones(count, level, data):
    wrong = data.draw(st.integers(0, count))
    exact = stats.binom.cdf(wrong, count, level)
    found = float(p_value(wrong, count, level))
    assert exact - 1e-12 <= found <= min(1.0, math.e * exact) + 1e-12


@given(COUNTS, LEVELS)
def test_without_losses_it_is_the_binomial_one(count, level):
    assert float(p_value(0.0, count, level)) == pytest.approx((1 - level) ** count)


@given(COUNTS, LEVELS, SHARES, SHARES)
def test_it_grows_with_the_losses_and_falls_with_the_level(count, level, one, other):
    less, more = sorted([one * count, other * count])
    assert p_value(less, count, level) <= p_value(more, count, level) + 1e-12
    stricter, looser = sorted([level, 0.005 + 0.9 * one])
    assert p_value(less, count, looser) <= p_value(less, count, stricter) + 1e-12


def test_known_values():
    # n = 100, mean 0.03, level 0.1, each term by hand.
    divergence = 0.03 * math.log(0.3) + 0.97 * math.log(0.97 / 0.9)
    hoeffding = math.exp(-100 * divergence)
    bentkus = math.e * sum(math.comb(100, k) * 0.1**k * 0.9 ** (100 - k) for k in range(4))
    assert float(p_value(3.0, 100, 0.1)) == pytest.approx(min(hoeffding, bentkus))
    # Between two whole numbers Bentkus takes the larger.
    larger = math.e * stats.binom.cdf(3, 100, 0.1)
    hoeffding = math.exp(-100 * (0.025 * math.log(0.25) + 0.975 * math.log(0.975 / 0.9)))
    assert float(p_value(2.5, 100, 0.1)) == pytest.approx(min(hoeffding, larger))
    # A sum of shares is not exact: thirty tenths are three.
    assert p_value(sum([0.1] * 30), 100, 0.1) == pytest.approx(float(p_value(3.0, 100, 0.1)))
    assert float(p_value(20.0, 100, 0.1)) == 1.0


@given(COUNTS, SHARES, st.sampled_from([0.8, 0.95]))
def test_upper_bounds_are_the_least_levels_that_are_rejected(count, share, confidence):
    total = share * count
    bound = upper_bound(total, count, confidence)
    assert share <= bound <= 1.0
    if bound < 0.999:
        assert p_value(total, count, min(bound + 1e-6, 0.9999)) <= 1.0 - confidence
    if share + 1e-6 < bound:
        assert p_value(total, count, bound - 1e-6) > 1.0 - confidence or bound == 1.0


def test_upper_bound_of_nothing_lost():
    assert upper_bound(0.0, 59, 0.95) == pytest.approx(1 - 0.05 ** (1 / 59))
    assert upper_bound(7.0, 7, 0.95) == 1.0


@pytest.mark.parametrize(
    ("total", "count", "level"),
    [(1.0, 0, 0.1), (1.0, 5, 0.0), (1.0, 5, 1.0), (6.0, 5, 0.1), (-1.0, 5, 0.1)],
)
def test_values_outside_their_range(total, count, level):
    with pytest.raises(ValueError, match=r"no p-value of|cannot sum to"):
        p_value(total, count, level)
