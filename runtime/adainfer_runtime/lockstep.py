"""Texts that advance together, so that one pass carries a position of each.

Each text runs as a greenlet of one thread, by the very code that runs it alone. Where that asks the
back end for a pass that others may share (a stage over one position, a probe), the text waits; when
all of them wait, those that stand lowest go on, together. A text that leaves at an exit point waits
at the next token's first stage until the others have come that far.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from contextvars import copy_context
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt
from greenlet import getcurrent, greenlet

from .backends import Backend, ProbeResult, SequenceBatch, SequenceBuffers
from .backends.base import Float32
from .manifest import Manifest
from .profile import StageClock
from .session import Session

__all__ = ["Lockstep", "Run"]

T = TypeVar("T")

# A text that yields after every token, and returns its result.
Run = Generator[Any, None, T]


@dataclass(frozen=True)
class _StagePass:
    """A wish for a layer stage over one position, behind `past` others."""

    stage: int
    past: int


@dataclass(frozen=True)
class _Probe:
    """A wish for the probe of `[hidden_size]`."""

    hidden: Float32


@dataclass(frozen=True)
class _Granted:
    """A wish that came true, in a pass of which `seconds` are the text's share."""

    seconds: float
    result: ProbeResult | None = None


class _Seat:
    """A text's place in the batch.

    Attributes:
        slot: where its cache lies.
        wish: what it waits for.
        progress: tokens so far, and how far the next one is; who has least goes first.
    """

    def __init__(self, slot: int, tokens: int) -> None:
        self._host = getcurrent()  # whoever advances the batch
        self.slot = slot
        self.waited = 0.0  # seconds that others' work took while the text wanted to go on
        self.wish: _StagePass | _Probe | None = None
        self.progress = (tokens, 0.0)

    def wait(self, wish: _StagePass | _Probe) -> _Granted:
        """Hands over to the host, until the wish has come true."""
        tokens, stage = self.progress
        # A probe comes right after the stage that its hidden state is of.
        after = float(wish.stage) if isinstance(wish, _StagePass) else int(stage) + 0.5
        self.progress = (tokens, after)
        self.wish = wish
        start, own = time.perf_counter(), 0.0
        try:
            granted: _Granted = self._host.switch()
            own = granted.seconds
        finally:  # a text that is closed has waited as well
            self.waited += time.perf_counter() - start - own
        return granted

    def count_token(self) -> None:
        """The text has one more."""
        self.progress = (self.progress[0] + 1, 0.0)


class _Text(Generic[T]):
    """A text, its seat, and the greenlet that it runs in."""

    def __init__(
        self, place: int, seat: _Seat, session: Session, start: Callable[[Session], Run[T]]
    ) -> None:
        self.place = place
        self.seat = seat
        self.session = session
        self.result: T
        self._start = start
        self._greenlet = greenlet(self._live)
        self._greenlet.gr_context = copy_context()  # what callers' callbacks read is there

    @property
    def ended(self) -> bool:
        """Whether `result` is there."""
        return bool(self._greenlet.dead)

    def go_on(self, granted: _Granted | None = None) -> None:
        """Runs until its next wish, or its end; raises what it raises."""
        self._greenlet.switch(granted)

    def close(self) -> None:
        """Ends it wherever it is."""
        if self._greenlet:  # it has begun, and not ended
            self._greenlet.throw(GeneratorExit)

    def _live(self, _: None) -> None:
        text = self._start(self.session)
        try:
            while True:
                next(text)
                self.seat.count_token()
        except StopIteration as end:
            self.result = end.value
        except GeneratorExit:
            return  # closed: there is no result


