"""What requests did at exit points lately: held-out shares are of other prompts than these."""

from __future__ import annotations

import threading
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..exit_policy import ClassifierExit, CombinedExit, ExitPolicy

__all__ = ["RecentExits"]

_MOST_POLICIES = 64  # requests may bring thresholds of their own: those asked least lately go


@dataclass
class _Counts:
    """Of one policy; `idle` counts requests since one that asked it."""

    left: npt.NDArray[np.float64]
    asked: float = 0.0
    idle: int = 0


class RecentExits:
    """Of one engine, for each exit policy: how many requests asked it, and left at which check.

    A request weighs `memory` times as much as the one after it, and what was known beforehand
    counts as `weight` requests. A policy that `retry_every` requests passed over is worth one try,
    and a request that leaves then makes what was seen before it forgotten: others are coming now.
    Threads may share it.
    """

    def __init__(self, *, memory: float = 0.97, weight: float = 4.0, retry_every: int = 32) -> None:
        self._memory, self._weight, self._retry_every = memory, weight, retry_every
        self._counts: dict[Hashable, _Counts] = {}
        self._lock = threading.Lock()

    def record(self, policy: ExitPolicy, exit_layer: int) -> None:
        """A request has ended after so many layers."""
        key, layers = _key(policy), [check.layer for check in policy.checks]
        with self._lock:
            for other in self._counts.values():
                other.idle += 1
            if key is None:
                return
            counts = self._counts.get(key)
            if counts is None or (exit_layer in layers and counts.idle > self._retry_every):
                counts = self._counts[key] = _Counts(np.zeros(len(layers)))
                if len(self._counts) > _MOST_POLICIES:
                    del self._counts[max(self._counts, key=lambda k: self._counts[k].idle)]
            counts.idle = 0
            counts.asked = counts.asked * self._memory + 1.0
            counts.left *= self._memory
            if exit_layer in layers:
                counts.left[layers.index(exit_layer)] += 1.0

    def shares(self, policy: ExitPolicy, known: Sequence[float]) -> tuple[float, ...]:
        """The share of requests to expect at each check, from those known beforehand on."""
        with self._lock:
            counts = self._counts.get(_key(policy))
            if counts is None or counts.idle >= self._retry_every:
                return tuple(known)
            left = self._weight * np.asarray(known, np.float64) + counts.left
            return tuple((left / (self._weight + counts.asked)).tolist())


def _key(policy: ExitPolicy) -> Hashable | None:
    """Equal for equal decisions; None of policies that nobody plans by."""
    if isinstance(policy, ClassifierExit):
        return (policy.graph, policy.kind, policy.over_candidates, policy.threshold)
    if isinstance(policy, CombinedExit):
        return (_key(policy.answer), _key(policy.context))
    return None
