"""Which positions each layer has seen: the source of truth for exactness and for savings."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["LayerCount", "Ledger", "Pass"]


@dataclass(frozen=True)
class Pass:
    """Run layer stage `stage` (0-based) on the positions `start … end-1`."""

    stage: int
    start: int
    end: int


@dataclass(frozen=True)
class LayerCount:
    """Position-layers executed, against those of the dense model for the same positions."""

    executed: int
    dense: int

    @property
    def saved(self) -> float:
        """Share of layers saved: 1 − executed / dense; 0 where nothing was asked for."""
        return 1.0 - self.executed / self.dense if self.dense else 0.0

    def __sub__(self, other: LayerCount) -> LayerCount:
        return LayerCount(self.executed - other.executed, self.dense - other.dense)


class Ledger:
    """Filled lengths of one sequence under the `deferred` policy.

    `filled[s]` is the number of positions whose KV entries in stage s are exact; it never grows
    with depth: filled[s+1] ≤ filled[s] ≤ length. A position between the two is pending at the
    boundary after stage s, where its hidden state is kept.
    """

    def __init__(self, layers_per_stage: tuple[int, ...]) -> None:
        self._layers = layers_per_stage
        self._filled = [0] * len(layers_per_stage)
        self._length = 0
        self._executed = 0
        self._admitted = 0

    @property
    def length(self) -> int:
        """Positions that are part of the sequence."""
        return self._length

    @property
    def filled(self) -> tuple[int, ...]:
        """Exact positions per stage."""
        return tuple(self._filled)

    @property
    def count(self) -> LayerCount:
        """Counted since the sequence began; roll-backs give nothing back."""
        return LayerCount(self._executed, self._admitted * sum(self._layers))

    def admit(self, positions: int) -> None:
        """Adds positions that no layer has seen yet."""
        self._length += positions
        self._admitted += positions

    def plan(self, stages: int, max_rows: int) -> tuple[Pass, ...]:
        """Passes after which the first `stages` stages have seen every position.

        Pending positions go along with later ones, at most `max_rows` in a pass, and chunk by
        chunk: within a chunk stages follow each other, so that each finds its input in place.
        """
        passes: list[Pass] = []
        filled = list(self._filled[:stages])
        while filled and filled[-1] < self._length:
            end = min(self._length, filled[-1] + max_rows)
            for stage, start in enumerate(filled):
                if start < end:
                    passes.append(Pass(stage, start, end))
                    filled[stage] = end
        return tuple(passes)

    def record(self, done: Pass) -> None:
        """Notes that a pass was executed."""
        self._filled[done.stage] = done.end
        self._executed += (done.end - done.start) * self._layers[done.stage]

    def truncate(self, length: int) -> None:
        """Forgets positions from `length` on, in every layer."""
        self._length = length
        self._filled = [min(filled, length) for filled in self._filled]
