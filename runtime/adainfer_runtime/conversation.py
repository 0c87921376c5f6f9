"""Turns of a chat over one KV cache."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Unpack

from .generation_options import GenerationKeywords, GenerationOptions
from .results import GenerationResult, StreamEvent
from .text_request import TextRequest, finish, prepare

if TYPE_CHECKING:
    from .engine import Engine

__all__ = ["Conversation"]


class Conversation:
    """A chat that remembers. Not for use by two threads at once.

    Each turn renders the whole history by the chat template and computes only what the KV cache
    does not hold yet: the longest common beginning is kept, whatever the template does to old
    messages. A turn that fails, or whose stream is closed, leaves the history as it was; one that
    was cancelled stays with the answer as far as it came, if there is any.

    Example:
        >>> talk = engine.conversation()  # doctest: +SKIP
        >>> talk.say("Name a fruit.").text  # doctest: +SKIP
        >>> talk.say("Another one.").statistics.reused_tokens  # doctest: +SKIP

    Raises:
        ChatTemplateError: the engine has no chat template.
    """

    def __init__(self, engine: Engine, messages: Sequence[Mapping[str, object]] = ()) -> None:
        engine.tokenizer.chat_template.require()
        self._engine = engine
        self._beginning = tuple(dict(message) for message in messages)
        self._session = engine.session()
        self._running: Generator[StreamEvent, None, None] | None = None
        self._messages = list(self._beginning)

    @property
    def messages(self) -> tuple[dict[str, object], ...]:
        """The history."""
        return tuple(dict(message) for message in self._messages)

    def reset(self) -> None:
        """Back to the messages that it began with. (The KV cache stays as long as it fits.)"""
        self._stop_running()
        self._messages = list(self._beginning)

    def say(self, content: str, **options: Unpack[GenerationKeywords]) -> GenerationResult:
        """The answer to a message of the user; options as for `Engine.generate`.

        Raises:
            RequestError, DeadlineError: see `Engine.generate`.
        """
        return finish(self.stream(content, **options))

    def stream(self, content: str, **options: Unpack[GenerationKeywords]) -> Iterator[StreamEvent]:
        """The same, token by token (see `Engine.stream`). A stream that was left is closed."""
        arrived = time.perf_counter()
        self._stop_running()
        asked: list[dict[str, object]] = [*self._messages, {"role": "user", "content": content}]
        tokens = self._engine.tokenizer.encode_chat(asked)
        request = prepare(
            self._engine, tokens, GenerationOptions.of(options), self._session, arrived=arrived
        )
        self._running = self._turn(request, asked)
        return self._running

    def _turn(
        self, request: TextRequest, asked: list[dict[str, object]]
    ) -> Generator[StreamEvent, None, None]:
        with self._engine.lifetime.work():  # the session is needed when the text has failed, too
            try:
                last = yield from request.run(self._session)
            except GeneratorExit:
                raise  # between two tokens, where the cache is in order
            except BaseException:
                self._session.truncate(0)
                raise
        result = last.result
        if result is not None and (result.tokens or result.finish_reason != "cancelled"):
            self._messages = [*asked, {"role": "assistant", "content": result.text}]
        yield last

    def _stop_running(self) -> None:
        running, self._running = self._running, None
        if running is not None:
            running.close()