class Lockstep(Generic[T]):
    """Several texts on one batch of caches. For one `run`.

    Args:
        backend: for everything that is not shared.
        clock: told of every text's share of the passes that it was in.
    """

    def __init__(
        self,
        backend: Backend,
        batch: SequenceBatch,
        slots: int,
        manifest: Manifest,
        clock: StageClock | None = None,
    ) -> None:
        self._backend = backend
        self._batch = batch
        self._manifest = manifest
        self._clock = clock
        self._slots = slots
        self._free = set(range(slots))
        self._running: list[_Text[T]] = []

    def run(self, texts: Sequence[Callable[[Session], Run[T]]]) -> list[T]:
        """Results in the order of the texts; each starts when there is a slot for it.

        Raises:
            what a text raises; the others are then closed.
        """
        results: dict[int, T] = {}
        waiting = deque(enumerate(texts))
        try:
            while waiting or self._running:
                while waiting and self._free:
                    self._begin(*waiting.popleft())
                self._advance()
                for text in [text for text in self._running if text.ended]:
                    results[text.place] = text.result
                    self._running.remove(text)
                    self._free.add(text.seat.slot)
                if not waiting:
                    self._close_ranks()
        finally:
            with ExitStack() as stack:  # every one is closed, whatever the others raise
                for text in self._running:
                    stack.callback(text.close)
        return [results[place] for place in range(len(texts))]

    def _begin(self, place: int, start: Callable[[Session], Run[T]]) -> None:
        # A newcomer that counted from 0 would have all others wait until it caught up.
        tokens = min((text.seat.progress[0] for text in self._running), default=0)
        seat = _Seat(min(self._free), tokens)
        self._free.remove(seat.slot)
        backend = _SeatBackend(self._backend, self._batch, seat, self._clock)
        session = Session(backend, self._manifest, lambda: seat.waited, self._slots)
        text = _Text(place, seat, session, start)
        self._running.append(text)
        text.go_on()

    def _advance(self) -> None:
        """Makes the wish of the least advanced text come true, and of all who share it."""
        running = [text for text in self._running if not text.ended]
        if not running:
            return
        first = min(running, key=lambda text: text.seat.progress).seat.wish
        start = time.perf_counter()
        if isinstance(first, _StagePass):
            passes = [
                (text, wish)
                for text in running
                if isinstance(wish := text.seat.wish, _StagePass) and wish.stage == first.stage
            ]
            self._run_stage(first.stage, {text.seat.slot: wish.past for text, wish in passes})
            granted: list[tuple[_Text[T], ProbeResult | None]]
            granted = [(text, None) for text, _ in passes]
        else:
            probes = [
                (text, wish.hidden)
                for text in running
                if isinstance(wish := text.seat.wish, _Probe)
            ]
            results = self._batch.probe(np.stack([hidden for _, hidden in probes]))
            granted = [(text, result) for (text, _), result in zip(probes, results, strict=True)]
        share = (time.perf_counter() - start) / len(granted)
        for text, result in granted:
            text.go_on(_Granted(share, result))

    def _run_stage(self, stage: int, pasts: Mapping[int, int]) -> None:
        """A stage for the slots that have `pasts`: neighbours share a pass."""
        ranked = enumerate(sorted(pasts))
        for _, neighbours in groupby(ranked, key=lambda rank_slot: rank_slot[1] - rank_slot[0]):
            slots = [slot for _, slot in neighbours]
            if len(slots) == 1:
                self._batch.sequence(slots[0]).run_stage(stage, 1, pasts[slots[0]])
            else:
                self._batch.run_stage(stage, slots[0], [pasts[slot] for slot in slots])

    def _close_ranks(self) -> None:
        """No more texts will come: those that are left move together, for only neighbours share
        passes.
        """
        for text in sorted(self._running, key=lambda text: -text.seat.slot):
            free = min(self._free, default=text.seat.slot)
            if free >= text.seat.slot:
                return
            self._batch.move(text.seat.slot, free, text.session.length)
            self._free.remove(free)
            self._free.add(text.seat.slot)
            text.seat.slot = free


class _SeatBackend:
    """See `backends.Backend`: a text's view of it, that waits where passes may be shared."""

    def __init__(
        self, inner: Backend, batch: SequenceBatch, seat: _Seat, clock: StageClock | None
    ) -> None:
        self._inner = inner
        self._batch = batch
        self._seat = seat
        self._clock = clock
        self.max_rows = inner.max_rows
        self.open_batch = inner.open_batch
        self.wait = inner.wait
        self.close = inner.close
        self.probe_candidates = inner.probe_candidates
        self.shortlist = inner.shortlist
        self.probe_logits = inner.probe_logits
        self.probe_features = inner.probe_features
        self.adapt = inner.adapt
        self.translate = inner.translate
        self.kv_fill = inner.kv_fill
        self.classify = inner.classify

    def open_sequence(self) -> SequenceBuffers:
        """The seat's."""
        return _SeatBuffers(self._batch.sequence(self._seat.slot), self)

    def probe(self, hidden: Float32) -> ProbeResult:
        """With others' probes."""
        result = self.shared("probe", _Probe(hidden)).result
        if result is None:
            raise AssertionError("a probe has a result")
        return result

    def shared(self, kind: str, wish: _StagePass | _Probe) -> _Granted:
        """A wish that came true."""
        granted = self._seat.wait(wish)
        if self._clock is not None:
            self._clock.add(kind, granted.seconds)
        return granted

    def alone(self, kind: str) -> AbstractContextManager[None]:
        """Measures a pass of this text alone."""
        return nullcontext() if self._clock is None else self._clock.measure(kind)


class _SeatBuffers:
    """See `backends.SequenceBuffers`."""

    def __init__(self, inner: SequenceBuffers, seat: _SeatBackend) -> None:
        self._inner = inner
        self._seat = seat
        self.pending = inner.pending
        self.hidden = inner.hidden
        self.write_kv = inner.write_kv
        self.kv = inner.kv

    def embed(self, tokens: npt.NDArray[np.int64], start: int) -> None:
        with self._seat.alone("embed"):
            self._inner.embed(tokens, start)

    def run_stage(self, index: int, rows: int, past: int) -> None:
        if rows == 1:
            self._seat.shared("layers", _StagePass(index, past))
            return
        with self._seat.alone("layers"):
            self._inner.run_stage(index, rows, past)
