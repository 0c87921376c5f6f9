"""Executes passes: stages in order, each over the positions that it has not seen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby

import numpy as np
import numpy.typing as npt

from .backends import Backend
from .kv_fill import KvFiller
from .ledger import KvState, Ledger, Pass, StageCost
from .manifest import Manifest, StageSpec

__all__ = ["Chain"]

Float32 = npt.NDArray[np.float32]

_KeyValue = tuple[Float32, Float32]

_KEPT_FIRST_TOKENS = 64


class Chain:
    """One sequence on a back end.

    Positions that stopped at a boundary keep their hidden state in `_pending`, one row per
    position; a deeper pass takes the rows it needs from there and carries them along.
    """

    def __init__(self, backend: Backend, manifest: Manifest) -> None:
        stages = manifest.layer_stages
        self._backend = backend
        self._buffers = backend.open_sequence()
        self._last_layers = tuple(stage.last_layer for stage in stages)
        self.ledger = Ledger(tuple(_cost(stage, manifest) for stage in stages))
        self._pending = self._buffers.pending
        self._tokens = np.zeros(manifest.max_seq_len, np.int64)
        self._first_tokens: dict[tuple[int, int], tuple[dict[int, _KeyValue], Float32]] = {}
        self.before_pass: Callable[[], None] | None = None

    @property
    def length(self) -> int:
        """Positions in the sequence."""
        return self.ledger.length

    @property
    def tokens(self) -> npt.NDArray[np.int64]:
        """Token ids of the sequence's positions."""
        return self._tokens[: self.length]

    def admit(self, tokens: npt.NDArray[np.int64]) -> None:
        """Adds positions; nothing is computed before `advance`."""
        start = self.length
        self._tokens[start : start + len(tokens)] = tokens
        for first in range(0, len(tokens), self._backend.max_rows):
            chunk = tokens[first : first + self._backend.max_rows]
            self._buffers.embed(chunk, start + first)
            rows = slice(start + first, start + first + len(chunk))
            self._pending[rows] = self._buffers.hidden(0, len(chunk))
        self.ledger.admit(len(tokens))

    def advance(self, layer: int, filler: KvFiller | None = None) -> None:
        """Brings every position through the layers up to the boundary `layer` (1 … L).

        Positions that wait on the way run along; with a filler they are filled instead, where it
        serves all of them.
        """
        stages = self._last_layers.index(layer) + 1
        waiting = self.ledger.waiting
        if filler is not None and self.ledger.filled[stages - 1] < waiting.stop:
            self._fill(waiting, filler)
        previous: Pass | None = None
        for todo in self.ledger.plan(stages, self._backend.max_rows):
            self._run(todo, previous)
            previous = todo
            if todo.last == stages - 1:
                self._pending[todo.start : todo.end] = self._output(todo)

    def can_translate(self, layer: int) -> bool:
        """Whether all positions that the layers above have not seen wait at this boundary."""
        above = self._last_layers.index(layer) + 1
        filled = self.ledger.filled
        return filled[above - 1] == self.length and filled[above] == filled[-1] < self.length

    def answers_over_context(
        self, layer: int, positions: Sequence[int], rows: int, filler: KvFiller
    ) -> Float32:
        """Final hidden states `[positions, hidden_size]` of ascending positions, each over a
        context before it that stopped at the boundary `layer`.

        The positions that wait there, up to the last asked for, get the filler's K,V in the layers
        above; the first token's are computed, for they depend on it alone. Then each position runs
        through those layers together with those right before it, `rows` in all. All of it is
        written where the exact K,V will stand, and counts as not filled: whoever goes deeper
        computes it anew.
        """
        above = self._last_layers.index(layer) + 1
        first, last = self.ledger.filled[-1], positions[-1]
        start = max(first, 1)
        rows = min(rows, self._backend.max_rows)
        tails = [min(position, max(start, position + 1 - rows)) for position in positions]
        if start < tails[-1]:
            upper = range(layer + 1, self._last_layers[-1] + 1)
            found, compute = filler.fill(layer, upper, self._pending[start : tails[-1]], start)
            for number, (key, value) in found.items():
                self._buffers.write_kv(number, start, key, value)
            self.ledger.record_probe(compute, 0)
        if first == 0 < last:
            self._place_first_token(layer, above)
        # From the last one down: a tail's own K,V take the place of filled ones, which the
        # positions before it do not see.
        answers = [
            self._run_aside(above, tail, position + 1)
            for tail, position in zip(reversed(tails), reversed(positions), strict=True)
        ]
        return np.stack(answers[::-1])

    def _fill(self, waiting: range, filler: KvFiller) -> None:
        groups = [
            (exit_layer, tuple(positions))
            for exit_layer, positions in groupby(waiting, key=self.depth)
        ]
        if not all(filler.serves(exit_layer) for exit_layer, _ in groups):
            return
        for exit_layer, positions in groups:
            start, end = positions[0], positions[-1] + 1
            if start == 0:
                # Every position attends to the first one: it is computed, which takes no other.
                above = self._last_layers.index(exit_layer) + 1
                self._pending[0] = self._place_first_token(exit_layer, above)
                self.ledger.fill(0, 1, None)
                start = 1
            if start < end:
                self._fill_alike(exit_layer, start, end, filler)

    def _fill_alike(self, exit_layer: int, start: int, end: int, filler: KvFiller) -> None:
        above = range(exit_layer + 1, self._last_layers[-1] + 1)
        found, compute = filler.fill(exit_layer, above, self._pending[start:end], start)
        for number, (key, value) in found.items():
            self._buffers.write_kv(number, start, key, value)
        self.ledger.fill(start, end, filler.kind, compute)

    def _place_first_token(self, layer: int, above: int) -> Float32:
        """K and V of position 0 above `layer`, and its final hidden state: a matter of its token
        alone, so they are kept.
        """
        key = (layer, int(self._tokens[0]))
        known = self._first_tokens.get(key)
        if known is None:
            hidden = self._run_aside(above, 0, 1)
            caches = {
                number: (k.copy(), v.copy())
                for number in range(layer + 1, self._last_layers[-1] + 1)
                for k, v in (self._buffers.kv(number, 1),)
            }
            known = caches, hidden
            if len(self._first_tokens) >= _KEPT_FIRST_TOKENS:
                self._first_tokens.clear()
            self._first_tokens[key] = known
        caches, hidden = known
        for number, (k, v) in caches.items():
            self._buffers.write_kv(number, 0, k, v)
        return hidden

    def _run_aside(self, above: int, start: int, end: int) -> Float32:
        """Final hidden state `[hidden_size]` of the last of some positions."""
        rows = end - start
        self._buffers.hidden(above, rows)[:] = self._pending[start:end]
        todo = Pass(above, len(self._last_layers) - 1, start, end)
        for stage in todo.stages:
            self._buffers.run_stage(stage, rows, start)
        self.ledger.record_aside(todo)
        final = self._buffers.hidden(len(self._last_layers), rows)[rows - 1]
        return np.array(final)

    def depth(self, position: int) -> int:
        """Layers that a position has been through (the boundary it stands at)."""
        stages = self.ledger.computed(position)
        return self._last_layers[stages - 1] if stages else 0

    def last_hidden(self) -> Float32:
        """Hidden state `[hidden_size]` of the last position, at the boundary it stands at."""
        return self._pending[self.length - 1]  # type: ignore[no-any-return]

    def hidden(self, start: int, end: int) -> Float32:
        """Hidden states `[end - start, hidden_size]`, each at the boundary it stands at."""
        return self._pending[start:end]

    def truncate(self, length: int) -> None:
        """Forgets positions from `length` on; pending ones before it stay pending."""
        self.ledger.truncate(length)

    def kv_states(self, layer: int) -> tuple[KvState, ...]:
        """What every position's K and V of a layer (1-based) are."""
        stage = self._stage_of(layer)
        return tuple(self.ledger.state(stage, position) for position in range(self.length))

    def kv(self, layer: int) -> tuple[Float32, Float32]:
        """K and V of a layer (1-based), cut to what is filled: `[kv_heads, filled, head_dim]`."""
        return self._buffers.kv(layer, self.ledger.filled[self._stage_of(layer)])

    def _stage_of(self, layer: int) -> int:
        return next(i for i, last in enumerate(self._last_layers) if layer <= last)

    def _run(self, todo: Pass, previous: Pass | None) -> None:
        rows, check = todo.end - todo.start, self.before_pass
        target = self._buffers.hidden(todo.first, rows)
        if previous is None or previous.last != todo.first - 1:
            target[:] = self._pending[todo.start : todo.end]
        elif previous.start > todo.start:
            # Positions that wait at this boundary come first; the carried rows move behind them.
            waiting = previous.start - todo.start
            target[waiting:] = self._buffers.hidden(todo.first, rows - waiting).copy()
            target[:waiting] = self._pending[todo.start : previous.start]
        stage = todo.first
        try:
            for stage in todo.stages:
                if check is not None:
                    check()
                self._buffers.run_stage(stage, rows, todo.start)
        except BaseException:
            if stage > todo.first:  # what was done before counts
                self.ledger.record(todo._replace(last=stage - 1))
            raise
        self.ledger.record(todo)

    def _output(self, done: Pass) -> Float32:
        return self._buffers.hidden(done.last + 1, done.end - done.start)


def _cost(stage: StageSpec, manifest: Manifest) -> StageCost:
    layers = range(stage.first_layer, stage.last_layer + 1)
    # Q·K and A·V, over all query heads.
    heads = sum(manifest.model.attention_heads(layer) for layer in layers)
    return StageCost(len(layers), stage.multiply_adds, 2 * heads * manifest.kv.head_dim)
