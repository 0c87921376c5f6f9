"""How many tokens to draft before the full model confirms them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

from .decode_costs import DecodeCosts, expected_tokens
from .errors import RequestError
from .manifest import Manifest
from .session import ExitProbe
from .values import require_whole

__all__ = [
    "UNKNOWN_AGREEMENT",
    "Acceptance",
    "Adaptive",
    "DraftSchedule",
    "Fixed",
    "agreement_by_layer",
    "default_draft_layer",
]

UNKNOWN_AGREEMENT = 0.6  # of a folder that says nothing about its exit points


class Acceptance:
    """Drafts of one request: how many were judged, and how many were right, lately.

    Every round weighs `memory` times as much as the one after it. What a request starts with,
    `prior`, counts as `prior_weight` judged drafts. `idle` is the number of tokens since drafts
    last went wrong; None where none ever did.
    """

    def __init__(self, prior: float, prior_weight: float = 4.0, memory: float = 0.97) -> None:
        self._memory = memory
        self._judged = prior_weight
        self._right = prior * prior_weight
        self.idle: int | None = None

    @property
    def rate(self) -> float:
        """Share of judged drafts that were right."""
        return self._right / self._judged

    def record(self, judged: int, right: int) -> None:
        """One round; drafts after a wrong one were not judged."""
        self._judged = self._judged * self._memory + judged
        self._right = self._right * self._memory + right
        if right < judged:
            self.idle = 0

    def record_idle(self) -> None:
        """One token without drafts."""
        if self.idle is not None:
            self.idle += 1


class DraftSchedule(Protocol):
    """Decides round by round; immutable, so that requests may share one."""

    def length(self, acceptance: Acceptance) -> int:
        """Drafts of the next round; 0 runs the full model for one token."""

    def keeps(self, confidence: float, drafts: int) -> bool:
        """Whether a draft of this top probability is kept, after so many; else drafting ends."""


@dataclass(frozen=True)
class Fixed:
    """So many drafts every time, however they fare (for tests and comparisons).

    Raises:
        RequestError: no whole number of 0 or more.
    """

    drafts: int

    def __post_init__(self) -> None:
        require_whole("drafts", self.drafts)
        if self.drafts < 0:
            raise RequestError(f"drafts must be 0 or more, found {self.drafts}")

    def length(self, acceptance: Acceptance) -> int:
        """Always the same."""
        return self.drafts

    def keeps(self, confidence: float, drafts: int) -> bool:
        """Always."""
        return True


@dataclass(frozen=True)
class Adaptive:
    """The length of the least expected cost per token; none where the full model costs less.

    Where even drafts that are always right would not pay, nothing is ever drafted. Where the
    acceptance is too low, one draft is tried at the start and every `retry_every` tokens, and
    again as long as it is right, so that a text which is easy, or becomes so, is noticed. None is
    tried where even drafts that are always right would save less than `least_gain`.
    """

    costs: DecodeCosts
    draft_layer: int
    most: int = 7
    retry_every: int = 64
    least_gain: float = 0.05

    def length(self, acceptance: Acceptance) -> int:
        """See the class."""
        best = self._best(acceptance.rate)
        due = acceptance.idle is None or acceptance.idle >= self.retry_every
        return 1 if best == 0 and due and self._worth_trying else best

    def keeps(self, confidence: float, drafts: int) -> bool:
        """Whether the draft is likelier right than its row in the deeper layers costs."""
        return confidence >= self.costs.least_confidence(self.draft_layer, drafts)

    def _best(self, acceptance: float) -> int:
        # Asked before every token: no more than a few multiplications.
        costs = [cost / expected_tokens(n, acceptance) for n, cost in enumerate(self._rounds)]
        return costs.index(min(costs))

    @cached_property
    def _worth_trying(self) -> bool:
        drafts = self._best(1.0)
        least = self._rounds[drafts] / expected_tokens(drafts, 1.0)
        return least < (1.0 - self.least_gain) * self.costs.token

    @cached_property
    def _rounds(self) -> tuple[float, ...]:
        """Cost of a round by its drafts; of none: a token of the full model."""
        drafted = (self.costs.round(self.draft_layer, n) for n in range(1, self.most + 1))
        return (self.costs.token, *drafted)


def default_draft_layer(
    manifest: Manifest, costs: DecodeCosts, probe: ExitProbe = "full"
) -> int | None:
    """The exit point whose drafts are expected to cost least per token; None without any."""
    known = agreement_by_layer(manifest, probe)
    best: dict[int, float] = {}
    for layer in manifest.exit_points:
        rate = known.get(layer, UNKNOWN_AGREEMENT)
        best[layer] = min(costs.per_token(layer, n, rate) for n in range(1, 8))
    return min(best, key=lambda layer: (best[layer], -layer), default=None)


def agreement_by_layer(manifest: Manifest, probe: ExitProbe = "full") -> Mapping[int, float]:
    """Share of calibration prompts on which an exit layer gave the full model's token, as this
    probe reads it. A shortlist of which that was not measured is taken for the full probe.
    """
    figures: dict[str, Any] = manifest.exit.calibration if manifest.exit else {}
    found: Mapping[str, Any] = figures.get("agreement_by_layer", {})
    if probe == "shortlist" and manifest.shortlist:
        found = manifest.shortlist.agreement or found
    return {int(k): float(v) for k, v in found.items()}
