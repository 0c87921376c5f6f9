"""A request for text, from its options to its result."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, TypedDict

from .decode_options import drafts_of, make_decoder
from .decoding import Decoder
from .errors import RequestError
from .exit_policy import ExitPolicy
from .generate import Generated, GenerateRequest, check_request, stream
from .generation_options import GenerationOptions
from .ledger import WorkCount
from .long_text import LongText
from .mode_policies import Mode
from .planning import RequestShape
from .profile import measuring
from .results import NO_STATISTICS, GenerationResult, RequestStatistics, StreamEvent
from .sampling import make_sampler
from .session import Session, check_tokens
from .text_progress import TextProgress
from .text_stream import TextStream
from .verified import check_draft_layer

if TYPE_CHECKING:
    from .engine import Engine

__all__ = ["TextRequest", "finish", "prepare"]


@dataclass(frozen=True)
class TextRequest:
    """A request that was found good. `run` it once.

    Attributes:
        tokens: the whole prompt.
        mode: as it was asked for; of `auto` what was planned.
        request: the same without options that are the caller's own: `prompt` is set when it is
            known how much of it is new.
        arrived: `time.perf_counter()` when it came.
    """

    engine: Engine
    tokens: Sequence[int]
    options: GenerationOptions
    mode: Mode
    policy: ExitPolicy
    request: GenerateRequest
    arrived: float

    def run_on_borrowed(self) -> Generator[StreamEvent, None, None]:
        """The text, on a session of the engine's."""
        with self.engine.borrow() as session:
            last = yield from self.run(session)
        yield last

    def run(self, session: Session) -> Generator[StreamEvent, None, StreamEvent]:
        """Its tokens' events, on a session that keeps what it has in common with the prompt.

        Returns:
            the last event, which carries the result.
        """
        reason, running = "failed", _Running()
        try:
            with self.engine.lifetime.work():
                done = yield from self._run(session, running)
            reason = done.finish_reason
        except GeneratorExit:
            reason = "closed"
            raise
        finally:
            statistics = running.statistics(len(self.tokens), self.arrived)
            self.engine.recorder.text(reason, statistics, running.work)
        result = self._result(done, statistics)
        return StreamEvent(done.tail, result=result, spans=done.tail_spans)

    def _run(self, session: Session, running: _Running) -> Generator[StreamEvent, None, Generated]:
        model, options, tokens = self.engine.manifest.model, self.options, self.tokens
        running.reused = reused = self._reuse(session)
        sampler = make_sampler(options.sampling, len(tokens), options.minimum(model.eos_token_ids))
        manifest = self.engine.manifest
        decoder = running.decoder = make_decoder(
            session,
            manifest,
            self.policy,
            sampler,
            len(tokens) + options.max_new_tokens - 1,
            options.decoding_as_certified,
            self.engine.decode_costs(options.decoding.probe).of_texts(session.texts),
            verified=self.mode == "verified",
            with_logits=options.logprobs is not None,
        )
        running.progress = TextProgress(
            session, partial(measuring, self.engine.clock, running.stage_seconds)
        )
        done = yield from stream(
            session,
            decoder,
            replace(self.request, prompt=tokens[reused:]),
            manifest.max_seq_len,
            TextStream(self.engine.tokenizer, tokens, options.stop_strings),
            running.progress,
        )
        if done.first_exit is not None:
            self.engine.recent.record(self.policy, done.first_exit)
        if options.greedy and done.first_token is not None:
            self.engine.compare(self.policy, tokens, done.first_token)
        return done

    def _reuse(self, session: Session) -> int:
        """At a level a context exit keeps nothing: it was certified on whole prompts."""
        contexts = any(check.kind == "context" for check in self.policy.checks)
        if self.options.level is not None and contexts:
            session.truncate(0)
        return session.reuse(self.tokens)

    def _result(self, done: Generated, statistics: RequestStatistics) -> GenerationResult:
        count = done.prompt + done.decode
        return GenerationResult(
            text=done.text,
            tokens=done.tokens,
            exit_layers=done.exit_layers,
            layers_total=self.engine.manifest.model.num_layers,
            layers_saved=count.layers_saved,
            prompt_layers_saved=done.prompt.layers_saved,
            decode_layers_saved=done.decode.layers_saved,
            compute_saved=count.compute_saved,
            seconds=done.seconds,
            finish_reason=done.finish_reason,
            statistics=statistics,
            logprobs=done.logprobs,
        )


