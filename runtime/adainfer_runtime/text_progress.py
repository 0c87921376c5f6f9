"""What a text has come to so far: its tokens, and what they cost."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

from .decoding import Emitted
from .ledger import WorkCount
from .results import TokenLogprob
from .session import Session

__all__ = ["TextProgress"]

_NOTHING = WorkCount(0, 0)


@dataclass
class TextProgress:
    """Counted step by step, so that it is true of a text that is given up, too.

    Attributes:
        session: that the text is on.
        watch: entered while the model works.
        tokens, exit_layers, logprobs: of the text, without the token that ended it.
        steps: tokens that came, the one that ended the text among them.
        first_token: the first that came; `first_token_at` by `time.perf_counter()`, `first_exit`
            the layers that it took.
        prompt: work up to the first token; `decode`: after it.
        prompt_seconds, decode_seconds: of the same work.
    """

    session: Session
    watch: Callable[[], AbstractContextManager[None]] = nullcontext
    tokens: list[int] = field(default_factory=list)
    exit_layers: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    steps: int = 0
    first_token: int | None = None
    first_token_at: float = 0.0
    first_exit: int | None = None
    prompt: WorkCount = _NOTHING
    decode: WorkCount = _NOTHING
    prompt_seconds: float = 0.0
    decode_seconds: float = 0.0

    def __post_init__(self) -> None:
        self._before = self.session.count

    @property
    def work(self) -> WorkCount:
        """Of prompt and decode."""
        return self.prompt + self.decode

    def advance(self, work: Callable[[], Emitted]) -> Emitted:
        """One step of the decoder, measured; of one that fails, what was done counts too."""
        start, waited = time.perf_counter(), self.session.waited()

        def seconds() -> float:
            return time.perf_counter() - start - (self.session.waited() - waited)

        try:
            with self.watch():
                emitted = work()
        except BaseException:
            self._add(self._uncounted().unfinished, seconds())
            raise
        self._add(self._uncounted(), seconds())
        self.steps += 1
        if self.first_token is None:
            self.first_token, self.first_exit = emitted.token, emitted.exit_layer
            self.first_token_at = time.perf_counter()
        return emitted

    def settle(self) -> None:
        """Counts what the decoder's `close` took back."""
        self._add(self._uncounted(), 0.0)

    def _uncounted(self) -> WorkCount:
        count = self.session.count - self._before
        self._before += count
        return count

    def _add(self, count: WorkCount, seconds: float) -> None:
        if self.first_token is None:
            self.prompt += count
            self.prompt_seconds += seconds
        else:
            self.decode += count
            self.decode_seconds += seconds
