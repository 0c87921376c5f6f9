"""Expected seconds of a request, from measured stage times and the exits' shares."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..exit_policy import ExitCheck
from ..plan_spec import StageTimes

__all__ = ["RequestShape", "TimePredictor"]


@dataclass(frozen=True)
class RequestShape:
    """What of a request its time depends on.

    Attributes:
        candidates: the answer is one of a few tokens, whose rows of the head alone are read.
    """

    prompt_tokens: int
    new_tokens: int = 1
    candidates: bool = False


@dataclass(frozen=True)
class TimePredictor:
    """Adds up stage times.

    Attributes:
        max_rows: positions that one pass carries.
    """

    times: StageTimes
    num_layers: int
    max_rows: int

    def off(self, shape: RequestShape) -> float:
        """Every layer for every position."""
        prompt = self.layers(self.num_layers, shape.prompt_tokens) + self._probe(shape)
        return self._embed(shape.prompt_tokens) + prompt + self._decode(shape)

    def exits(
        self, checks: Sequence[ExitCheck], shares: Sequence[float], shape: RequestShape
    ) -> float:
        """With checks at which these shares of requests stop.

        After an early answer the context still owes its upper layers: under the `deferred` policy
        the second token pays them.
        """
        total, left, reached = self._embed(shape.prompt_tokens), 1.0, 0
        for check, share in zip(checks, shares, strict=True):
            total += left * self.layers(check.layer - reached, shape.prompt_tokens)
            total += left * self.check(check, shape)
            left, reached = left - share, check.layer
            if shape.new_tokens > 1:
                total += share * self.layers(self.num_layers - reached, shape.prompt_tokens)
        rest = self.layers(self.num_layers - reached, shape.prompt_tokens) + self._probe(shape)
        return total + max(left, 0.0) * rest + self._decode(shape)

    def check(self, check: ExitCheck, shape: RequestShape) -> float:
        """One look at an exit point."""
        times = self.times
        if check.kind == "answer":
            return times.adapter + self._probe(shape) + times.classifier
        seconds = float(
            np.interp(shape.prompt_tokens, times.context_rows, times.context[check.layer])
        )
        beyond = shape.prompt_tokens / times.context_rows[-1]
        return seconds * max(1.0, beyond) + times.probe + times.classifier

    def layers(self, count: int, positions: int, past: int = 0) -> float:
        """`count` layers over positions that follow `past` others, in as many passes as needed."""
        seconds = 0.0
        for start in range(0, positions, self.max_rows):
            rows = min(self.max_rows, positions - start)
            pair = self.times.pair_one if rows == 1 else self.times.pair_many
            alone = float(np.interp(rows, self.times.rows, self.times.layer))
            seconds += alone + pair * rows * (past + start)
        return count * seconds

    def _embed(self, positions: int) -> float:
        whole, rest = divmod(positions, self.max_rows)
        times = self.times
        full = float(np.interp(self.max_rows, times.rows, times.embed))
        return whole * full + (float(np.interp(rest, times.rows, times.embed)) if rest else 0.0)

    def _probe(self, shape: RequestShape) -> float:
        return self.times.candidates if shape.candidates else self.times.probe

    def _decode(self, shape: RequestShape) -> float:
        """The tokens after the first, each over a past that grows."""
        more = shape.new_tokens - 1
        if more < 1:
            return 0.0
        beyond = shape.prompt_tokens + more // 2 - self.times.step_past
        return more * (self.times.step + self.num_layers * self.times.pair_one * beyond)
