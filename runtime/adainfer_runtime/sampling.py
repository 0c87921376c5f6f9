"""How the next token is taken from logits. A sampler belongs to one request."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

__all__ = ["Greedy", "Sampler"]

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]


class Sampler(Protocol):
    """Turns logits into a distribution, and a distribution into a token."""

    @property
    def plain(self) -> bool:
        """Whether it takes the largest of the unchanged logits: the probe's own token then is the
        answer, and nobody needs the logits.
        """

    def probabilities(self, logits: Float32, tokens: Sequence[int]) -> Float64:
        """The distribution `[vocab_size]` that the next token is drawn from.

        Args:
            logits: `[vocab_size]`, as the probe gives them; not changed.
            tokens: the sequence so far, prompt included (penalties look at it).
        """

    def draw(self, probabilities: Float64) -> int:
        """One token; advances the sampler's random generator."""


class Greedy:
    """The most probable token."""

    plain = True

    def probabilities(self, logits: Float32, tokens: Sequence[int]) -> Float64:
        """All of it on the largest logit."""
        distribution = np.zeros(len(logits), np.float64)
        distribution[int(np.argmax(logits))] = 1.0
        return distribution

    def draw(self, probabilities: Float64) -> int:
        """The largest."""
        return int(np.argmax(probabilities))
