from __future__ import annotations

import numpy as np
import pytest

from adainfer_runtime.evaluation.statistics import (
    effective_count,
    paired_difference,
    wilson_interval,
)


def test_wilson_interval():
    # Wilson (1927), as tabulated: 8 of 10.
    low, high = wilson_interval(0.8, 10)
    assert (low, high) == (pytest.approx(0.4902, abs=1e-4), pytest.approx(0.9433, abs=1e-4))
    assert wilson_interval(1.0, 100)[1] == 1.0


def test_paired_difference_by_hand():
    pairs = [(True, True)] * 50 + [(True, False)] * 10 + [(False, True)] * 4
    difference, low, high = paired_difference([pairs])
    assert difference == pytest.approx(-6 / 64)
    # n + 2 = 66, b + 0.5 and c + 0.5.
    centre = -6 / 66
    half = 1.959964 * np.sqrt((15 - 36 / 66) / 66**2)
    assert (low, high) == (pytest.approx(centre - half), pytest.approx(centre + half))


def test_paired_difference_covers():
    """95% intervals of a mean over unequal tasks contain the truth about 95% of the time."""
    random = np.random.default_rng(0)
    gains, losses, sizes = (0.05, 0.1, 0.02), (0.02, 0.12, 0.06), (60, 150, 90)
    truth = np.mean(np.array(gains) - np.array(losses))
    inside = 0
    for _ in range(1000):
        groups = []
        for gain, loss, size in zip(gains, losses, sizes, strict=True):
            lost = random.random(size) < loss
            gained = ~lost & (random.random(size) < gain / (1 - loss))
            # Where nothing changed, both are right.
            groups.append(list(zip(~gained, ~lost, strict=True)))
        _, low, high = paired_difference(groups)
        inside += low <= truth <= high
    assert 920 <= inside <= 980


def test_groups_of_equal_weight_tell_as_much_as_their_smallest_lets_them():
    assert effective_count([75, 75, 75]) == 225.0
    assert effective_count([40]) == 40.0
    assert effective_count([1000, 10]) == pytest.approx(39.6, abs=0.05)
