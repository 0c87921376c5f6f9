"""Tokens to text, one at a time, without broken characters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

__all__ = ["Decodes", "Detokeniser"]

# What a decoder gives for bytes that are no UTF-8: an incomplete character's, or no character's.
_BROKEN = "\ufffd"
_CONTEXT = 8
# A character has at most four bytes: with more tokens in hand, the first may be let go.
_IN_HAND = 8


class Decodes(Protocol):
    """A tokenizer's way back."""

    def decode(self, tokens: list[int]) -> str:
        """Text without special tokens."""

    def has_text(self, token: int) -> bool:
        """False for special tokens, and for ids that the tokenizer does not know."""


class Detokeniser:
    """The text of a growing token sequence, as pieces that are never taken back.

    A token is decoded behind those before it, for decoders look at neighbours: sentencepiece's
    drops a space at the start, and byte tokens make a character together. A piece waits while it
    ends within a character. Bytes that are no UTF-8 come out as U+FFFD.

    The pieces together are `tokenizer.decode(tokens)`, with two exceptions. A word's leading space
    is kept where the prompt is known, so that prompt and text can be joined. And sentencepiece's
    decoder gives up a whole run of byte tokens where one of them is wrong; here the good ones stay.

    Args:
        prompt: tokens before the text.
    """

    def __init__(self, tokenizer: Decodes, prompt: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        tail = (int(token) for token in prompt[-_CONTEXT:])
        self._context = [token for token in tail if tokenizer.has_text(token)]
        if tokenizer.decode(self._context).endswith(_BROKEN):
            self._context = []  # the text does not complete a character of the prompt
        self._waiting: list[int] = []

    def push(self, token: int) -> str:
        """The text that is certain after one more token; often empty."""
        if not self._tokenizer.has_text(token):
            return ""
        self._waiting.append(token)
        text = self._text(self._waiting)
        if not text.endswith(_BROKEN):
            return self._release(len(self._waiting), text)
        if len(self._waiting) > _IN_HAND:
            return self._release_head(text)
        return ""

    def flush(self) -> str:
        """What waits still, broken as it is."""
        return self._release(len(self._waiting), self._text(self._waiting))

    def _text(self, tokens: list[int]) -> str:
        """Of tokens that follow the context."""
        before = self._tokenizer.decode(self._context)
        both = self._tokenizer.decode(self._context + tokens)
        if both.startswith(before):
            return both[len(before) :]
        return self._tokenizer.decode(tokens)

    def _release(self, count: int, text: str) -> str:
        # A first space that was dropped has no text yet: it is no context to drop another one by.
        if text:
            self._context = self._waiting[:count][-_CONTEXT:]
            self._waiting = self._waiting[count:]
        return text

    def _release_head(self, text: str) -> str:
        """Up to a place that cuts no character, with the longest possible one left in hand."""
        for count in range(len(self._waiting) - 4, 0, -1):
            head = self._text(self._waiting[:count])
            if head + self._tokenizer.decode(self._waiting[count:]) == text:
                return self._release(count, head)
        return ""
