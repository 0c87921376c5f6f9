"""Live agreement: every n-th adaptive request also runs in full, and is compared.

Whether the promise still fits is asked after every comparison, for as long as the engine lives. A
test at a fixed level would alarm sooner or later without cause; this one is anytime-valid (Ville's
inequality; Waudby-Smith and Ramdas, arXiv 2010.09686).
"""

from __future__ import annotations

import logging
import math
import threading
from dataclasses import dataclass, field

from .errors import RequestError

__all__ = ["ShadowEntry", "ShadowMonitor", "evidence"]

_LOG = logging.getLogger(__name__)
_FALSE_ALARM = 0.01  # chance of ever alarming where the promise is kept
_ODDS = (1.25, 1.5, 2.0, 3.0, 5.0, 10.0, 30.0)  # alternatives: times the odds promised
_LARGEST_LOG = 700.0


@dataclass(frozen=True)
class ShadowEntry:
    """Comparisons under one promise.

    Attributes:
        promised: share of disagreement that the request's certificate level (or the calibration's
            target) allows; None for requests with a threshold of their own.
        holds: False once the comparisons speak against the promise; where it is kept that happens
            with a chance of at most 1%, however many there are.
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


def evidence(disagreed: int, checked: int, promised: float) -> float:
    """Against "at most this share disagrees": an e-process, which may be looked at after every
    comparison. Under the promise it ever reaches 1/α with a chance of at most α (Ville).

    It is a mixture of likelihood ratios, each of a share whose odds are a few times those promised;
    each is a supermartingale for every share up to the promised one.
    """
    if promised <= 0.0:
        return math.inf if disagreed else 1.0
    logs = [
        disagreed * math.log(odds) - checked * math.log1p(promised * (odds - 1.0)) for odds in _ODDS
    ]
    largest = max(logs)
    mean = math.fsum(math.exp(value - largest) for value in logs) / len(logs)
    return math.inf if largest > _LARGEST_LOG else mean * math.exp(largest)


def _holds(promised: float | None, count: _Count) -> bool:
    if promised is None:
        return True
    return evidence(count.disagreed, count.checked, promised) < 1.0 / _FALSE_ALARM
