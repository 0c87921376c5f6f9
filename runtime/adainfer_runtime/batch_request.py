"""The texts of one batch: each a request of its own, with one set of options."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .batch import Text
from .errors import DeadlineError, RequestError
from .generation_options import GenerationOptions
from .results import GenerationResult, StreamEvent
from .session import Session
from .text_request import TextRequest, prepare
from .values import require_methods

if TYPE_CHECKING:
    from .engine import Engine

__all__ = ["BatchListener", "check_batch", "prepare_texts"]


@dataclass(frozen=True)
class BatchListener:
    """Who is told of each text as it ends, with its place among the prompts.

    Attributes:
        on_error: of a text that fails; the others go on then. None: the first failure is raised.
    """

    on_result: Callable[[int, GenerationResult], None] | None = None
    on_error: Callable[[int, RequestError | DeadlineError], None] | None = None


def check_batch(prompts: object, scheduler: object) -> None:
    """Raises RequestError for what are no prompts, or what cannot schedule them."""
    if isinstance(prompts, str):
        raise RequestError("prompts is one text: give a list, or the text to generate")
    if not isinstance(prompts, Iterable) or isinstance(prompts, Mapping | bytes):
        raise RequestError(f"prompts must be a list, found {type(prompts).__name__}")
    require_methods("scheduler", scheduler, ["run"], "ContinuousBatching()")


def prepare_texts(
    engine: Engine,
    prompts: Sequence[str | Sequence[int]],
    options: GenerationOptions,
    listener: BatchListener,
    arrived: float,
) -> list[Text[GenerationResult | None]]:
    """A text for each prompt that can be served; None is what comes of one that fails later.

    Args:
        arrived: `time.perf_counter()` when the batch came. Timeouts are from each text's own start.

    Raises:
        RequestError: a prompt cannot be served, and nobody is to be told.
    """
    texts: list[Text[GenerationResult | None]] = []
    for place, prompt in enumerate(prompts):
        try:
            tokens = engine.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
            request = prepare(engine, tokens, options, arrived=arrived, own_start=True)
            texts.append(_BatchText(place, request, listener))
        except RequestError as error:
            if listener.on_error is None:
                raise type(error)(f"prompt {place}: {error}") from error
            listener.on_error(place, error)
    return texts


@dataclass(frozen=True)
class _BatchText:
    place: int
    request: TextRequest
    listener: BatchListener

    def __call__(self, session: Session) -> Generator[StreamEvent, None, GenerationResult | None]:
        try:
            last = yield from self.request.run(session)
        except (RequestError, DeadlineError) as error:
            if self.listener.on_error is None:
                raise
            self.listener.on_error(self.place, error)
            return None
        if last.result is not None and self.listener.on_result is not None:
            self.listener.on_result(self.place, last.result)
        return last.result
