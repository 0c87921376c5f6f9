"""Several texts at a time."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Protocol, TypeVar

from .backends import Backend
from .lockstep import Lockstep, Run
from .manifest import Manifest
from .profile import StageClock
from .session import Session
from .values import require_count

__all__ = ["BatchScheduler", "ContinuousBatching", "SessionSource", "TakeTurns", "Text"]

T = TypeVar("T")

# Begins a text on a session; it yields after every token, and returns its result.
Text = Callable[[Session], Run[T]]


class SessionSource(Protocol):
    """What texts run on: an engine."""

    @property
    def backend(self) -> Backend:
        """The loaded stages."""

    @property
    def manifest(self) -> Manifest:
        """Of the folder."""

    @property
    def clock(self) -> StageClock | None:
        """Measures stages, where that was asked for."""

    def borrow(self) -> AbstractContextManager[Session]:
        """An empty session."""


class BatchScheduler(Protocol):
    """Advances several texts; none gets another's tokens."""

    def run(self, texts: Sequence[Text[T]], source: SessionSource) -> list[T]:
        """Results in the order of the texts, each of which begins when there is room for it.

        Raises:
            what a text raises; the others are then closed.
        """


@dataclass(frozen=True)
class _Limited:
    """`at_once` texts are held at a time, each with a KV cache."""

    at_once: int = 8

    def __post_init__(self) -> None:
        require_count("at_once", self.at_once)


@dataclass(frozen=True)
class ContinuousBatching(_Limited):
    """Texts advance together: a pass carries a position of each, and reads its weights once.

    A text that exits early leaves the step's passes to the others, and one that ends makes room for
    the next. Prompts, and positions that were put off, pass one text at a time; so do texts without
    a neighbour at the same depth. A pass of several rows is not computed in the order that a pass
    of one is: where logits are all but equal, or a score all but at its threshold, tokens and exits
    may differ from those of the text alone. A back end that cannot share passes has its texts take
    turns.
    """

    def run(self, texts: Sequence[Text[T]], source: SessionSource) -> list[T]:
        """See `BatchScheduler.run`."""
        slots = min(self.at_once, len(texts))
        batch = source.backend.open_batch(slots) if slots > 1 else None
        if batch is None:
            return TakeTurns(self.at_once).run(texts, source)
        return Lockstep[T](source.backend, batch, slots, source.manifest, source.clock).run(texts)


@dataclass(frozen=True)
class TakeTurns(_Limited):
    """One token of each text, round after round, no pass shared: results are to the bit those of
    each text alone, and take as long.
    """

    def run(self, texts: Sequence[Text[T]], source: SessionSource) -> list[T]:
        """See `BatchScheduler.run`."""
        results: dict[int, T] = {}
        waiting = deque(enumerate(partial(_on_borrowed, source, text) for text in texts))
        running: deque[tuple[int, Run[T]]] = deque()
        try:
            while waiting or running:
                while waiting and len(running) < self.at_once:
                    place, start = waiting.popleft()
                    running.append((place, start()))
                place, text = running.popleft()
                try:
                    next(text)
                except StopIteration as end:
                    results[place] = end.value
                else:
                    running.append((place, text))
        finally:
            for _, text in running:
                text.close()
        return [results[place] for place in range(len(texts))]


def _on_borrowed(source: SessionSource, text: Text[T]) -> Run[T]:
    with source.borrow() as session:
        return (yield from text(session))
