"""Whether the next token of a text looks at its exit points: what looks cost, and gain."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from .decode_costs import DecodeCosts

__all__ = ["Always", "ExitCosts", "Looks", "Paying"]


class Looks(Protocol):
    """Of one request; decides token by token."""

    def due(self) -> bool:
        """Whether the next token looks; where not, it runs every layer."""

    def record(self, exit_layer: int | None) -> None:
        """Where a token that looked has left (the model's depth: nowhere); None: it did not."""


class Always:
    """Every token looks, whatever that costs."""

    def due(self) -> bool:
        """Yes."""
        return True

    def record(self, exit_layer: int | None) -> None:
        """Nothing to learn."""


@dataclass(frozen=True)
class ExitCosts:
    """Expected cost of a token that looks at exit points, in layers of one row.

    Attributes:
        layers: the exit points', ascending.
        fills: approximate K and V are made for what is skipped; otherwise a later token runs the
            skipped layers too, in one pass with its own.
        confirmed: what leaves is looked at once more, with the full probe.
    """

    costs: DecodeCosts
    layers: tuple[int, ...]
    fills: bool = False
    confirmed: bool = False

    def token(self, shares: Sequence[float]) -> float:
        """Where these shares of tokens leave at each point."""
        costs = self.costs
        total, left, reached = costs.overhead, 1.0, 0
        for layer, share in zip(self.layers, shares, strict=True):
            total += left * (layer - reached + costs.exit_check)
            total += share * (costs.probe if self.confirmed else 0.0)
            total += share * (costs.layers - layer) * self._later_row(sum(shares))
            left, reached = left - share, layer
        return total + max(left, 0.0) * (costs.layers - reached + costs.probe)

    def _later_row(self, share: float) -> float:
        """A skipped layer's time in the pass of the token that goes deeper."""
        if self.fills:
            return 0.0  # a small part of a layer
        waiting = min(max(1, round(share / max(1.0 - share, 1e-6))), self.costs.rows[-1][0])
        return (self.costs.batch(waiting + 1) - 1.0) / waiting


class Paying:
    """Looks while that is expected to cost less than running every layer.

    It knows the share of tokens that left at each point, lately: every token weighs `memory` times
    as much as the one after it, and what is known beforehand counts as `weight` tokens. Where looks
    do not pay, one token looks at the start (the text's first, which always does) and every
    `retry_every` tokens, so that a text which is easy, or becomes so, is noticed; none where even
    leaving always at the first point would save less than `least_gain`.
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
        self._idle: int | None = None  # tokens since one that looked did not leave
        self._pays = self._may_pay and self._expected_to_pay()

    def due(self) -> bool:
        """See the class."""
        retry = self._idle is None or self._idle >= self._retry_every
        return self._pays or (self._may_pay and retry)

    def record(self, exit_layer: int | None) -> None:
        """Weighs in one more token."""
        if exit_layer is None:
            self._idle = None if self._idle is None else self._idle + 1
            return
        self._tokens = self._tokens * self._memory + 1.0
        self._left = self._left * self._memory
        if exit_layer in self._costs.layers:
            self._left[self._costs.layers.index(exit_layer)] += 1.0
        else:
            self._idle = 0
        self._pays = self._expected_to_pay()

    def _expected_to_pay(self) -> bool:
        shares = (self._left / self._tokens).tolist()
        return self._costs.token(shares) < self._costs.costs.token
