"""What decoding costs: a token of the full model, a look at an exit point, drafts and their pass.

One cost model for whoever decides by it (draft lengths, draft layers, looks at exit points) or
forecasts with it (`tools/decode_forecast.py`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from .manifest import Manifest
from .plan_spec import Machine, StageTimes
from .planning.predict import TimePredictor

__all__ = ["DecodeCosts", "decode_costs", "expected_tokens"]

# Time of N rows in one pass over N passes of one row: SmolLM2, int4, six engines, two cores.
_ROWS = ((1, 1.0), (2, 0.65), (3, 0.57), (4, 0.51), (6, 0.46), (8, 0.43), (12, 0.40), (64, 0.39))
_MOST_ROWS = 16  # of a pass in decode: drafts, or positions that wait


@dataclass(frozen=True)
class DecodeCosts:
    """What decoding costs, in layers of one row.

    Attributes:
        layers: of the full model.
        probe: final norm and LM head of one row.
        adapter: of one row; `classifier` of one look.
        rows: (N, time of N rows in one pass over N passes of one row), ascending from N = 1;
            in between it is interpolated.
        draft_probe: the probe that drafts and first looks use, where it is another.
        overhead: of a pass of one row through the model, beside layers and probe: embedding,
            bookkeeping.
        share: of a pass of one row, what it takes of its time alone: less than 1 where texts share
            such passes. Those of several rows, which drafts and positions that wait make, are not
            shared.
    """

    layers: int
    probe: float
    adapter: float = 0.0
    rows: tuple[tuple[int, float], ...] = _ROWS
    draft_probe: float | None = None
    classifier: float = 0.0
    overhead: float = 0.0
    share: float = 1.0

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

    @classmethod
    def of_times(
        cls, times: StageTimes, manifest: Manifest, *, shortlist: bool = False
    ) -> DecodeCosts:
        """By measured seconds, over a past of `times.step_past` positions.

        A shortlist that was not measured costs its share of the probe's multiply-adds.
        """
        predictor = TimePredictor(times, manifest.depth, times.rows[-1])
        one = predictor.layers(1, 1, times.step_past)
        rows = [n for n in times.rows if 1 < n <= _MOST_ROWS]
        curve = [(n, predictor.layers(1, n, times.step_past) / (n * one)) for n in rows]
        spec, draft_probe = manifest.shortlist, None
        if shortlist and spec:
            share = spec.multiply_adds / manifest.probe.multiply_adds
            draft_probe = share * times.probe if times.shortlist is None else times.shortlist
        rest = times.step - predictor.layers(manifest.depth, 1, times.step_past) - times.probe
        return cls(
            manifest.depth,
            times.probe / one,
            times.adapter / one,
            ((1, 1.0), *curve),
            None if draft_probe is None else draft_probe / one,
            times.classifier / one,
            max(0.0, rest) / one,
        )

    def batch(self, rows: int) -> float:
        """Time of so many rows in one pass; one row takes 1."""
        numbers, relative = zip(*self.rows, strict=True)
        return rows * float(np.interp(rows, numbers, relative))

    def of_texts(self, count: int) -> DecodeCosts:
        """The same for each of so many texts that advance together."""
        return replace(self, share=self.batch(count) / count)

    @property
    def token(self) -> float:
        """A token of the full model."""
        return (self.layers + self.probe + self.overhead) * self.share

    @property
    def draft_check(self) -> float:
        """Reading one draft."""
        probe = self.probe * self.share if self.draft_probe is None else self.draft_probe
        return self.adapter + probe

    @property
    def exit_check(self) -> float:
        """One look at an exit point."""
        return self.draft_check + self.classifier

    def round(self, draft_layer: int, drafts: int) -> float:
        """So many drafts, one after the other, and the pass that confirms them."""
        deeper = (self.layers - draft_layer + self.probe) * self.batch(drafts + 1)
        below = (drafts + 1) * (draft_layer + self.overhead) * self.share
        return below + drafts * self.draft_check + deeper

    def per_token(self, draft_layer: int, drafts: int, acceptance: float) -> float:
        """Expected cost of a token where each draft is right with a chance of `acceptance`."""
        if drafts == 0:
            return self.token
        return self.round(draft_layer, drafts) / expected_tokens(drafts, acceptance)

    def least_confidence(self, draft_layer: int, drafts: int) -> float:
        """The chance of being right at which one draft more, after so many, is worth its row."""
        row = self.batch(drafts + 2) - self.batch(drafts + 1)
        below = (draft_layer + self.overhead) * self.share
        return (below + (self.layers - draft_layer + self.probe) * row) / self.token


def expected_tokens(drafts: int, acceptance: float) -> float:
    """Of a round: its right drafts up to the first wrong one, and the full model's own token."""
    return sum(acceptance**n for n in range(drafts + 1))


def decode_costs(
    manifest: Manifest, here: Machine | None, *, shortlist: bool = False
) -> DecodeCosts:
    """By the plan's measured times where they are of this machine, else by multiply-adds.

    Args:
        here: this machine; None where it is not known.
    """
    plan = manifest.plan
    if plan is not None and plan.machine == here:
        return DecodeCosts.of_times(plan.times, manifest, shortlist=shortlist)
    return DecodeCosts.of_manifest(manifest, shortlist=shortlist)
