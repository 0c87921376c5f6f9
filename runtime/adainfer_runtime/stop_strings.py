"""Stop strings: text is let through until one of them appears, also across pieces."""

from __future__ import annotations

from collections.abc import Sequence

from .errors import RequestError

__all__ = ["StopStrings"]


class StopStrings:
    """Holds back what could be the beginning of a stop string.

    Raises:
        RequestError: an empty stop string.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        if any(not string for string in strings):
            raise RequestError("a stop string is empty: leave it out, or give its text")
        self._strings = tuple(strings)
        self._held = ""
        self.found = False

    def push(self, piece: str) -> str:
        """Text that precedes every stop string; `found` then says whether one is complete."""
        if not self._strings:
            return piece
        if self.found:
            return ""
        text = self._held + piece
        # The one that is complete first, however the text came in pieces.
        ends = [(at + len(s), at) for s in self._strings if (at := text.find(s)) >= 0]
        if ends:
            self.found, self._held = True, ""
            return text[: min(ends)[1]]
        held = max(_overlap(text, string) for string in self._strings)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def flush(self) -> str:
        """What was held back, now that nothing follows."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, string: str) -> int:
    """Length of the longest end of the text with which the string begins, without all of it."""
    longest = min(len(text), len(string) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(string[:n])), 0)
