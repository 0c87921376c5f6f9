"""The text side of a generation: tokens in, certain text out, until a stop string is complete."""

from __future__ import annotations

from collections.abc import Sequence

from .detokenise import Decodes, Detokeniser
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

    @property
    def stopped(self) -> bool:
        """Whether a stop string is complete."""
        return self._stops.found

    @property
    def text(self) -> str:
        """All that was let out."""
        return "".join(self._pieces)

    def push(self, token: int) -> str:
        """Text that is certain after one more token."""
        return self._out(self._stops.push(self._detokeniser.push(token)))

    def flush(self) -> str:
        """The rest, now that no token follows."""
        piece = self._stops.push(self._detokeniser.flush())
        return self._out(piece + self._stops.flush())

    def _out(self, piece: str) -> str:
        if piece:
            self._pieces.append(piece)
        return piece
