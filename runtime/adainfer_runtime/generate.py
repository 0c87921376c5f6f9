"""Generation on a session: a decoder's tokens, until something ends the text."""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Literal

from .batch import drain
from .decoding import Decoder, Emitted
from .errors import DeadlineError, PromptTooLongError, RequestError
from .ledger import WorkCount
from .session import Session
from .verified import NO_DRAFTS, DraftCount

__all__ = ["GenerateRequest", "Generated", "generate", "stream"]


@dataclass(frozen=True)
class GenerateRequest:
    """What is asked for.

    Attributes:
        max_new_tokens: at least 1.
        eos_token_ids: tokens that end the text (they are not part of the result).
        timeout: seconds after which `DeadlineError` is raised, or None.
    """

    prompt: Sequence[int]
    max_new_tokens: int
    eos_token_ids: frozenset[int] = frozenset()
    timeout: float | None = None


@dataclass(frozen=True)
class Generated:
    """What came out.

    Attributes:
        exit_layers: layers that each token took, 1 … L; of a draft that was accepted, the layer
            that proposed it.
        prompt: work up to the first token; `decode`: after it. Debts of early exits count where
            they are paid, so decode's savings can be negative.
    """

    tokens: tuple[int, ...]
    exit_layers: tuple[int, ...]
    finish_reason: Literal["eos", "length"]
    prompt: WorkCount
    decode: WorkCount
    seconds: float
    drafts: DraftCount = NO_DRAFTS


def stream(
    session: Session, decoder: Decoder, request: GenerateRequest, max_length: int
) -> Generator[Emitted, None, Generated]:
    """Extends the session with the prompt and continues it by the decoder, which works on it.

    Yields every token.

    Raises:
        PromptTooLongError: prompt and new tokens exceed `max_length`.
        DeadlineError: the timeout passed; the session keeps what it has.
        RequestError: nothing to generate.
    """
    _check(session, request, max_length)
    start = time.perf_counter()
    before = session.count
    session.extend(request.prompt)
    emitted = decoder.step()
    after_prompt = session.count
    tokens: list[int] = []
    exit_layers: list[int] = []
    reason: Literal["eos", "length"] = "length"
    while True:
        if emitted.token in request.eos_token_ids:
            reason = "eos"
            break
        tokens.append(emitted.token)
        exit_layers.append(emitted.exit_layer)
        yield emitted
        if len(tokens) == request.max_new_tokens:
            break
        if request.timeout is not None and time.perf_counter() - start > request.timeout:
            raise DeadlineError(
                f"the deadline of {request.timeout} s passed after {len(tokens)} of "
                f"{request.max_new_tokens} tokens"
            )
        emitted = decoder.step()
    decoder.close()
    return Generated(
        tuple(tokens),
        tuple(exit_layers),
        reason,
        after_prompt - before,
        session.count - after_prompt,
        time.perf_counter() - start,
    )


def generate(
    session: Session, decoder: Decoder, request: GenerateRequest, max_length: int
) -> Generated:
    """`stream` to its end."""
    return drain(stream(session, decoder, request, max_length))


def _check(session: Session, request: GenerateRequest, max_length: int) -> None:
    if request.max_new_tokens < 1:
        raise RequestError(f"max_new_tokens must be at least 1, found {request.max_new_tokens}")
    # The last new token is returned, not fed back: it needs no position.
    total = session.length + len(request.prompt) + request.max_new_tokens - 1
    if total > max_length:
        raise PromptTooLongError(
            f"{len(request.prompt)} prompt tokens and {request.max_new_tokens} new ones do not fit "
            f"this engine's maximum of {max_length}; shorten the prompt, ask for fewer tokens, "
            "or export with a larger --max-seq-len"
        )
