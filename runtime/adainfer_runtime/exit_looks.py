"""At which exit points the next token of a text looks: what looks cost, and gain."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Protocol

import numpy as np
import numpy.typing as npt

from .decode_costs import DecodeCosts
from .exit_policy import ExitPolicy, NoExit, SomeChecks
from .kv_fill import KvPolicy

__all__ = ["Always", "ExitCosts", "Looks", "Paying"]


class Looks(Protocol):
    """Of one request; decides token by token."""

    def narrow(self, policy: ExitPolicy) -> ExitPolicy:
        """The policy of the next token: this one, at some of its exit points or at none."""

    def record(self, exit_layer: int | None) -> None:
        """Where a token that looked has left (the model's depth: nowhere); None: it did not."""


class Always:
    """Every token looks at every exit point, whatever that costs."""

    def narrow(self, policy: ExitPolicy) -> ExitPolicy:
        """As it is."""
        return policy

    def record(self, exit_layer: int | None) -> None:
        """Nothing to learn."""


@dataclass(frozen=True)
class ExitCosts:
    """Expected cost of a token that looks at exit points, in layers of one row.

    Attributes:
        layers: the exit points', ascending.
        kv_policy: whether approximate K and V are made for what is skipped, and at which price;
            under `deferred`, and at exit points that the policy does not serve, a later token runs
            the skipped layers too, in one pass with its own.
        confirmed: what leaves is looked at once more, with the full probe.
    """

    costs: DecodeCosts
    layers: tuple[int, ...]
    kv_policy: KvPolicy = "deferred"
    confirmed: bool = False

    def cheapest(self, shares: Sequence[float]) -> tuple[ExitCosts, tuple[float, ...]]:
        """The exit points that are worth a look, none where nothing pays, and the shares there.

        Tokens that would leave at a point which is left out leave at the next that is not. So what
        is spent between two neighbouring points depends on these two alone, but for the price of
        skipped layers, which depends on how many leave in all, that is on the last point: a dynamic
        program over the points, for every last one.
        """
        gone = (0.0, *accumulate(shares))
        best, chosen = self.costs.token, tuple[int, ...]()
        for last in range(1, len(self.layers) + 1):
            spent, points = self._path(last, gone)
            total = self.costs.overhead * self.costs.share + spent
            total += (1.0 - gone[last]) * self._to_the_end(self.layers[last - 1])
            if total < best:
                best, chosen = total, points
        layers = tuple(self.layers[point - 1] for point in chosen)
        ends = (0.0, *(gone[point] for point in chosen))
        moved = tuple(end - start for start, end in pairwise(ends))
        return replace(self, layers=layers), moved

    def _path(self, last: int, gone: tuple[float, ...]) -> tuple[float, tuple[int, ...]]:
        """Least cost up to the look at point `last` (from 1), and the points that are looked at."""
        depths = (0, *self.layers)
        found: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
        for point in range(1, last + 1):
            leaving = self._leaving(depths[point], gone[last])
            options = (
                (
                    spent
                    + (1.0 - gone[before]) * self._to(depths[point], depths[before])
                    + (gone[point] - gone[before]) * leaving,
                    (*points, point),
                )
                for before, (spent, points) in enumerate(found)
            )
            found.append(min(options))
        return found[last]

    def token(self, shares: Sequence[float]) -> float:
        """Where these shares of tokens leave at each point."""
        costs, gone = self.costs, sum(shares)
        total, left, reached = costs.overhead * costs.share, 1.0, 0
        for layer, share in zip(self.layers, shares, strict=True):
            total += left * self._to(layer, reached) + share * self._leaving(layer, gone)
            left, reached = left - share, layer
        return total + max(left, 0.0) * self._to_the_end(reached)

    def _to(self, layer: int, reached: int) -> float:
        """The way to an exit point, and the look there."""
        return (layer - reached) * self.costs.share + self.costs.exit_check

    def _to_the_end(self, reached: int) -> float:
        costs = self.costs
        return (costs.layers - reached + costs.probe) * costs.share

    def _leaving(self, layer: int, gone: float) -> float:
        """What a token that leaves still costs, where so many leave in all."""
        confirming = self.costs.probe * self.costs.share if self.confirmed else 0.0
        return confirming + self._skipped(layer, gone)

    def _skipped(self, layer: int, gone: float) -> float:
        """What the layers above cost once a token goes deeper, for one of those that wait for it:
        so many as leave one after another.
        """
        costs = self.costs
        waiting = min(max(1, round(gone / max(1.0 - gone, 1e-6))), costs.rows[-1][0])
        fill = costs.fill(self.kv_policy, layer, waiting)
        if fill is not None:
            return fill
        return (costs.layers - layer) * (costs.batch(waiting + 1) - costs.share) / waiting


class Paying:
    """Looks where that is expected to cost less than running every layer.

    It knows the share of tokens that left at each point, lately: every token weighs `memory` times
    as much as the one after it, and what is known beforehand counts as `weight` tokens. From these
    shares follows at which points to look (`ExitCosts.cheapest`). Where none pays, one token looks
    at the start (the text's first, which always does) and every `retry_every` tokens, so that a
    text which is easy, or becomes so, is noticed; none where even leaving always at the first point
    would save less than `least_gain`. As often all points are looked at where only some pay.
    """

    def __init__(
        self,
        costs: ExitCosts,
        shares: Sequence[float],
        *,
        weight: float = 4.0,
        memory: float = 0.97,
        retry_every: int = 64,
        least_gain: float = 0.05,
    ) -> None:
        self._costs = costs
        self._memory = memory
        self._retry_every = retry_every
        self._tokens = weight
        self._left: npt.NDArray[np.float64] = weight * np.asarray(shares, np.float64)
        best = (1.0, *(0.0 for _ in costs.layers[1:]))
        full = costs.costs.token
        self._may_pay = costs.token(best) < (1.0 - least_gain) * full
        self._since_all: float = (
            math.inf
        )  # tokens since one that looked everywhere, and did not leave
        self._points: frozenset[int] = self._paying() if self._may_pay else frozenset()

    def narrow(self, policy: ExitPolicy) -> ExitPolicy:
        """See the class."""
        if not self._may_pay:
            return NoExit()
        if self._since_all >= self._retry_every:
            if self._points:
                self._since_all = 0
            return policy
        checks = tuple(check for check in policy.checks if check.layer in self._points)
        return SomeChecks(policy, checks) if checks else NoExit()

    def record(self, exit_layer: int | None) -> None:
        """Weighs in one more token."""
        self._since_all += 1
        if exit_layer is None:
            return
        self._tokens = self._tokens * self._memory + 1.0
        self._left = self._left * self._memory
        if exit_layer in self._costs.layers:
            self._left[self._costs.layers.index(exit_layer)] += 1.0
        elif not self._points:
            self._since_all = 0
        self._points = self._paying()

    def _paying(self) -> frozenset[int]:
        chosen, _ = self._costs.cheapest((self._left / self._tokens).tolist())
        return frozenset(chosen.layers)
