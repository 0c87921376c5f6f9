"""Which mode a request is answered fastest in, and by how much: also "do not exit"."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from ..errors import ExitUnavailableError
from ..exit_policy import ExitPolicy
from ..manifest import CombinedExitSpec, ExitSpec, Manifest
from ..mode_policies import Mode, PolicyFactory, Strictness
from .predict import RequestShape, TimePredictor
from .recent import RecentExits

__all__ = ["ModeForecast", "exit_shares", "forecast_modes", "pick_mode", "shares_at"]

# A gain below this is within what a forecast knows.
_LEAST_GAIN = 0.01


@dataclass(frozen=True)
class ModeForecast:
    """A mode with its expected seconds; `shares` are those of requests that leave at each check."""

    mode: Mode
    policy: ExitPolicy
    shares: tuple[float, ...]
    seconds: float


def forecast_modes(
    policies: PolicyFactory,
    predictor: TimePredictor,
    shape: RequestShape,
    strictness: Strictness,
    recent: RecentExits,
) -> tuple[ModeForecast, ...]:
    """Every mode that the folder has at this strictness, `off` first; requests leave as held-out
    prompts did, and as those did that came lately.
    """
    off = ModeForecast("off", policies.of_mode("off", strictness), (), predictor.off(shape))
    found = [off]
    for mode, spec in _specs(policies.manifest, shape):
        try:
            policy = (
                policies.of_choice(mode, strictness)
                if shape.candidates
                else policies.of_mode(mode, strictness)
            )
        except ExitUnavailableError:  # not certified at the level that is asked for
            continue
        if not policy.checks or not spec.exit_shares:
            continue
        shares = recent.shares(policy, exit_shares(spec, strictness))
        seconds = predictor.exits(policy.checks, shares, shape)
        found.append(ModeForecast(mode, policy, shares, seconds))
    return tuple(found)


def pick_mode(forecasts: Sequence[ModeForecast]) -> ModeForecast:
    """The fastest; `off` where nothing is faster by more than a hundredth."""
    off = forecasts[0]
    best = min(forecasts, key=lambda forecast: forecast.seconds)
    return best if best.seconds < (1.0 - _LEAST_GAIN) * off.seconds else off


def exit_shares(spec: ExitSpec | CombinedExitSpec, strictness: Strictness) -> tuple[float, ...]:
    """Of held-out prompts, the share that leaves at each check at the threshold that applies, or
    at the next safer one that was looked at.
    """
    return shares_at(spec, strictness.of(spec)[0])


def shares_at(spec: ExitSpec | CombinedExitSpec, threshold: float) -> tuple[float, ...]:
    """The same for a threshold of the spec's scores."""
    grid: Iterable[float] = (
        spec.thresholds if isinstance(spec, ExitSpec) else (-n for n in range(len(spec.path)))
    )
    shares = (0.0,) * len(spec.exit_shares[0])
    for known, row in zip(grid, spec.exit_shares, strict=True):
        if known < threshold:
            break
        shares = row
    return shares


_Spec = tuple[Literal["adaptive", "context", "combined"], ExitSpec | CombinedExitSpec]


def _specs(manifest: Manifest, shape: RequestShape) -> list[_Spec]:
    if shape.candidates and manifest.choice_exit is not None:
        return [("adaptive", manifest.choice_exit)]
    found: list[_Spec] = []
    if manifest.exit is not None:
        found.append(("adaptive", manifest.exit))
    if manifest.context_exit is not None:
        found.append(("context", manifest.context_exit))
    if manifest.combined_exit is not None:
        found.append(("combined", manifest.combined_exit))
    return found
