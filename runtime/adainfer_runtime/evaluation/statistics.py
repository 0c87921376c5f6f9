"""Intervals of shares."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

__all__ = ["effective_count", "paired_difference", "wilson_interval"]


def effective_count(sizes: Sequence[int]) -> float:
    """Of groups with equal weights: as many observations, all of the same weight, tell as much."""
    return len(sizes) ** 2 / sum(1.0 / size for size in sizes)


def wilson_interval(share: float, n: float, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a binomial share (Wilson 1927)."""
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def paired_difference(
    groups: Sequence[Sequence[tuple[bool, bool]]], confidence: float = 0.95
) -> tuple[float, float, float]:
    """Mean over groups of share(second) − share(first), of answers to the same questions.

    The interval is Agresti and Min's (2005): the normal one after half an observation was added
    to each of the four outcomes, here of every group.

    Args:
        groups: per group, whether the first and the second method were right.

    Returns:
        the difference as it is, and the lower and upper end of its interval.
    """
    differences, centres, variances = [], [], []
    for pairs in groups:
        gained = sum(not first and second for first, second in pairs)
        lost = sum(first and not second for first, second in pairs)
        n = len(pairs) + 2
        differences.append((gained - lost) / len(pairs))
        centres.append((gained - lost) / n)
        variances.append(((gained + lost + 1) - (gained - lost) ** 2 / n) / n**2)
    count = len(groups)
    half = NormalDist().inv_cdf(0.5 + confidence / 2) * math.sqrt(sum(variances)) / count
    centre = sum(centres) / count
    return sum(differences) / count, centre - half, centre + half
