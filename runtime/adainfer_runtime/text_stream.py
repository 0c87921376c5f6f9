"""The text side of a generation: tokens in, certain text out, until a stop string is complete."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence

from .detokenise import Decodes, Detokeniser
from .results import Span
from .stop_strings import StopStrings

__all__ = ["TextStream"]


class TextStream:
    """One text.

    Args:
        prompt: tokens before the text.
        stop: strings that end it.

    Raises:
        RequestError: an empty stop string.
    """

    def __init__(
        self, tokenizer: Decodes, prompt: Sequence[int] = (), stop: Sequence[str] = ()
    ) -> None:
        self._detokeniser = Detokeniser(tokenizer, prompt)
        self._stops = StopStrings(stop)
        self._pieces: list[str] = []
        self._waiting: deque[tuple[int, int | None]] = deque()  # characters, and their exit layer
        self._layer: int | None = None
        self.spans: tuple[Span, ...] = ()  # of the text that was let out last

    @property
    def stopped(self) -> bool:
        """Whether a stop string is complete."""
        return self._stops.found

    @property
    def text(self) -> str:
        """All that was let out."""
        return "".join(self._pieces)

    def push(self, token: int, exit_layer: int | None = None) -> str:
        """Text that is certain after one more token."""
        self._layer = exit_layer
        return self._out(self._stops.push(self._come(self._detokeniser.push(token))))

    def flush(self) -> str:
        """The rest, now that no token follows."""
        piece = self._stops.push(self._come(self._detokeniser.flush()))
        return self._out(piece + self._stops.flush())

    def _come(self, piece: str) -> str:
        """Notes whose text it is: a character that several tokens make is the last one's."""
        if piece:
            self._waiting.append((len(piece), self._layer))
        return piece

    def _out(self, piece: str) -> str:
        if piece:
            self._pieces.append(piece)
        self.spans = tuple(self._cut(piece))
        return piece

    def _cut(self, piece: str) -> Iterator[Span]:
        """The piece by exit layers; it is the oldest text that waits."""
        start = 0
        while start < len(piece):
            count, layer = self._waiting.popleft()
            end = min(start + count, len(piece))
            if start + count > end:
                self._waiting.appendleft((start + count - end, layer))
            yield Span(piece[start:end], layer)
            start = end
