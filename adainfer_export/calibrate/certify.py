"""Certificates: "disagreement ≤ ε with confidence 1 − δ" for one frozen exit graph.

Learn-then-Test (arXiv 2110.01052) with fixed-sequence testing: thresholds from a grid that the
selection part fixed are tested from the safest down, H: risk(threshold) > ε, by the exact
binomial p-value P(Bin(n, ε) ≤ disagreements), until the first that is not rejected. The last
rejected one is certified: its risk exceeds ε with probability at most δ over the draw of the
prompts. The prompt is the unit; prompts must be drawn like those that will be asked, and ask
different questions: copies of one say nothing new. Where the same prompts also decide which of k
graphs becomes the default one, δ is divided by k.

A few blind exits keep any level as well. So a level is given only where exits are right
significantly more often than the same exit points are without being chosen, unless those alone
would keep the level.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy import stats

from adainfer_runtime.manifest import Certificate, CertificateGroup, CertificateLevel, Manifest

from .scored import Scored
from .select import Outcome, evaluate

__all__ = [
    "CONFIDENCE",
    "LEVELS",
    "certify",
    "make_certificate",
    "prompts_needed",
    "threshold_grid",
]

LEVELS = (0.005, 0.01, 0.02, 0.05, 0.10)
CONFIDENCE = 0.95
_GRID = 200


def threshold_grid(scored: Scored) -> npt.NDArray[np.float64]:
    """Thresholds to test, from the safest down, fixed by prompts that certify nothing."""
    scores = np.unique(scored.scores)
    grid: npt.NDArray[np.float64] = np.quantile(scores, np.linspace(1.0, 0.0, _GRID))
    return grid


def certify(
    scored: Scored,
    grid: npt.NDArray[np.float64],
    levels: Sequence[float] = LEVELS,
    confidence: float = CONFIDENCE,
    tried: int = 1,
) -> tuple[CertificateLevel, ...]:
    """One entry per level; without a threshold where nothing could be certified.

    Args:
        confidence: that the levels hold for whichever of the graphs tried is taken.
        tried: graphs among which these same prompts decide (Bonferroni).
    """
    tested = [evaluate(scored, float(threshold)) for threshold in grid]
    return tuple(_certify_level(scored, tested, level, confidence, tried) for level in levels)


def make_certificate(
    manifest: Manifest,
    scored: Scored,
    grid: npt.NDArray[np.float64],
    data: Sequence[str],
    against: Literal["model", "gold"] = "model",
    *,
    device_class: str,
    tried: int = 1,
) -> Certificate:
    """The certificate of one frozen exit graph on prompts that were used for nothing else.

    Args:
        device_class: of the engine that was observed.
        tried: see `certify`.
    """
    return Certificate(
        target=manifest.target,
        precision=manifest.precision,
        device_class=device_class,
        data=tuple(data),
        against=against,
        tried=tried,
        levels=certify(scored, grid, tried=tried),
    )


def prompts_needed(level: float, confidence: float = CONFIDENCE) -> int:
    """The least number of prompts that can certify a level, if none disagrees."""
    return math.ceil(math.log(1.0 - confidence) / math.log1p(-level))


def _certify_level(
    scored: Scored, tested: Sequence[Outcome], level: float, confidence: float, tried: int
) -> CertificateLevel:
    prompts = len(scored.scores)
    passed: Outcome | None = None
    chance = (1.0 - confidence) / tried
    for candidate in tested:
        if stats.binom.cdf(candidate.disagreements, prompts, level) > chance:
            break
        passed = candidate
    if passed is None or not _means_something(scored, passed.threshold, level, confidence):
        needed = prompts_needed(level, 1.0 - chance)
        return CertificateLevel(
            level=level,
            confidence=confidence,
            prompts=prompts,
            prompts_needed=needed if prompts < needed else None,
        )
    return CertificateLevel(
        level=level,
        confidence=confidence,
        prompts=prompts,
        threshold=passed.threshold,
        disagreements=passed.disagreements,
        layers_saved=round(passed.layers_saved, 4),
        groups=_groups(scored, passed.threshold, confidence),
    )


def _means_something(scored: Scored, threshold: float, level: float, confidence: float) -> bool:
    leaving, first = scored.leave(threshold)
    if not leaving.any():
        return False
    blind = float((1.0 - scored.agrees.mean(axis=0))[first[leaving]].mean())
    wrong, exits = int(scored.wrong(threshold).sum()), int(leaving.sum())
    return blind <= level or stats.binom.cdf(wrong, exits, blind) <= 1.0 - confidence


def _groups(scored: Scored, threshold: float, confidence: float) -> dict[str, CertificateGroup]:
    """Per task at the pooled threshold, each with its own exact upper bound (Clopper-Pearson)."""
    groups = {}
    wrong = scored.wrong(threshold)
    tasks = np.array(scored.tasks)
    for task in sorted(set(scored.tasks)):
        here = wrong[tasks == task]
        count, found = len(here), int(here.sum())
        bound = 1.0
        if found < count:
            bound = float(stats.beta.ppf(confidence, found + 1, count - found))
        groups[task] = CertificateGroup(
            prompts=count, disagreements=found, upper_bound=round(bound, 4)
        )
    return groups
