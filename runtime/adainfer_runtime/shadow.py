"""Live agreement: every n-th adaptive request also runs in full, and is compared."""

from __future__ import annotations

import logging
import math
import threading
from dataclasses import dataclass, field

from .errors import RequestError

__all__ = ["ShadowEntry", "ShadowMonitor", "binomial_tail"]

_LOG = logging.getLogger(__name__)
# The test is repeated with every comparison: far below the usual 5%, so that alarms mean something.
_ALARM = 1e-3


@dataclass(frozen=True)
class ShadowEntry:
    """Comparisons under one promise.

    Attributes:
        promised: share of disagreement that the request's certificate level (or the calibration's
            target) allows; None for requests with a threshold of their own.
        holds: False once so many disagreements have a chance below 0.1% under the promise.
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
        RequestError: `every` is below 1.
    """

    every: int
    _requests: int = 0
    _counts: dict[float | None, _Count] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        if self.every < 1:
            raise RequestError(f"shadow_every must be at least 1, found {self.every}")

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


def binomial_tail(count: int, total: int, share: float) -> float:
    """P(X ≥ count) of X ~ Bin(total, share)."""
    if count <= 0:
        return 1.0
    if share <= 0.0:
        return 0.0
    logs = (
        math.lgamma(total + 1)
        - math.lgamma(k + 1)
        - math.lgamma(total - k + 1)
        + k * math.log(share)
        + (total - k) * math.log1p(-share)
        for k in range(count, total + 1)
    )
    return min(1.0, math.fsum(math.exp(value) for value in logs))


def _holds(promised: float | None, count: _Count) -> bool:
    if promised is None:
        return True
    return binomial_tail(count.disagreed, count.checked, promised) > _ALARM
