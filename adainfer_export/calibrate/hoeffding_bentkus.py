"""Hoeffding–Bentkus: what a mean of bounded losses proves about their expectation.

For n independent losses in [0, 1] with mean r and H: their expectation exceeds α, the p-value is

    min( exp(−n·h(min(r, α), α)),  e · P(Bin(n, α) ≤ ⌈n·r⌉) ),
    h(a, b) = a·ln(a/b) + (1 − a)·ln((1 − a)/(1 − b)),

as Learn-then-Test (arXiv 2110.01052, section 3.1) and Bates et al. (arXiv 2101.02703, section 3.1)
give it. The first term is Hoeffding's inequality in its Kullback–Leibler form (JASA 58, 1963,
theorem 1), the second one Bentkus's (Annals of Probability 32, 2004). It never falls where the
losses grow, and never grows with α.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
from scipy import special, stats

__all__ = ["p_value", "upper_bound"]

Float64 = npt.NDArray[np.float64]

# Sums of shares are rounded: 2.0000000000001 is two.
_ROUNDING = 1e-9
_BISECTIONS = 60


def p_value(total: float | Float64, count: int, level: float) -> Float64:
    """Of H: the expected loss exceeds `level`; at most 1, elementwise.

    Args:
        total: sum of the losses, each of which is in [0, 1].
        count: how many they are, at least 1.
        level: in (0, 1).

    Raises:
        ValueError: a value outside its range.
    """
    sums = np.asarray(total, np.float64)
    if count < 1 or not 0.0 < level < 1.0:
        raise ValueError(f"no p-value of {count} losses at level {level}")
    if (sums < -_ROUNDING).any() or (sums > count + _ROUNDING).any():
        raise ValueError(f"{count} losses in [0, 1] cannot sum to {sums}")
    mean = np.clip(sums / count, 0.0, level)
    hoeffding = np.exp(-count * _divergence(mean, level))
    bentkus = math.e * stats.binom.cdf(np.ceil(sums - _ROUNDING), count, level)
    smaller: Float64 = np.minimum(hoeffding, bentkus)
    return smaller


def upper_bound(total: float, count: int, confidence: float) -> float:
    """The least level that is rejected with `confidence`: the expected loss is at most so large.

    1 where no level is.
    """
    rejected, kept = 1.0, total / count
    for _ in range(_BISECTIONS):
        middle = (rejected + kept) / 2.0
        if not 0.0 < middle < 1.0:
            break
        if p_value(total, count, middle) <= 1.0 - confidence:
            rejected = middle
        else:
            kept = middle
    return rejected


def _divergence(mean: Float64, level: float) -> Float64:
    """h, with 0·ln 0 = 0."""
    other: Float64 = special.rel_entr(mean, level) + special.rel_entr(1.0 - mean, 1.0 - level)
    return other
