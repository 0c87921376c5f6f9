"""Several texts at a time."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from .errors import RequestError

__all__ = ["BatchScheduler", "TakeTurns", "drain"]

T = TypeVar("T")

# A text that yields after every token, and returns its result.
Run = Generator[Any, None, T]


class BatchScheduler(Protocol):
    """Advances several texts; what comes out of each does not depend on the others."""

    def run(self, begin: Sequence[Callable[[], Run[T]]]) -> list[T]:
        """Results in the order of the texts.

        Args:
            begin: starts a text; called when there is room for it.

        Raises:
            what a text raises; the others are then closed.
        """


@dataclass(frozen=True)
class TakeTurns:
    """One token of each text, round after round, every text on a session of its own.

    Passes of different texts are not put together: their attention has to run apart (ONNX Runtime
    takes several new positions with a past only at batch 1), and they stand at different depths.
    Texts that end make room for the next, so that at most `at_once` KV caches are held.
    """

    at_once: int = 8

    def __post_init__(self) -> None:
        if self.at_once < 1:
            raise RequestError(f"at_once must be at least 1, found {self.at_once}")

    def run(self, begin: Sequence[Callable[[], Run[T]]]) -> list[T]:
        """See `BatchScheduler.run`."""
        results: dict[int, T] = {}
        waiting = deque(enumerate(begin))
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
        return [results[place] for place in range(len(begin))]


def drain(text: Run[T]) -> T:
    """One text alone, to its end."""
    while True:
        try:
            next(text)
        except StopIteration as end:
            result: T = end.value
            return result
