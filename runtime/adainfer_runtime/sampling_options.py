"""How tokens are to be drawn, as a request states it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TypedDict

from .errors import RequestError
from .values import require_number, require_whole

__all__ = ["SamplingKeywords", "SamplingOptions"]

_NUMBERS = (
    "temperature",
    "top_p",
    "min_p",
    "repetition_penalty",
    "frequency_penalty",
    "presence_penalty",
)
_REPETITION = (0.01, 100.0)
_NO_BIAS: Mapping[int, float] = MappingProxyType({})


class SamplingKeywords(TypedDict, total=False):
    """The fields of `SamplingOptions` as keyword arguments."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    frequency_penalty: float
    presence_penalty: float
    logit_bias: Mapping[int, float]
    seed: int | None


@dataclass(frozen=True)
class SamplingOptions:
    """Applied in this order, which is that of transformers' `generate`: bias, penalties,
    temperature, top-k, top-p, min-p.

    Attributes:
        temperature: divides the logits; 0 takes the most probable token and draws nothing.
        top_k: keep the k most probable tokens; 0 keeps all.
        top_p: keep the fewest tokens that hold this much probability; 1 keeps all.
        min_p: keep tokens at least this probable, relative to the most probable; 0 keeps all.
        repetition_penalty: divides positive and multiplies negative logits of tokens of prompt
            and text (CTRL, arXiv 1909.05858), at most a hundredfold; 1 does nothing.
        frequency_penalty: subtracted once per occurrence in the text (not in the prompt);
            0 does nothing.
        presence_penalty: subtracted once from tokens that occur in the text.
        logit_bias: added to the logits of these token ids; minus infinity forbids one.
        seed: of the random generator; None takes one from the system. The same seed gives the
            same text on the same engine and machine.

    Raises:
        RequestError: a value outside its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=lambda: _NO_BIAS)
    seed: int | None = None

    def __post_init__(self) -> None:
        require_whole("top_k", self.top_k)
        if self.seed is not None:
            require_whole("seed", self.seed)
        for name in _NUMBERS:
            require_number(name, getattr(self, name))
        _require("temperature", self.temperature, self.temperature >= 0, "0 (greedy) or more")
        _require("top_k", self.top_k, self.top_k >= 0, "0 (all) or more")
        _require("top_p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1")
        _require("min_p", self.min_p, 0 <= self.min_p <= 1, "between 0 and 1")
        penalty = self.repetition_penalty
        low, high = _REPETITION
        in_range = low <= penalty <= high
        _require(
            "repetition_penalty", penalty, in_range, f"between {low} and {high} (1 does nothing)"
        )
        for name in ("frequency_penalty", "presence_penalty"):
            value = getattr(self, name)
            _require(name, value, -2 <= value <= 2, "between -2 and 2")
        _require("seed", self.seed, self.seed is None or self.seed >= 0, "0 or more")
        if not isinstance(self.logit_bias, Mapping):
            raise RequestError(
                f"logit_bias must map token ids to numbers, found {self.logit_bias!r}"
            )
        for token, bias in self.logit_bias.items():
            require_whole("logit_bias token", token)
            require_number(f"logit_bias of token {token}", bias)
            in_range = bias < math.inf  # also refuses NaN
            _require(f"logit_bias of token {token}", bias, in_range, "finite, or minus infinity")

    @property
    def greedy(self) -> bool:
        """Whether nothing is drawn at random."""
        return self.temperature == 0

    @property
    def changes_logits(self) -> bool:
        """Whether bias or penalties come before the choice."""
        return bool(self.logit_bias) or (
            self.repetition_penalty != 1.0
            or self.frequency_penalty != 0.0
            or self.presence_penalty != 0.0
        )


def _require(name: str, value: object, holds: bool, expected: str) -> None:
    finite = not isinstance(value, float) or math.isfinite(value) or name.startswith("logit_bias")
    if not (holds and finite):
        raise RequestError(f"{name} must be {expected}, found {value}")