class _Strictness(TypedDict):
    threshold: float | None
    level: float | None
    text: LongText | None


def prepare(
    engine: Engine,
    prompt: Sequence[int],
    options: GenerationOptions,
    session: Session | None = None,
    *,
    arrived: float | None = None,
    own_start: bool = False,
) -> TextRequest:
    """Checks a request before anything is computed.

    Args:
        session: that it will run on, where that is known: what it holds need not be read.
        arrived: `time.perf_counter()` when it came, before it was tokenised; default: now.
        own_start: a timeout is from where work on the text begins, not from its arrival.

    Raises:
        RequestError: it cannot be served, or the engine is closed.
    """
    arrived = time.perf_counter() if arrived is None else arrived
    engine.lifetime.check()
    if options.stop_strings:
        engine.tokenizer.require()
    vocabulary = engine.manifest.model.vocab_size
    tokens = check_tokens(prompt, vocabulary).tolist()
    _check_ids("stop_token_ids", options.stop_ids, vocabulary)
    _check_ids("logit_bias", options.sampling.logit_bias, vocabulary)
    if options.decoding.draft_layer is not None:
        check_draft_layer(engine.manifest, options.decoding.draft_layer)
    reused = 0 if session is None else session.common(tokens)
    eos, stop = options.ends(engine.manifest.model.eos_token_ids)
    request = GenerateRequest(
        tokens,
        options.max_new_tokens,
        eos,
        options.timeout,
        stop,
        options.logprobs,
        options.cancelled,
        None if own_start else arrived,
    )
    check_request(request, 0, engine.manifest.max_seq_len)
    shape = RequestShape(
        len(tokens),
        options.max_new_tokens,
        reused_tokens=reused,
        kv_policy=options.decoding.kv_policy,
    )
    mode, policy = _planned(engine, options, shape)
    return TextRequest(engine, tokens, options, mode, policy, request, arrived)


def _planned(
    engine: Engine, options: GenerationOptions, shape: RequestShape
) -> tuple[Mode, ExitPolicy]:
    settings: _Strictness = {
        "threshold": options.threshold,
        "level": options.level,
        "text": options.long_text,
    }
    if options.mode == "auto":
        # Only a plan knows the mode; otherwise `policy` is asked, which subclasses may override.
        plan = engine.plan(shape, **settings)
        return plan.mode, plan.policy
    return options.mode, engine.policy(options.mode, **settings)


def _check_ids(name: str, ids: Iterable[int], vocabulary: int) -> None:
    for token in ids:
        if not 0 <= token < vocabulary:
            raise RequestError(
                f"{name}: token id {token} is outside the vocabulary of {vocabulary}"
            )


def finish(events: Iterable[StreamEvent]) -> GenerationResult:
    """The result at the end of a stream."""
    *_, last = events
    if last.result is None:
        raise AssertionError("a stream ends with its result")
    return last.result


@dataclass
class _Running:
    """A text at work: what is known of it wherever it ends; without `progress` nothing was done."""

    progress: TextProgress | None = None
    decoder: Decoder | None = None
    reused: int = 0
    stage_seconds: dict[str, float] = field(default_factory=dict)

    @property
    def work(self) -> WorkCount:
        """So far."""
        return WorkCount(0, 0) if self.progress is None else self.progress.work

    def statistics(self, prompt_tokens: int, arrived: float) -> RequestStatistics:
        """So far."""
        done, decoder = self.progress, self.decoder
        if done is None or decoder is None:
            return NO_STATISTICS
        count, later = done.work, max(done.steps - 1, 0)
        return RequestStatistics(
            prompt_tokens=prompt_tokens,
            reused_tokens=self.reused,
            new_tokens=len(done.tokens),
            time_to_first_token=None if done.first_token is None else done.first_token_at - arrived,
            prompt_seconds=done.prompt_seconds,
            decode_seconds=done.decode_seconds,
            tokens_per_second=later / done.decode_seconds if done.decode_seconds else 0.0,
            layers_executed=count.executed,
            kv_fills=count.deferred,
            kv_filled=count.filled,
            exits=dict(sorted(Counter(done.exit_layers).items())),
            stage_seconds=self.stage_seconds,
            drafts=drafts_of(decoder),
            decode_tokens=later,
        )
