"""Generation on a session: a decoder's tokens, until something ends the text."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass

import numpy as np

from .decoding import Decoder, Emitted
from .errors import DeadlineError, PromptTooLongError, RequestError
from .ledger import WorkCount
from .results import FinishReason, Span, StreamEvent, TokenLogprob
from .session import Session, log_softmax
from .text_progress import TextProgress
from .text_stream import TextStream

__all__ = ["GenerateRequest", "Generated", "check_request", "generate", "stream"]


def _never() -> bool:
    return False


@dataclass(frozen=True)
class GenerateRequest:
    """What is asked for.

    Attributes:
        prompt: what is to be added to the session before the text.
        max_new_tokens: at least 1.
        eos_token_ids: tokens that end the text (they are not part of the result).
        timeout: seconds after which `DeadlineError` is raised, or None; they begin at `since`, by
            `time.perf_counter()`, or (None) where work on the request does.
        stop_token_ids: the same, under another name of the reason.
        logprobs: alternatives per token; None for no log-probabilities at all.
        cancelled: asked before every token, and while the prompt is read; the text then ends as
            it is.
    """

    prompt: Sequence[int]
    max_new_tokens: int
    eos_token_ids: frozenset[int] = frozenset()
    timeout: float | None = None
    stop_token_ids: frozenset[int] = frozenset()
    logprobs: int | None = None
    cancelled: Callable[[], bool] = _never
    since: float | None = None


@dataclass(frozen=True)
class Generated:
    """What came out.

    Attributes:
        exit_layers: layers that each token took, 1 … L; of a draft that was accepted, the layer
            that proposed it.
        prompt: work up to the first token; `decode`: after it. Debts of early exits count where
            they are paid, so decode's savings can be negative.
        prompt_seconds, decode_seconds: of the same work; of passes that others share, its part.
        first_token: the first that came, even if it ended the text; `first_token_at` by
            `time.perf_counter()`, `first_exit` the layers that it took.
        text: of the tokens; `tail` is its end, which was let out only when no token followed, and
            `tail_spans` the same by tokens.
    """

    tokens: tuple[int, ...]
    exit_layers: tuple[int, ...]
    finish_reason: FinishReason
    prompt: WorkCount
    decode: WorkCount
    prompt_seconds: float
    decode_seconds: float
    first_token: int | None
    first_token_at: float = 0.0
    first_exit: int | None = None
    text: str = ""
    tail: str = ""
    tail_spans: tuple[Span, ...] = ()
    logprobs: tuple[TokenLogprob, ...] | None = None

    @property
    def seconds(self) -> float:
        """Of all its work."""
        return self.prompt_seconds + self.decode_seconds


class _CancelledError(Exception):
    """While the prompt was read."""


class _NoText:
    """For callers who want tokens alone."""

    def decode(self, tokens: list[int]) -> str:
        return ""

    def has_text(self, token: int) -> bool:
        return False


def stream(
    session: Session,
    decoder: Decoder,
    request: GenerateRequest,
    max_length: int,
    text: TextStream | None = None,
    progress: TextProgress | None = None,
) -> Generator[StreamEvent, None, Generated]:
    """Extends the session with the prompt and continues it by the decoder, which works on it.

    Yields an event per token; the stream may be closed between two of them. Cancelled while the
    prompt is read, it leaves the session empty.

    Args:
        text: turns tokens into text, and ends it at stop strings.
        progress: keeps count, also for a caller to whom nothing is returned.

    Raises:
        PromptTooLongError: prompt and new tokens exceed `max_length`.
        DeadlineError: the timeout passed; the session keeps what it has, or is empty where that
            was while the prompt was read.
        RequestError: nothing to generate, or a decoder that gives no logits was asked for
            log-probabilities.
    """
    check_request(request, session.length, max_length)
    text = TextStream(_NoText()) if text is None else text
    start = time.perf_counter() if request.since is None else request.since
    progress = TextProgress(session) if progress is None else progress

    def check() -> None:
        if request.cancelled():
            raise _CancelledError
        _check_deadline(request, start, 0)

    def begin() -> Emitted:
        session.extend(request.prompt)
        with session.interruptible(check):
            return decoder.step()

    reason: FinishReason | None = "cancelled" if request.cancelled() else None
    work = begin
    try:
        while reason is None:
            emitted = progress.advance(work)
            work = decoder.step
            reason = _reason_to_end(request, emitted.token)
            if reason is not None:
                break
            progress.tokens.append(emitted.token)
            progress.exit_layers.append(emitted.exit_layer)
            logprob = None
            if request.logprobs is not None:
                logprob = _logprob(emitted, request.logprobs)
                progress.logprobs.append(logprob)
            piece = text.push(emitted.token, emitted.exit_layer)
            yield StreamEvent(piece, emitted.token, emitted.exit_layer, logprob, spans=text.spans)
            reason = _reason_between(request, text, len(progress.tokens), start)
        _close(decoder, progress)
    except (GeneratorExit, DeadlineError):
        _close(decoder, progress)
        raise
    except _CancelledError:
        reason = "cancelled"
    tail = text.flush()
    if text.stopped:
        reason = "stop"
    return Generated(
        tuple(progress.tokens),
        tuple(progress.exit_layers),
        reason,
        progress.prompt,
        progress.decode,
        progress.prompt_seconds,
        progress.decode_seconds,
        progress.first_token,
        progress.first_token_at,
        progress.first_exit,
        text.text,
        tail,
        text.spans,
        None if request.logprobs is None else tuple(progress.logprobs),
    )


def _close(decoder: Decoder, progress: TextProgress) -> None:
    """Takes back what was never emitted, in the count as well."""
    decoder.close()
    progress.settle()


def generate(
    session: Session, decoder: Decoder, request: GenerateRequest, max_length: int
) -> Generated:
    """`stream` to its end, for its tokens alone."""
    events = stream(session, decoder, request, max_length)
    while True:
        try:
            next(events)
        except StopIteration as end:
            done: Generated = end.value
            return done


def check_request(request: GenerateRequest, length: int, max_length: int) -> None:
    """Whether the request fits behind `length` positions.

    Raises:
        PromptTooLongError, RequestError: it does not; see `stream`.
    """
    if request.max_new_tokens < 1:
        raise RequestError(f"max_new_tokens must be at least 1, found {request.max_new_tokens}")
    # The last new token is returned, not fed back: it needs no position.
    total = length + len(request.prompt) + request.max_new_tokens - 1
    if total > max_length:
        raise PromptTooLongError(
            f"{length + len(request.prompt)} prompt tokens and {request.max_new_tokens} new ones "
            f"do not fit this engine's maximum of {max_length}; shorten the prompt, ask for fewer "
            "tokens, or export with a larger --max-seq-len"
        )


def _reason_between(
    request: GenerateRequest, text: TextStream, tokens: int, start: float
) -> FinishReason | None:
    """Why no further token is wanted."""
    if text.stopped:
        return "stop"
    if tokens == request.max_new_tokens:
        return "length"
    if request.cancelled():
        return "cancelled"
    _check_deadline(request, start, tokens)
    return None


def _reason_to_end(request: GenerateRequest, token: int) -> FinishReason | None:
    """Why this token is the end of the text, and no part of it."""
    if token in request.stop_token_ids:
        return "stop"
    return "eos" if token in request.eos_token_ids else None


def _check_deadline(request: GenerateRequest, start: float, tokens: int) -> None:
    if request.timeout is not None and time.perf_counter() - start > request.timeout:
        raise DeadlineError(
            f"the deadline of {request.timeout} s passed after {tokens} of "
            f"{request.max_new_tokens} tokens"
        )


def _logprob(emitted: Emitted, alternatives: int) -> TokenLogprob:
    if emitted.logits is None:
        raise RequestError("this mode gives no log-probabilities: leave logprobs out")
    logprobs = log_softmax(emitted.logits)
    count = min(alternatives, len(logprobs))
    if count == 0:
        return TokenLogprob(emitted.token, float(logprobs[emitted.token]))
    best = np.argpartition(-logprobs, count - 1)[:count]
    ordered = best[np.argsort(-logprobs[best], kind="stable")]
    return TokenLogprob(
        emitted.token,
        float(logprobs[emitted.token]),
        tuple((int(token), float(logprobs[token])) for token in ordered),
    )
