"""What exits are worth in decode, where a token is one position: the plan of texts.

A look at an exit point costs a probe, a draft a row of the pass that confirms it; skipped layers
run later, or never (see `DecodeCosts` and `ExitCosts`). The runtime decides by these costs while it
decodes; here they are laid out beforehand: what each way to use exits is expected to take, and how
many tokens would have to exit, or drafts be right, for it to gain.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from .decode_costs import DecodeCosts
from .draft_schedule import UNKNOWN_AGREEMENT, agreement_by_layer
from .exit_looks import ExitCosts
from .kv_fill import KvPolicy
from .manifest import Manifest
from .session import ExitProbe

__all__ = ["DecodeForecast", "best_drafting", "forecast_decode"]

_MOST_DRAFTS = 8
_STEPS = 100  # of the search for the share from which something pays


@dataclass(frozen=True)
class DecodeForecast:
    """One way to use exits in decode.

    Attributes:
        layers: exit points: that of drafts, or those at which a look is worth its price (none pay:
            all of the exit graph's).
        drafts: per round, where that costs least.
        share: of tokens that leave early, or of drafts that are right, on held-out prompts.
        relative: expected time of a token over the full model's, at that share.
        pays_from: least share at which it costs less than the full model; None: at none.
        kv_policy: of positions that left early; drafts leave none behind.
    """

    mode: Literal["adaptive", "verified"]
    probe: ExitProbe
    layers: tuple[int, ...]
    drafts: int
    share: float
    relative: float
    pays_from: float | None
    kv_policy: KvPolicy = "deferred"


def forecast_decode(
    manifest: Manifest,
    costs: Callable[[ExitProbe], DecodeCosts],
    looks: tuple[tuple[int, ...], tuple[float, ...]] | None,
) -> tuple[DecodeForecast, ...]:
    """Every way that the folder has, by mode, exit point, probe and KV policy.

    Args:
        looks: exit points of mode `adaptive`, and the share of held-out prompts that leaves at
            each: their answers leave sooner than the tokens of a text do.
    """
    probes: tuple[ExitProbe, ...] = ("full", "shortlist") if manifest.shortlist else ("full",)
    found: list[DecodeForecast] = []
    for probe in probes:
        known = costs(probe)
        if looks is not None:
            found += _looks(known, probe, *looks)
        found += _drafts(manifest, known, probe)
    return tuple(sorted(found, key=lambda forecast: (forecast.mode, forecast.relative)))


def best_drafting(manifest: Manifest, costs: DecodeCosts) -> float:
    """Expected time of a token in mode `verified` over the full model's; 1 where drafts, which it
    then gives up, do not pay.
    """
    known = agreement_by_layer(manifest)
    ways = (
        _best(costs, layer, known.get(layer, UNKNOWN_AGREEMENT))[0]
        for layer in manifest.exit_points
    )
    return min(1.0, min(ways, default=1.0))


def _looks(
    costs: DecodeCosts, probe: ExitProbe, layers: tuple[int, ...], shares: tuple[float, ...]
) -> Iterator[DecodeForecast]:
    """Under the exact KV policy, and those that fill after any of the exit points."""
    yield _looks_under("deferred", costs, probe, layers, shares)
    for policy, fills in costs.fills.items():
        if any(layer in fills.above for layer in layers):
            yield _looks_under(policy, costs, probe, layers, shares)


def _looks_under(
    policy: KvPolicy,
    costs: DecodeCosts,
    probe: ExitProbe,
    layers: tuple[int, ...],
    shares: tuple[float, ...],
) -> DecodeForecast:
    every = ExitCosts(costs, layers, policy, confirmed=probe == "shortlist")
    total = sum(shares)
    alike = tuple(share / total for share in shares) if total else (1.0, *shares[1:])

    def relative(share: float) -> float:
        exits, moved = every.cheapest([share * part for part in alike])
        return exits.token(moved) / costs.token

    chosen, moved = every.cheapest(shares)
    if not chosen.layers:  # what it would cost
        chosen, moved = every, shares
    return DecodeForecast(
        "adaptive",
        probe,
        chosen.layers,
        0,
        sum(moved),
        chosen.token(moved) / costs.token,
        _pays_from(relative),
        policy,
    )


def _drafts(manifest: Manifest, costs: DecodeCosts, probe: ExitProbe) -> Iterator[DecodeForecast]:
    known = agreement_by_layer(manifest, probe)
    for layer in manifest.exit_points:
        agreement = known.get(layer, UNKNOWN_AGREEMENT)

        def relative(share: float, layer: int = layer) -> float:
            return _best(costs, layer, share)[0]

        best, drafts = _best(costs, layer, agreement)
        yield DecodeForecast(
            "verified", probe, (layer,), drafts, agreement, best, _pays_from(relative)
        )


def _best(costs: DecodeCosts, layer: int, acceptance: float) -> tuple[float, int]:
    """Least time of a token over the full model's, and the drafts of a round that give it."""
    lengths = range(1, _MOST_DRAFTS + 1)
    return min((costs.per_token(layer, n, acceptance) / costs.token, n) for n in lengths)


def _pays_from(relative: Callable[[float], float]) -> float | None:
    shares = (step / _STEPS for step in range(_STEPS + 1))
    return next((share for share in shares if relative(share) < 1.0), None)
