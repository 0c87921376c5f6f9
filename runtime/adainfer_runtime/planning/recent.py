"""What requests did at exit points lately: held-out shares are of other prompts than these."""

from __future__ import annotations

import threading
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..exit_policy import ClassifierExit, CombinedExit, ExitPolicy, SomeChecks

__all__ = ["RecentExits"]

_MOST_POLICIES = 64  # requests may bring thresholds of their own: those asked least lately go


@dataclass
class _Counts:
    """Of one policy: requests that each check was taken for, and that left there; `idle` counts
    requests since one that asked it.
    """

    asked: npt.NDArray[np.float64]
    left: npt.NDArray[np.float64]
    idle: int = 0


class RecentExits:
    """Of one engine, for each exit policy: how many requests asked each check, and left there.

    A policy's first checks alone tell of the same checks of the whole policy. A request weighs
    `memory` times as much as the one after it, and what was known beforehand counts as `weight`
    requests. A policy that `retry_every` requests passed over is worth one try, and a request that
    leaves then makes what was seen before it forgotten: others are coming now. Threads may share
    it.
    """

    def __init__(self, *, memory: float = 0.97, weight: float = 4.0, retry_every: int = 32) -> None:
        self._memory, self._weight, self._retry_every = memory, weight, retry_every
        self._counts: dict[Hashable, _Counts] = {}
        self._lock = threading.Lock()

    def record(self, policy: ExitPolicy, exit_layer: int) -> None:
        """A request has ended after so many layers."""
        whole = _whole(policy)
        key, layers = _key(whole), [check.layer for check in whole.checks]
        with self._lock:
            for other in self._counts.values():
                other.idle += 1
            if key is None:
                return
            counts = self._counts.get(key)
            if counts is None or (exit_layer in layers and counts.idle > self._retry_every):
                counts = self._counts[key] = _Counts(*np.zeros((2, len(layers))))
                if len(self._counts) > _MOST_POLICIES:
                    del self._counts[max(self._counts, key=lambda k: self._counts[k].idle)]
            counts.idle = 0
            counts.asked *= self._memory
            counts.left *= self._memory
            for place, check in enumerate(whole.checks):
                counts.asked[place] += check in policy.checks
                if check.layer == exit_layer and check in policy.checks:
                    counts.left[place] += 1.0
                    break

    def shares(self, policy: ExitPolicy, known: Sequence[float]) -> tuple[float, ...]:
        """The share of requests to expect at each check, from those known beforehand on."""
        with self._lock:
            counts = self._counts.get(_key(_whole(policy)))
            if counts is None or counts.idle >= self._retry_every:
                return tuple(known)
            # Of those that come to a check, the share that leaves there; then of all requests.
            gone = np.cumsum([0.0, *known])[:-1]
            asked = self._weight * (1.0 - gone) + counts.asked
            left = self._weight * np.asarray(known, np.float64) + counts.left
            leaving = np.divide(left, asked, out=np.zeros_like(left), where=asked > 1e-9)
            coming = np.cumprod([1.0, *(1.0 - leaving)])[:-1]
            return tuple((coming * leaving).tolist())


def _key(policy: ExitPolicy) -> Hashable | None:
    """Equal for equal decisions; None of policies that nobody plans by."""
    if isinstance(policy, ClassifierExit):
        return (policy.graph, policy.kind, policy.over_candidates, policy.threshold)
    if isinstance(policy, CombinedExit):
        return (_key(policy.answer), _key(policy.context))
    return None


def _whole(policy: ExitPolicy) -> ExitPolicy:
    """The policy that this one takes some checks of."""
    while isinstance(policy, SomeChecks):
        policy = policy.policy
    return policy
