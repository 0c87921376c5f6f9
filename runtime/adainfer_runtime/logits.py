"""What is done to logits before a token is drawn. Pure functions of `[vocab_size]` arrays.

Meaning and order are those of transformers' logits processors; frequency and presence penalties are
OpenAI's (and vLLM's).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

__all__ = [
    "add_bias",
    "keep_min_p",
    "keep_top_k",
    "keep_top_p",
    "penalise_occurrences",
    "penalise_repetition",
    "softmax",
]

Float64 = npt.NDArray[np.float64]


def softmax(logits: Float64) -> Float64:
    """Probabilities; at least one logit must be finite."""
    exponentials = np.exp(logits - logits.max())
    return np.asarray(exponentials / exponentials.sum())


def add_bias(logits: Float64, bias: Mapping[int, float]) -> Float64:
    """Adds to single logits."""
    if not bias:
        return logits
    changed = logits.copy()
    changed[list(bias)] += list(bias.values())
    return changed


def penalise_repetition(logits: Float64, tokens: Sequence[int], penalty: float) -> Float64:
    """Makes tokens that occurred less likely, whatever their logit's sign (CTRL)."""
    if penalty == 1.0 or not tokens:
        return logits
    seen = np.unique(np.asarray(tokens, np.int64))
    changed, values = logits.copy(), logits[seen]
    changed[seen] = np.where(values < 0, values * penalty, values / penalty)
    return changed


def penalise_occurrences(
    logits: Float64, tokens: Sequence[int], frequency: float, presence: float
) -> Float64:
    """Subtracts `frequency` per occurrence and `presence` once."""
    if (frequency == 0.0 and presence == 0.0) or not tokens:
        return logits
    seen, counts = np.unique(np.asarray(tokens, np.int64), return_counts=True)
    changed = logits.copy()
    changed[seen] -= frequency * counts + presence
    return changed


def keep_top_k(logits: Float64, k: int) -> Float64:
    """Minus infinity below the k-th largest logit; its equals stay."""
    if k == 0 or k >= len(logits):
        return logits
    kth = np.partition(logits, -k)[-k]
    return np.where(logits < kth, -np.inf, logits)


def keep_top_p(logits: Float64, p: float) -> Float64:
    """Minus infinity for tokens before which, in descending order, `p` is already reached."""
    if p >= 1.0:
        return logits
    probabilities = softmax(logits)
    ordered = np.sort(probabilities)[::-1]  # values alone: several times as fast as an argsort
    before = np.cumsum(ordered) - ordered
    count = max(1, int(np.count_nonzero(before < p)))
    least = ordered[count - 1]
    kept = probabilities > least
    equals = np.flatnonzero(probabilities == least)
    kept[equals[: count - int(np.count_nonzero(kept))]] = True
    return np.where(kept, logits, -np.inf)


def keep_min_p(logits: Float64, p: float) -> Float64:
    """Minus infinity for tokens less probable than `p` times the most probable one."""
    if p == 0.0:
        return logits
    # In logarithms: p(token) < p · p(first) without computing either.
    return np.where(logits < logits.max() + np.log(p), -np.inf, logits)
