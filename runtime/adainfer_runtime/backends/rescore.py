"""Results from logits on the host: of all, of some tokens alone, or of few exact ones among all."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from .base import Float32, ProbeResult

__all__ = ["among", "rescored", "top_features"]


def top_features(logits: Float32, token: int) -> tuple[float, float]:
    """`top_prob` and `gap` of logits `[vocab_size]` whose largest is the token's."""
    shares = np.exp(logits - logits[token])
    total = float(shares.sum())
    shares[token] = 0.0
    return 1.0 / total, (1.0 - float(shares.max())) / total


def among(candidates: npt.NDArray[np.int64], logits: Float32) -> ProbeResult:
    """The best of some tokens by their logits `[candidates]`; probabilities are among them."""
    best = int(np.argmax(logits))
    return ProbeResult(int(candidates[best]), *top_features(logits, best), logits)


def rescored(
    logits: Float32, log_sum_exp: float, candidates: npt.NDArray[np.int64], exact: Float32
) -> ProbeResult:
    """Puts exact logits in place.

    Args:
        logits: `[vocab_size]` of the low-rank head; changed in place.
        log_sum_exp: of those.
        candidates: `[rows]` different tokens, `exact` their logits by the LM head.
    """
    mass = float(np.exp(logits[candidates] - log_sum_exp, dtype=np.float64).sum())
    others = log_sum_exp + math.log(max(1.0 - mass, 1e-12))
    logits[candidates] = exact
    second, first = (float(value) for value in np.partition(exact, -2)[-2:])
    scored = first + math.log(float(np.exp(exact - first, dtype=np.float64).sum()))
    total = float(np.logaddexp(others, scored))
    top_prob = math.exp(first - total)
    token = int(candidates[exact == exact.max()].min())  # of equal ones the lowest, as elsewhere
    return ProbeResult(token, top_prob, top_prob - math.exp(second - total), logits)
