"""Which positions each layer has seen: the source of truth for exactness and for savings."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

__all__ = ["FillKind", "KvState", "Ledger", "Pass", "StageCost", "WorkCount"]

FillKind = Literal["propagated", "translated"]
KvState = Literal["exact", "propagated", "translated", "pending"]


class Pass(NamedTuple):
    """Run the layer stages `first … last` (0-based), one after the other, on the positions
    `start … end-1`.
    """

    first: int
    last: int
    start: int
    end: int

    @property
    def stages(self) -> range:
        """Those that it runs."""
        return range(self.first, self.last + 1)


@dataclass(frozen=True)
class StageCost:
    """What a stage costs.

    Attributes:
        layers: decoder layers in it.
        per_position: multiply-adds of its weights, for one position.
        per_pair: multiply-adds of its attention, for one position and one that it attends to.
    """

    layers: int
    per_position: int = 0
    per_pair: int = 0

    @classmethod
    def sum(cls, stages: Iterable[StageCost]) -> StageCost:
        """What all of them cost."""
        costs = [(stage.layers, stage.per_position, stage.per_pair) for stage in stages]
        return cls(*(sum(column) for column in zip(*costs, strict=True)))

    def multiply_adds(self, start: int, end: int) -> int:
        """Of the positions `start … end-1`, each attending to itself and all before it."""
        pairs = (end * (end + 1) - start * (start + 1)) // 2
        return (end - start) * self.per_position + pairs * self.per_pair


@dataclass(frozen=True)
class WorkCount:
    """Work done, against that of the dense model for the same positions and predictions.

    Attributes:
        executed, dense: position-layers.
        compute, dense_compute: multiply-adds, adapters, probes and fills included; the dense model
            needs one probe per prediction.
        deferred: position-layers among `executed` that were made up for positions older than
            those that came last.
        filled: position-layers that were given approximate K and V instead of being executed.
    """

    executed: int
    dense: int
    compute: int = 0
    dense_compute: int = 0
    deferred: int = 0
    filled: int = 0

    @property
    def layers_saved(self) -> float:
        """1 − executed / dense; 0 where nothing was asked for."""
        return 1.0 - self.executed / self.dense if self.dense else 0.0

    @property
    def compute_saved(self) -> float:
        """1 − compute / dense_compute; 0 where nothing was asked for."""
        return 1.0 - self.compute / self.dense_compute if self.dense_compute else 0.0

    @property
    def unfinished(self) -> WorkCount:
        """The same of work that was given up: what was not done of it is no saving."""
        return replace(self, dense=self.executed, dense_compute=self.compute)

    def __add__(self, other: WorkCount) -> WorkCount:
        return WorkCount(
            self.executed + other.executed,
            self.dense + other.dense,
            self.compute + other.compute,
            self.dense_compute + other.dense_compute,
            self.deferred + other.deferred,
            self.filled + other.filled,
        )

    def __sub__(self, other: WorkCount) -> WorkCount:
        return WorkCount(
            self.executed - other.executed,
            self.dense - other.dense,
            self.compute - other.compute,
            self.dense_compute - other.dense_compute,
            self.deferred - other.deferred,
            self.filled - other.filled,
        )


class Ledger:
    """Filled lengths of one sequence, and how entries came about.

    `filled[s]` is the number of positions whose KV entries stand in stage s; it never grows
    with depth: filled[s+1] ≤ filled[s] ≤ length. A position between the two is pending at the
    boundary after stage s, where its hidden state is kept. Entries are exact where the stage's own
    layers computed them, over what stood before them; otherwise `fill` was told what they are.
    Whoever is filled is filled to the last stage: its hidden state there is not known.
    """

    def __init__(self, stages: tuple[StageCost, ...]) -> None:
        self._stages = stages
        self._all_stages = StageCost.sum(stages)
        self._sums: dict[tuple[int, int], StageCost] = {}
        self._filled = [0] * len(stages)
        self._length = 0
        self._newest = 0  # first of the positions that came last
        # Plain numbers, of which `count` makes a record: every pass of every stage adds to them.
        self._executed = self._dense = 0
        self._compute = self._dense_compute = 0
        self._deferred = self._given = 0
        self._stopped = 0
        # Positions with approximate entries: from which stage on, to the last, and how.
        self._approximate: dict[int, tuple[int, FillKind]] = {}

    @property
    def length(self) -> int:
        """Positions that are part of the sequence."""
        return self._length

    @property
    def filled(self) -> tuple[int, ...]:
        """Positions with entries, per stage."""
        return tuple(self._filled)

    @property
    def count(self) -> WorkCount:
        """Counted since the sequence began; `truncate` gives nothing back."""
        return WorkCount(
            self._executed,
            self._dense,
            self._compute,
            self._dense_compute,
            self._deferred,
            self._given,
        )

    @property
    def exact_length(self) -> int:
        """Positions from the first on of which no entry is approximate."""
        return min(self._approximate, default=self._length)

    @property
    def waiting(self) -> range:
        """Positions that stopped early and are not the last: nobody will ask for more of them."""
        return range(self._filled[-1], min(self._stopped, self._length - 1))

    def computed(self, position: int) -> int:
        """Stages that a position has been through: the boundary that its hidden state is of."""
        if position in self._approximate:
            return self._approximate[position][0]
        return sum(filled > position for filled in self._filled)

    def state(self, stage: int, position: int) -> KvState:
        """What a position's KV entries in a stage are."""
        if position >= self._filled[stage]:
            return "pending"
        first, kind = self._approximate.get(position, (len(self._stages), "propagated"))
        return kind if stage >= first else "exact"

    def stop(self) -> None:
        """Notes that there is a prediction after the last position."""
        self._stopped = self._length

    def admit(self, positions: int) -> None:
        """Adds positions that no layer has seen yet."""
        start, end = self._length, self._length + positions
        self._length, self._newest = end, start
        self._dense += positions * self._all_stages.layers
        self._dense_compute += self._all_stages.multiply_adds(start, end)

    def plan(self, stages: int, max_rows: int) -> tuple[Pass, ...]:
        """Passes after which the first `stages` stages have seen every position.

        Pending positions go along with later ones, at most `max_rows` in a pass, and chunk by
        chunk: within a chunk stages follow each other, so that each finds its input in place.
        """
        passes: list[Pass] = []
        filled = self._filled[:stages]
        while filled and filled[-1] < self._length:
            end = min(self._length, filled[-1] + max_rows)
            first = 0
            while first < stages:
                start = filled[first]
                behind = first + filled.count(start)  # neighbours: it never grows with depth
                if start < end:
                    passes.append(Pass(first, behind - 1, start, end))
                    filled[first:behind] = [end] * (behind - first)
                first = behind
        return tuple(passes)

    def record(self, done: Pass) -> None:
        """Notes that a pass was executed."""
        for stage in done.stages:
            self._filled[stage] = done.end
        older = max(0, min(done.end, self._newest) - done.start)
        if older:
            self._deferred += older * self._cost(done).layers
        self.record_aside(done)

    def record_aside(self, todo: Pass) -> None:
        """Notes a pass whose K,V are not to be kept: nothing counts as filled by it."""
        cost = self._cost(todo)
        self._executed += (todo.end - todo.start) * cost.layers
        self._compute += cost.multiply_adds(todo.start, todo.end)

    def _cost(self, todo: Pass) -> StageCost:
        stages = todo.first, todo.last
        known = self._sums.get(stages)
        if known is None:
            known = self._sums[stages] = StageCost.sum(self._stages[n] for n in todo.stages)
        return known

    def fill(self, start: int, end: int, kind: FillKind | None, compute: int = 0) -> None:
        """Notes that positions which waited at the same boundary now have entries in every stage:
        approximate ones, or (None) exact ones that were computed aside.

        Args:
            start: the first position that waits.
        """
        first = self.computed(start)
        for stage in range(first, len(self._stages)):
            self._filled[stage] = max(self._filled[stage], end)
        if kind is not None:
            self._approximate.update(dict.fromkeys(range(start, end), (first, kind)))
            layers = sum(stage.layers for stage in self._stages[first:])
            self._compute += compute
            self._given += (end - start) * layers

    def record_probe(self, compute: int, dense_compute: int) -> None:
        """Notes multiply-adds outside of layers, and what the dense model needs instead."""
        self._compute += compute
        self._dense_compute += dense_compute

    def truncate(self, length: int) -> None:
        """Forgets positions from `length` on, in every layer."""
        self._length, self._newest = length, min(length, self._newest)
        self._filled = [min(filled, length) for filled in self._filled]
        self._stopped = min(self._stopped, length)
        self._approximate = {p: how for p, how in self._approximate.items() if p < length}

    def withdraw(self, length: int) -> None:
        """Takes back positions from `length` on that were guesses: nobody asked for them, and the
        dense model would not have run them. What they executed stays counted.
        """
        positions = self._length - length
        self._dense -= positions * self._all_stages.layers
        self._dense_compute -= self._all_stages.multiply_adds(length, self._length)
        self.truncate(length)
