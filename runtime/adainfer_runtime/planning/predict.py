"""Expected seconds of a request, from measured stage times and the exits' shares."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..exit_policy import ExitCheck
from ..kv_fill import KvPolicy
from ..plan_spec import StageTimes

__all__ = ["RequestShape", "TimePredictor", "at_rows"]


def at_rows(count: int, rows: Sequence[int], measured: Sequence[float]) -> float:
    """What was measured at these numbers of rows, at another: interpolated, and beyond the largest
    in proportion.
    """
    return float(np.interp(count, rows, measured)) * max(1.0, count / rows[-1])


@dataclass(frozen=True)
class RequestShape:
    """What of a request its time depends on.

    Attributes:
        candidates: the answer is one of a few tokens.
        reused_tokens: of the prompt, that the KV cache holds already.
        kv_policy: where the prompt stops early, the second token pays for what it left out:
            `deferred` for its layers, other policies for approximate keys and values.
    """

    prompt_tokens: int
    new_tokens: int = 1
    candidates: bool = False
    reused_tokens: int = 0
    kv_policy: KvPolicy = "deferred"

    @property
    def read(self) -> int:
        """Positions of the prompt that are computed."""
        return self.prompt_tokens - self.reused_tokens


@dataclass(frozen=True)
class TimePredictor:
    """Adds up stage times.

    Attributes:
        max_rows: positions that one pass carries.
    """

    times: StageTimes
    num_layers: int
    max_rows: int

    def off(self, shape: RequestShape, later: float = 1.0) -> float:
        """Every layer for every position.

        Args:
            later: time of a token after the first, as a share of the full model's.
        """
        prompt = self._prompt(self.num_layers, shape) + self._probe(shape)
        return self._embed(shape.read) + prompt + later * self._decode(shape)

    def exits(
        self,
        checks: Sequence[ExitCheck],
        shares: Sequence[float],
        shape: RequestShape,
        *,
        over_candidates: bool = False,
    ) -> float:
        """With checks at which these shares of requests stop. Tokens after the first take what they
        take in mode off: what answers did says little of them.

        Args:
            over_candidates: looks read the candidates' rows of the head alone.
        """
        total, left, reached = self._embed(shape.read), 1.0, 0
        for check, share in zip(checks, shares, strict=True):
            total += left * self._prompt(check.layer - reached, shape)
            total += left * self.check(check, shape, over_candidates=over_candidates)
            left, reached = left - share, check.layer
            if shape.new_tokens > 1:
                total += share * self._owed(reached, shape)
        rest = self._prompt(self.num_layers - reached, shape) + self._probe(shape)
        return total + max(left, 0.0) * rest + self._decode(shape)

    def knows(self, checks: Sequence[ExitCheck]) -> bool:
        """Whether all of them were measured: context exits may be newer than the times."""
        return all(check.kind == "answer" or check.layer in self.times.context for check in checks)

    def check(
        self, check: ExitCheck, shape: RequestShape, *, over_candidates: bool = False
    ) -> float:
        """One look at an exit point."""
        times = self.times
        if check.kind == "answer":
            probe = times.candidates if over_candidates else times.probe
            return times.adapter + probe + times.classifier
        seconds = at_rows(shape.read, times.context_rows, times.context[check.layer])
        return seconds + times.probe + times.classifier

    def fill(self, policy: KvPolicy, exit_layer: int, positions: int) -> float | None:
        """Approximate K and V of all layers above an exit layer; None where a later token runs
        these layers instead. Of plans that did not measure it 0: it is a small part of the layers.
        """
        measured = self.times.fills
        if policy == "deferred":
            return None
        if measured is None:
            return 0.0
        if policy == "propagate":
            above = self.num_layers - exit_layer
            known = tuple(above * seconds for seconds in measured.propagate)
        else:
            known = measured.translated.get(exit_layer, ())
        return at_rows(positions, measured.rows, known) if known else None

    def layers(self, count: int, positions: int, past: int = 0) -> float:
        """`count` layers over positions that follow `past` others, in as many passes as needed."""
        seconds = 0.0
        for start in range(0, positions, self.max_rows):
            rows = min(self.max_rows, positions - start)
            pair = self.times.pair_one if rows == 1 else self.times.pair_many
            alone = float(np.interp(rows, self.times.rows, self.times.layer))
            seconds += alone + pair * rows * (past + start)
        return count * seconds

    def _prompt(self, count: int, shape: RequestShape) -> float:
        return self.layers(count, shape.read, shape.reused_tokens)

    def _owed(self, exit_layer: int, shape: RequestShape) -> float:
        """What the second token pays for a prompt that stopped there."""
        filled = self.fill(shape.kv_policy, exit_layer, shape.read)
        return self._prompt(self.num_layers - exit_layer, shape) if filled is None else filled

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
