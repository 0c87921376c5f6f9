"""Live agreement: every n-th adaptive request also runs in full, and is compared.

Every comparison is a look at the counts, so a test for one look would give false alarms in the end.
Here evidence is a mixture of likelihood ratios of larger risks against the promised one. While the
risk is within the promise that is a nonnegative supermartingale that starts at 1, and by Ville's
inequality (1939) the chance that it *ever* reaches 1/α is α at most, whatever the number of looks
(Howard et al., "Time-uniform, nonparametric, nonasymptotic confidence sequences", Annals of
Statistics 2021; Waudby-Smith and Ramdas, "Estimating means of bounded random variables by betting",
JRSS B 2024).
"""

from __future__ import annotations

import logging
import math
import threading
from dataclasses import dataclass, field

from .values import require_count

__all__ = ["ShadowEntry", "ShadowMonitor", "log_evidence"]

_LOG = logging.getLogger(__name__)
_FALSE_ALARMS = 0.05
# Risks that are tested for, as odds beside the promised ones.
_ODDS_RATIOS = (1.25, 1.5, 2.0, 3.0, 5.0, 10.0, 30.0)


@dataclass(frozen=True)
class ShadowEntry:
    """Comparisons under one promise.

    Attributes:
        promised: share of disagreement that the request's certificate level (or the calibration's
            target) allows; None for requests with a threshold of their own.
        holds: False once the disagreements are too many for the promise. That happens with a chance
            of 5% at most where the promise is kept, over all comparisons together.
    """

    promised: float | None
    checked: int
    disagreed: int
    holds: bool

    @property
    def agreement(self) -> float:
        """Share of comparisons with equal answers."""
        return 1.0 - self.disagreed / self.checked


@dataclass
class _Count:
    checked: int = 0
    disagreed: int = 0
    alarmed: bool = False


@dataclass
class ShadowMonitor:
    """Counts requests and comparisons; may be shared by threads.

    Raises:
        RequestError: `every` is no whole number of at least 1.
    """

    every: int
    _requests: int = 0
    _counts: dict[float | None, _Count] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        require_count("shadow_every", self.every)

    def due(self) -> bool:
        """Whether this adaptive request is to be compared; call once per request."""
        with self._lock:
            self._requests += 1
            return self._requests % self.every == 0

    def record(self, promised: float | None, *, agrees: bool) -> None:
        """Adds a comparison, and warns when the promise no longer fits."""
        with self._lock:
            count = self._counts.setdefault(promised, _Count())
            count.checked += 1
            count.disagreed += not agrees
            if not agrees and not count.alarmed and not _holds(promised, count):
                count.alarmed = True
                _LOG.warning(
                    "%d of %d compared answers differ from the full model's, where %.1f%% were "
                    "promised: the certificate no longer fits these requests; renew it with "
                    "`adainfer certify`, or calibrate on them",
                    count.disagreed,
                    count.checked,
                    100 * (promised or 0.0),
                )

    def report(self) -> tuple[ShadowEntry, ...]:
        """What was seen so far, one entry per promise."""
        with self._lock:
            return tuple(
                ShadowEntry(promised, count.checked, count.disagreed, not count.alarmed)
                for promised, count in self._counts.items()
            )


def log_evidence(disagreed: int, checked: int, promised: float) -> float:
    """Logarithm of the evidence that the risk of disagreement is above the promised one."""
    if promised <= 0.0:
        return math.inf if disagreed else 0.0
    if promised >= 1.0:
        return 0.0
    logs = []
    for ratio in _ODDS_RATIOS:
        # Odds o·r: the risk is p·r / (1 − p + p·r), its complement (1 − p) / (1 − p + p·r).
        norm = math.log1p(promised * (ratio - 1.0))
        logs.append(disagreed * math.log(ratio) - checked * norm)
    largest = max(logs)
    mean = math.fsum(math.exp(value - largest) for value in logs) / len(logs)
    return largest + math.log(mean)


def _holds(promised: float | None, count: _Count) -> bool:
    if promised is None:
        return True
    return log_evidence(count.disagreed, count.checked, promised) < -math.log(_FALSE_ALARMS)
