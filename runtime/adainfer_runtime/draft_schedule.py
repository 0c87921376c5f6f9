"""How many tokens to draft before the full model confirms them: what drafts cost, and gain."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from .manifest import Manifest

__all__ = [
    "Acceptance",
    "Adaptive",
    "DecodeCosts",
    "DraftSchedule",
    "Fixed",
    "agreement_by_layer",
    "default_draft_layer",
]

# Time of N rows in one pass over N passes of one row: SmolLM2, int4, six engines, two cores.
_ROWS = ((1, 1.0), (2, 0.65), (3, 0.57), (4, 0.51), (6, 0.46), (8, 0.43), (12, 0.40), (64, 0.39))
_UNKNOWN_AGREEMENT = 0.6


@dataclass(frozen=True)
class DecodeCosts:
    """What decoding costs, in layers of one row.

    Attributes:
        layers: of the full model.
        probe: final norm and LM head of one row.
        adapter: of one row.
        rows: (N, time of N rows in one pass over N passes of one row), ascending from N = 1;
            in between it is interpolated.
        draft_probe: the probe that drafts use, where it is another.
    """

    layers: int
    probe: float
    adapter: float = 0.0
    rows: tuple[tuple[int, float], ...] = _ROWS
    draft_probe: float | None = None

    @classmethod
    def of_manifest(cls, manifest: Manifest, *, shortlist: bool = False) -> DecodeCosts:
        """By multiply-adds: what can be said without a measurement.

        Args:
            shortlist: drafts use the folder's shortlist, where it has one.
        """
        stages = manifest.layer_stages
        layer = sum(stage.multiply_adds for stage in stages) / manifest.depth
        spec = manifest.shortlist
        adapters = [point.multiply_adds for point in manifest.exit_points.values()]
        return cls(
            manifest.depth,
            manifest.probe.multiply_adds / layer,
            max(adapters, default=0) / layer,
            draft_probe=spec.multiply_adds / layer if shortlist and spec else None,
        )

    def batch(self, rows: int) -> float:
        """Time of so many rows in one pass; one row takes 1."""
        numbers, relative = zip(*self.rows, strict=True)
        return rows * float(np.interp(rows, numbers, relative))

    @property
    def token(self) -> float:
        """A token of the full model."""
        return self.layers + self.probe

    def round(self, draft_layer: int, drafts: int) -> float:
        """So many drafts, one after the other, and the pass that confirms them."""
        check = self.adapter + (self.probe if self.draft_probe is None else self.draft_probe)
        deeper = (self.layers - draft_layer + self.probe) * self.batch(drafts + 1)
        return (drafts + 1) * draft_layer + drafts * check + deeper

    def per_token(self, draft_layer: int, drafts: int, acceptance: float) -> float:
        """Expected cost of a token where each draft is right with a chance of `acceptance`."""
        if drafts == 0:
            return self.token
        tokens = sum(acceptance**n for n in range(drafts + 1))
        return self.round(draft_layer, drafts) / tokens

    def least_confidence(self, draft_layer: int, drafts: int) -> float:
        """The chance of being right at which one draft more, after so many, is worth its row."""
        row = self.batch(drafts + 2) - self.batch(drafts + 1)
        extra = draft_layer + (self.layers - draft_layer + self.probe) * row
        return extra / self.token


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
    """So many drafts every time, however they fare (for tests and comparisons)."""

    drafts: int

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
    again as long as it is right, so that a text which is easy, or becomes so, is noticed: each
    that is wrong costs about one token of the full model.
    """

    costs: DecodeCosts
    draft_layer: int
    most: int = 7
    retry_every: int = 64

    def length(self, acceptance: Acceptance) -> int:
        """See the class."""
        best = self._best(acceptance.rate)
        due = acceptance.idle is None or acceptance.idle >= self.retry_every
        return 1 if best == 0 and due and self._best(1.0) else best

    def keeps(self, confidence: float, drafts: int) -> bool:
        """Whether the draft is likelier right than its row in the deeper layers costs."""
        return confidence >= self.costs.least_confidence(self.draft_layer, drafts)

    def _best(self, acceptance: float) -> int:
        costs = [self.costs.per_token(self.draft_layer, n, acceptance) for n in self._lengths]
        return int(np.argmin(costs))

    @property
    def _lengths(self) -> range:
        return range(self.most + 1)


def default_draft_layer(manifest: Manifest, costs: DecodeCosts) -> int | None:
    """The exit point whose drafts are expected to cost least per token; None without any."""
    known = agreement_by_layer(manifest)
    best: dict[int, float] = {}
    for layer in manifest.exit_points:
        rate = known.get(layer, _UNKNOWN_AGREEMENT)
        best[layer] = min(costs.per_token(layer, n, rate) for n in range(1, 8))
    return min(best, key=lambda layer: (best[layer], -layer), default=None)


def agreement_by_layer(manifest: Manifest) -> Mapping[int, float]:
    """Share of calibration prompts on which an exit layer gave the full model's token."""
    figures: dict[str, Any] = manifest.exit.calibration if manifest.exit else {}
    return {int(k): float(v) for k, v in figures.get("agreement_by_layer", {}).items()}
