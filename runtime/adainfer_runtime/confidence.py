"""Thresholds that fall over a text: what goes wrong early is read by more tokens (CALM)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from .errors import RequestError
from .exit_policy import ClassifierExit, ExitPolicy
from .values import require_number, require_whole

__all__ = ["ConfidenceDecay", "DecayingExit", "ExitSchedule"]


class ExitSchedule(Protocol):
    """An exit policy for every token of a text."""

    def at(self, step: int) -> ExitPolicy:
        """For the token with so many generated ones before it."""


@dataclass(frozen=True)
class ConfidenceDecay:
    """`0.9 λ + 0.1 exp(−τ t / N)`, within 0 … 1 (arXiv 2207.07061, equation 5).

    Attributes:
        tau: how fast it falls; CALM uses 4.
        tokens: N, the length of a text.
    """

    tau: float
    tokens: int

    def __post_init__(self) -> None:
        require_number("tau", self.tau)
        require_whole("tokens", self.tokens)
        if not (math.isfinite(self.tau) and self.tau >= 0.0 and self.tokens >= 1):
            raise RequestError(
                f"confidence decay needs tau of at least 0 and tokens of at least 1, found "
                f"{self.tau} and {self.tokens}"
            )

    def confidence(self, base: float, step: int) -> float:
        """The threshold after `step` tokens; a base above 1 never stops, and never will."""
        value = 0.9 * base + 0.1 * math.exp(-self.tau * step / self.tokens)
        return min(max(value, 0.0), max(1.0, base))


@dataclass(frozen=True)
class DecayingExit:
    """A classifier's exits under a falling threshold.

    Scores are no probabilities: the range of the thresholds that certificates test stands for
    0 … 1. What was certified holds for constant thresholds, not for this one.
    """

    policy: ClassifierExit
    decay: ConfidenceDecay
    lowest: float
    highest: float

    @classmethod
    def of(
        cls, policy: ClassifierExit, decay: ConfidenceDecay, thresholds: Sequence[float]
    ) -> DecayingExit:
        """Over the thresholds of an exit graph.

        Raises:
            RequestError: there are not two different ones.
        """
        lowest, highest = min(thresholds, default=0.0), max(thresholds, default=0.0)
        if not lowest < highest:
            raise RequestError(
                "a falling threshold needs the exit graph's range of thresholds: run `adainfer "
                "calibrate DIR` again"
            )
        return cls(replace(policy, promised=None), decay, lowest, highest)

    def at(self, step: int) -> ClassifierExit:
        """The policy with that token's threshold."""
        span = self.highest - self.lowest
        base = (self.policy.threshold - self.lowest) / span
        threshold = self.lowest + span * self.decay.confidence(base, step)
        return replace(self.policy, threshold=threshold)
