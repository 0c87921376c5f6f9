"""Which mode a request is answered fastest in, and by how much: also "do not exit"."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile

import numpy as np

from ..certificate import ExitMode
from ..errors import ExitUnavailableError
from ..exit_policy import ExitPolicy, first_checks
from ..manifest import CombinedExitSpec, ExitSpec, Manifest
from ..mode_policies import Mode, PolicyFactory, Strictness
from .predict import RequestShape, TimePredictor
from .recent import RecentExits

__all__ = ["ModeForecast", "exit_shares", "forecast_modes", "pick_mode", "shares_at"]

# A gain below this is within what a forecast knows.
_LEAST_GAIN = 0.01


@dataclass(frozen=True)
class ModeForecast:
    """A mode with its expected seconds.

    Attributes:
        policy: the first of the mode's checks, as many of them as pay.
        shares: of requests that leave at each check; `looks` the seconds that a look there takes.
    """

    mode: Mode
    policy: ExitPolicy
    shares: tuple[float, ...]
    seconds: float
    looks: tuple[float, ...] = ()


def forecast_modes(
    policies: PolicyFactory,
    predictor: TimePredictor,
    shape: RequestShape,
    strictness: Strictness,
    recent: RecentExits,
    drafting: float = 1.0,
) -> tuple[ModeForecast, ...]:
    """Every mode that the folder has at this strictness, `off` first; requests leave as held-out
    prompts of about their length did, and as those did that came lately, of whatever length.

    How many of its checks a mode takes follows from the request: whether a look pays depends on the
    prompt's length and on what comes after the answer. Only the last ones may be left out, for this
    takes nothing from what is promised (see `first_checks`); so there are few sets to compare, and
    what classifiers remember from earlier checks stays what it was.

    Args:
        drafting: expected time of a token in mode `verified`, as a share of the full model's.
    """
    off = ModeForecast("off", policies.of_mode("off", strictness), (), predictor.off(shape))
    found = [off]
    if drafting < 1.0 and shape.new_tokens > 1:
        seconds = predictor.off(shape, drafting)
        found.append(ModeForecast("verified", off.policy, (), seconds))
    for mode, spec in _specs(policies.manifest, shape, strictness):
        try:
            policy = (
                policies.of_choice(mode, strictness)
                if shape.candidates
                else policies.of_mode(mode, strictness)
            )
        except ExitUnavailableError:  # not certified at the level that is asked for
            continue
        if policy.checks and spec.exit_shares and predictor.knows(policy.checks):
            known = exit_shares(
                spec,
                strictness,
                mode,
                among_labels=shape.candidates and policy.over_candidates,
                prompt_tokens=shape.prompt_tokens,
            )
            found.append(_cheapest(mode, policy, known, predictor, shape, recent))
    return tuple(found)


def _cheapest(
    mode: Mode,
    policy: ExitPolicy,
    known: tuple[float, ...],
    predictor: TimePredictor,
    shape: RequestShape,
    recent: RecentExits,
) -> ModeForecast:
    """By as many of the policy's first checks as take least time."""
    candidates = policy.over_candidates and shape.candidates
    looks = tuple(
        predictor.check(check, shape, over_candidates=candidates) for check in policy.checks
    )
    shares = recent.shares(policy, known)
    found = []
    for count in range(1, len(policy.checks) + 1):
        some = first_checks(policy, count)
        leaving = shares[:count]
        seconds = predictor.exits(some.checks, leaving, shape, over_candidates=candidates)
        found.append(ModeForecast(mode, some, leaving, seconds, looks[:count]))
    return min(found, key=lambda forecast: forecast.seconds)


def pick_mode(forecasts: Sequence[ModeForecast]) -> ModeForecast:
    """The fastest; `off` where nothing is faster by more than a hundredth."""
    off = forecasts[0]
    best = min(forecasts, key=lambda forecast: forecast.seconds)
    return best if best.seconds < (1.0 - _LEAST_GAIN) * off.seconds else off


def exit_shares(
    spec: ExitSpec | CombinedExitSpec,
    strictness: Strictness,
    mode: ExitMode,
    *,
    among_labels: bool = False,
    prompt_tokens: int | None = None,
) -> tuple[float, ...]:
    """Of held-out prompts, the share that leaves at each check at the threshold that applies, or
    at the next safer one that was looked at.

    Args:
        prompt_tokens: of prompts of this length, where the folder tells them apart; default: all.
    """
    threshold = strictness.of(spec, mode, among_labels=among_labels)[0]
    return shares_at(spec, threshold, prompt_tokens)


def shares_at(
    spec: ExitSpec | CombinedExitSpec, threshold: float, prompt_tokens: int | None = None
) -> tuple[float, ...]:
    """The same for a threshold of the spec's scores.

    Between two lengths shares are interpolated, so that one token more never makes a step; what is
    shorter or longer than all of them leaves as the nearest does.
    """
    grid: Iterable[float] = (
        spec.thresholds if isinstance(spec, ExitSpec) else (-n for n in range(len(spec.path)))
    )
    safe = sum(1 for _ in takewhile(lambda known: known >= threshold, grid))
    if safe == 0:
        return (0.0,) * len(spec.exit_shares[0])
    if prompt_tokens is None or not spec.length_shares:
        return spec.exit_shares[safe - 1]
    lengths = [shares.tokens for shares in spec.length_shares]
    rows = np.array([shares.exit_shares[safe - 1] for shares in spec.length_shares])
    return tuple(float(np.interp(prompt_tokens, lengths, column)) for column in rows.T)


_Spec = tuple[ExitMode, ExitSpec | CombinedExitSpec]


def _specs(manifest: Manifest, shape: RequestShape, strictness: Strictness) -> list[_Spec]:
    """At a certified level only one of them: each keeps to it alone, but requests that are dealt
    out among two may be wrong as often as both together. It is the context exit where there is one:
    a rule, for what was seen on the prompts of the certificate must not choose. Texts of mode
    `adaptive` were certified with all of its checks, at every token: that is no matter of a plan.
    """
    if shape.candidates and manifest.choice_exit is not None:
        return [("adaptive", manifest.choice_exit)]
    found: list[_Spec] = []
    if manifest.exit is not None:
        found.append(("adaptive", manifest.exit))
    if manifest.context_exit is not None:
        found.append(("context", manifest.context_exit))
    if manifest.combined_exit is not None and strictness.threshold is None:  # it has two
        found.append(("combined", manifest.combined_exit))
    if strictness.level is None:
        return found
    if strictness.text is not None:
        found = [spec for spec in found if spec[0] != "adaptive"]
    return sorted(found, key=lambda spec: spec[0] != "context")[:1]
