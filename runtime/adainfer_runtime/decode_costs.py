"""What decoding costs: a token of the full model, a look at an exit point, drafts and their pass.

One cost model for whoever decides by it (draft lengths, draft layers, looks at exit points) or
forecasts with it (`tools/decode_forecast.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from .kv_fill import KvPolicy
from .manifest import Manifest
from .plan_spec import Machine, StageTimes
from .planning.predict import TimePredictor, at_rows

__all__ = ["DecodeCosts", "FillCosts", "decode_costs", "expected_tokens"]

# Time of N rows in one pass over N passes of one row: SmolLM2, int4, six engines, two cores.
_ROWS = ((1, 1.0), (2, 0.65), (3, 0.57), (4, 0.51), (6, 0.46), (8, 0.43), (12, 0.40), (64, 0.39))
_MOST_ROWS = 16  # of a pass in decode: drafts, or positions that wait


@dataclass(frozen=True)
class FillCosts:
    """What approximate K and V cost under one KV policy, in layers of one row.

    Attributes:
        rows: positions that are filled in one go, ascending.
        above: by exit layer, parallel to `rows`: all layers above it, for all of the positions.
    """

    rows: tuple[int, ...]
    above: Mapping[int, tuple[float, ...]]

    def position(self, exit_layer: int, together: int) -> float | None:
        """One of so many positions that stopped there and are filled in one go; None where the
        policy does not fill them.
        """
        known = self.above.get(exit_layer)
        return None if known is None else at_rows(together, self.rows, known) / together


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
            shared, nor are fills.
        fills: of the KV policies that give skipped layers approximate K and V.
    """

    layers: int
    probe: float
    adapter: float = 0.0
    rows: tuple[tuple[int, float], ...] = _ROWS
    draft_probe: float | None = None
    classifier: float = 0.0
    overhead: float = 0.0
    share: float = 1.0
    fills: Mapping[KvPolicy, FillCosts] = field(default_factory=dict)

    @classmethod
    def of_manifest(cls, manifest: Manifest, *, shortlist: bool = False) -> DecodeCosts:
        """By multiply-adds: what can be said without a measurement.

        Args:
            shortlist: drafts use the folder's shortlist, where it has one.
        """
        layer = _layer_work(manifest)
        spec = manifest.shortlist
        adapters = [point.multiply_adds for point in manifest.exit_points.values()]
        return cls(
            manifest.depth,
            manifest.probe.multiply_adds / layer,
            max(adapters, default=0) / layer,
            draft_probe=spec.multiply_adds / layer if shortlist and spec else None,
            fills=_fills_by_work(manifest, layer, _ROWS),
        )

    @classmethod
    def of_times(
        cls, times: StageTimes, manifest: Manifest, *, shortlist: bool = False
    ) -> DecodeCosts:
        """By measured seconds, over a past of `times.step_past` positions.

        A shortlist that was not measured costs its share of the probe's multiply-adds; fills that
        were not, theirs of a layer's.
        """
        predictor = TimePredictor(times, manifest.depth, times.rows[-1])
        one = predictor.layers(1, 1, times.step_past)
        rows = [n for n in times.rows if 1 < n <= _MOST_ROWS]
        pairs = [(n, predictor.layers(1, n, times.step_past) / (n * one)) for n in rows]
        curve = ((1, 1.0), *pairs)
        spec, draft_probe = manifest.shortlist, None
        if shortlist and spec:
            share = spec.multiply_adds / manifest.probe.multiply_adds
            draft_probe = share * times.probe if times.shortlist is None else times.shortlist
        rest = times.step - predictor.layers(manifest.depth, 1, times.step_past) - times.probe
        return cls(
            manifest.depth,
            times.probe / one,
            times.adapter / one,
            curve,
            None if draft_probe is None else draft_probe / one,
            times.classifier / one,
            max(0.0, rest) / one,
            fills=(
                _fills_by_work(manifest, _layer_work(manifest), curve)
                if times.fills is None
                else _fills_by_time(predictor, manifest, times.fills.rows, one)
            ),
        )

    def batch(self, rows: int) -> float:
        """Time of so many rows in one pass; one row takes 1."""
        numbers, relative = zip(*self.rows, strict=True)
        return rows * float(np.interp(rows, numbers, relative))

    def fill(self, policy: KvPolicy, exit_layer: int, together: int) -> float | None:
        """Approximate K and V for one of so many positions that stopped there and wait; None where
        a later token runs the skipped layers instead. Of policies that nothing is known of: 0.
        """
        if policy == "deferred":
            return None
        known = self.fills.get(policy)
        return 0.0 if known is None else known.position(exit_layer, together)

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


def _layer_work(manifest: Manifest) -> float:
    """Multiply-adds of one layer for one position: their mean."""
    return sum(stage.multiply_adds for stage in manifest.layer_stages) / manifest.depth


def _fills_by_work(
    manifest: Manifest, layer: float, rows: tuple[tuple[int, float], ...]
) -> dict[KvPolicy, FillCosts]:
    """By multiply-adds, and what several rows in one pass of a layer gain."""
    stages = manifest.kv_fills
    propagate = {
        point: sum(stage.multiply_adds for n, stage in stages.items() if n > point)
        for point in manifest.exit_layers
        if stages
    }
    translated = {n: point.multiply_adds for n, point in manifest.context_points.items()}
    work: dict[KvPolicy, dict[int, int]] = {"propagate": propagate, "translated": translated}
    return {
        policy: FillCosts(
            tuple(n for n, _ in rows),
            {
                point: tuple(n * time * adds / layer for n, time in rows)
                for point, adds in of.items()
            },
        )
        for policy, of in work.items()
        if of
    }


def _fills_by_time(
    predictor: TimePredictor, manifest: Manifest, rows: tuple[int, ...], one: float
) -> dict[KvPolicy, FillCosts]:
    """By measured seconds; `one` is a layer's, of one row."""
    policies: tuple[KvPolicy, ...] = ("propagate", "translated")
    found: dict[KvPolicy, FillCosts] = {}
    for policy in policies:
        seconds = {
            point: [predictor.fill(policy, point, count) for count in rows]
            for point in manifest.exit_layers
        }
        above = {
            point: tuple(time / one for time in times if time is not None)
            for point, times in seconds.items()
            if None not in times
        }
        if above:
            found[policy] = FillCosts(rows, above)
    return found


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
