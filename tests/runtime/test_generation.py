"""Texts: what ends them, what is streamed, what is counted; one loop for all of it."""

from __future__ import annotations

import re
import threading
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adainfer_runtime import CancelToken, Engine
from adainfer_runtime.decoding import PolicyDecoder
from adainfer_runtime.errors import (
    DeadlineError,
    ExitUnavailableError,
    RequestError,
    TokenizerMissingError,
)
from adainfer_runtime.exit_policy import ExitCheck, FixedExit, NoExit
from adainfer_runtime.generate import GenerateRequest, generate
from adainfer_runtime.profile import StageClock
from adainfer_runtime.sampling import Greedy, make_sampler
from adainfer_runtime.sampling_options import SamplingOptions
from adainfer_runtime.text_stream import TextStream
from adainfer_runtime.tokenizer import load_tokenizer

from ..reference import reference_logits


@pytest.fixture
def made(tiny):
    return tiny("llama")


@pytest.fixture
def engine(made):
    return made.engine


def engine_with(engine, max_rows=None, eos=None, profile=False):
    """The same stages under other settings."""
    model = engine.manifest.model
    if eos is not None:
        model = model.model_copy(update={"eos_token_ids": tuple(eos)})
    manifest = engine.manifest.model_copy(update={"model": model})
    backend = engine.backend if max_rows is None else Chunked(engine.backend, max_rows)
    return Engine(manifest, backend, engine.tokenizer, clock=StageClock() if profile else None)


class Chunked:
    """A back end whose passes carry few rows: long prompts go in chunks."""

    def __init__(self, inner, max_rows):
        self._inner = inner
        self.max_rows = max_rows

    def __getattr__(self, name):
        return getattr(self._inner, name)


class ByExits:
    """An exit policy that stops where a list says so."""

    state_size, over_candidates, promised = 0, True, None
    checks = tuple(ExitCheck(layer) for layer in (1, 2, 3))

    def __init__(self, layers):
        self._layers = iter(layers)
        self._wanted = None

    def decide(self, check, evidence, state):
        if check.layer == 1:
            self._wanted = next(self._layers, 4)
        return check.layer == self._wanted, state


def test_events_are_the_result(engine):
    events = list(engine.stream("hello", max_new_tokens=12, ignore_eos=True, logprobs=3))
    *steps, last = events
    result = last.result
    assert result is not None
    assert [event.result for event in steps] == [None] * 12
    assert "".join(event.text for event in events) == result.text
    assert tuple(event.token for event in steps) == result.tokens
    assert tuple(event.exit_layer for event in steps) == result.exit_layers == (4,) * 12
    assert tuple(event.logprob for event in steps) == result.logprobs
    again = engine.generate("hello", max_new_tokens=12, ignore_eos=True)
    assert (again.tokens, again.text) == (result.tokens, result.text)
    assert again.logprobs is None


def test_logprobs_are_the_models_own(made):
    engine = made.engine
    prompt = [5, 6, 7]
    result = engine.generate(
        prompt, max_new_tokens=5, ignore_eos=True, logprobs=4, temperature=1.3, seed=3, top_k=20
    )
    logits = reference_logits(made.reference, [*prompt, *result.tokens]).astype(np.float64)
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    for place, (token, logprob) in enumerate(zip(result.tokens, result.logprobs, strict=True), 2):
        assert logprob.token == token
        assert logprob.logprob == pytest.approx(log_probs[place, token], abs=1e-3)
        best = np.argsort(-log_probs[place])[:4]
        assert [t for t, _ in logprob.alternatives] == best.tolist()
        values = [value for _, value in logprob.alternatives]
        np.testing.assert_allclose(values, log_probs[place][best], atol=1e-3)
    own = engine.generate(prompt, max_new_tokens=2, ignore_eos=True, logprobs=0)
    assert [entry.alternatives for entry in own.logprobs] == [(), ()]


def test_stop_string_across_tokens(engine):
    """The tiny tokenizer has a token per byte: every longer string crosses tokens."""
    free = engine.generate("hello", max_new_tokens=40, ignore_eos=True)
    start = next(i for i in range(5, 30) if free.text[i : i + 3] not in free.text[: i + 2])
    stop = free.text[start : start + 3]
    stopped = engine.generate("hello", max_new_tokens=40, ignore_eos=True, stop=["never", stop])
    assert stopped.text == free.text[: free.text.index(stop)]
    assert stopped.finish_reason == "stop"
    assert stopped.tokens == free.tokens[: len(stopped.tokens)]
    assert engine.tokenizer.decode(list(stopped.tokens)).startswith(stopped.text + stop)
    seen = ""
    for event in engine.stream("hello", max_new_tokens=40, ignore_eos=True, stop=stop):
        seen += event.text
        assert stopped.text.startswith(seen)
    assert seen == stopped.text


def test_held_back_text_comes_when_nothing_follows(engine):
    free = engine.generate("hello", max_new_tokens=6, ignore_eos=True)
    held = free.text[-1] + "\x00never"
    events = list(engine.stream("hello", max_new_tokens=6, ignore_eos=True, stop=held))
    assert "".join(event.text for event in events) == free.text
    assert events[-1].text.endswith(free.text[-1])
    assert events[-1].result.finish_reason == "length"


def test_stop_tokens(engine):
    free = engine.generate([5, 6, 7], max_new_tokens=8, ignore_eos=True).tokens
    place = next(i for i in range(2, 8) if free[i] not in free[:i])
    stopped = engine.generate(
        [5, 6, 7], max_new_tokens=8, ignore_eos=True, stop_token_ids=[free[place]]
    )
    assert (stopped.tokens, stopped.finish_reason) == (free[:place], "stop")
    with pytest.raises(RequestError, match="stop_token_ids: token id 320 is outside"):
        engine.generate([5], stop_token_ids=[320])
    with pytest.raises(RequestError, match="logit_bias: token id 999 is outside"):
        engine.generate([5], logit_bias={999: 1.0})


def test_minimum_length(engine):
    free = engine.generate([5, 6, 7], max_new_tokens=8, ignore_eos=True).tokens
    stopping = engine_with(engine, eos=[free[0]])
    assert stopping.generate([5, 6, 7], max_new_tokens=8).tokens == ()
    longer = stopping.generate([5, 6, 7], max_new_tokens=8, min_new_tokens=5)
    assert len(longer.tokens) >= 5
    assert free[0] not in longer.tokens[:5]


def test_sampling_is_reproducible(engine):
    def text(seed):
        return engine.generate(
            [5, 6, 7], max_new_tokens=16, ignore_eos=True, temperature=1.0, seed=seed
        ).tokens

    assert text(1) == text(1)
    assert text(1) != text(2)
    cold = engine.generate([5, 6, 7], max_new_tokens=16, ignore_eos=True, temperature=1, top_k=1)
    assert cold.tokens == engine.generate([5, 6, 7], max_new_tokens=16, ignore_eos=True).tokens


def test_cancelling(engine):
    cancel = CancelToken()
    events = engine.stream([5, 6, 7], max_new_tokens=50, ignore_eos=True, cancel=cancel)
    first = [next(events) for _ in range(3)]
    cancel.cancel()
    (last,) = events
    result = last.result
    assert result.finish_reason == "cancelled"
    assert result.tokens == tuple(event.token for event in first)
    before = engine.generate([5, 6], max_new_tokens=5, cancel=cancel)
    assert (before.tokens, before.finish_reason, before.layers_saved) == ((), "cancelled", 0.0)
    assert before.statistics.time_to_first_token is None


def test_long_prompts_can_be_cancelled_and_late(engine):
    """Between the passes of a prompt; what comes after is as if it had not been."""
    chunked = engine_with(engine, max_rows=5)
    prompt, asked = [5 + i % 50 for i in range(60)], []

    def after_seven():
        asked.append(None)
        return len(asked) > 7

    talk = chunked.session()
    talk.extend([5, 6, 7])
    talk.complete()
    request = GenerateRequest(prompt, 5, cancelled=after_seven)
    done = generate(talk, PolicyDecoder(talk, NoExit(), Greedy()), request, 128)
    assert (done.tokens, done.finish_reason, done.first_token) == ((), "cancelled", None)
    assert len(asked) == 8
    assert (talk.length, set(talk.filled)) == (0, {0})
    late = GenerateRequest(prompt, 5, timeout=0.0)
    with pytest.raises(DeadlineError, match="after 0 of 5 tokens"):
        generate(talk, PolicyDecoder(talk, NoExit(), Greedy()), late, 128)
    again = generate(talk, PolicyDecoder(talk, NoExit(), Greedy()), GenerateRequest(prompt, 5), 128)
    assert again.tokens == engine.generate(prompt, max_new_tokens=5, ignore_eos=True).tokens


@pytest.mark.parametrize("max_rows", [4, 512])
def test_exits_with_every_option(engine, max_rows):
    """Sampling and stops read the logits of the layer where a token stopped."""
    prompt, layers = [5 + (7 * i) % 200 for i in range(21)], [2, 4, 1, 3, 4, 2, 1, 1, 3, 4]

    class Early(Engine):
        def policy(self, mode, **given):
            return ByExits(layers)

    early = Early(engine.manifest, Chunked(engine.backend, max_rows), engine.tokenizer)
    for options in (
        {},
        {"temperature": 0.8, "top_k": 30, "seed": 5},
        {"repetition_penalty": 1.4, "frequency_penalty": 0.2},
    ):
        result = early.generate(
            prompt, mode="adaptive", max_new_tokens=10, ignore_eos=True, logprobs=0, **options
        )
        assert list(result.exit_layers) == layers
        sampler = make_sampler(SamplingOptions(**options), len(prompt))
        session, tokens = engine.session(), list(prompt)
        session.extend(prompt)
        for layer, token, logprob in zip(layers, result.tokens, result.logprobs, strict=True):
            session.advance(layer)
            logits = engine.backend.probe_logits(session.hidden()[-1:])[0]
            assert token == sampler.draw(sampler.probabilities(logits, tokens))
            expected = logits[token] - np.log(np.exp(logits.astype(np.float64)).sum())
            assert logprob.logprob == pytest.approx(expected, abs=1e-3)
            tokens.append(token)
            session = engine.session()
            session.extend(tokens)
        assert result.statistics.kv_fills > 0


def test_requests_are_checked_before_the_first_event(engine):
    with pytest.raises(RequestError, match="max_new_tokens must be at least 1"):
        engine.stream([5], max_new_tokens=0)
    with pytest.raises(RequestError, match="holds no tokens"):
        engine.stream([])
    with pytest.raises(ExitUnavailableError):
        engine.stream([5], mode="adaptive")
    with pytest.raises(RequestError, match=r"did you mean temperature\?"):
        engine.stream([5], temprature=1.0)


def test_the_engine_survives_what_goes_wrong(made):
    """Closed, late and failing requests: the next one's text is as if they had not been."""
    engine = engine_with(made.engine)
    expected = engine.generate([9, 8, 7], max_new_tokens=6, ignore_eos=True).tokens
    events = engine.stream([5] * 30, max_new_tokens=50, ignore_eos=True)
    next(events)
    events.close()
    with pytest.raises(DeadlineError):
        engine.generate([5] * 30, max_new_tokens=50, ignore_eos=True, timeout=0.0)

    class Failing(Chunked):
        def probe(self, hidden):
            raise RuntimeError("the device is gone")

    failing = Engine(engine.manifest, Failing(made.engine.backend, 512), engine.tokenizer)
    with pytest.raises(RuntimeError, match="the device is gone"):
        failing.generate([5, 6], max_new_tokens=2)
    assert failing.statistics.texts == {"failed": 1}
    assert engine.generate([9, 8, 7], max_new_tokens=6, ignore_eos=True).tokens == expected
    assert engine.statistics.texts == {"length": 2, "closed": 1, "failed": 1}


def test_streams_side_by_side_in_threads(engine):
    prompts = [[5 + i, 9, 40 + i] for i in range(6)]
    options = {"max_new_tokens": 10, "ignore_eos": True, "temperature": 0.9}
    alone = [engine.generate(p, seed=i, **options).tokens for i, p in enumerate(prompts)]
    # One thread, taking turns.
    streams = [engine.stream(p, seed=i, **options) for i, p in enumerate(prompts)]
    rounds = [[next(stream) for stream in streams] for _ in range(10)]
    turns = [tuple(row[i].token for row in rounds) for i in range(6)]
    assert turns == alone
    for stream in streams:
        stream.close()
    # A thread each.
    together = [None] * 6

    def work(i):
        together[i] = engine.generate(prompts[i], seed=i, **options).tokens

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone


@pytest.mark.parametrize("max_rows", [3, 7, 512])
def test_prompts_longer_than_a_pass_work_with_every_option(engine, max_rows):
    prompt = [5 + (7 * i) % 200 for i in range(40)]
    chunked = engine_with(engine, max_rows=max_rows)
    for options in (
        {"ignore_eos": True},
        {"temperature": 0.8, "top_p": 0.9, "seed": 3, "ignore_eos": True},
        {"repetition_penalty": 1.3, "logprobs": 2, "stop": "zq", "min_new_tokens": 2},
        {"frequency_penalty": 0.4, "presence_penalty": 0.3, "stop_token_ids": [9]},
    ):
        whole = engine.generate(prompt, max_new_tokens=10, **options)
        pieces = chunked.generate(prompt, max_new_tokens=10, **options)
        assert pieces.tokens == whole.tokens
        assert (pieces.text, pieces.finish_reason) == (whole.text, whole.finish_reason)
        assert pieces.layers_saved == whole.layers_saved == 0.0


def test_statistics_of_a_request(engine):
    engine = engine_with(engine, profile=True)
    result = engine.generate([5, 6, 7], max_new_tokens=6, ignore_eos=True)
    found = result.statistics
    assert (found.prompt_tokens, found.reused_tokens, found.new_tokens) == (3, 0, 6)
    assert found.layers_executed == 4 * (3 + 5)  # the last token needs no position
    assert found.kv_fills == 0
    assert found.exits == {4: 6}
    assert 0 < found.prompt_seconds <= found.time_to_first_token
    assert found.tokens_per_second == pytest.approx(5 / found.decode_seconds)
    assert result.seconds == pytest.approx(found.prompt_seconds + found.decode_seconds)
    assert set(found.stage_seconds) == {"embed", "layers", "probe"}
    assert 0 < sum(found.stage_seconds.values()) <= result.seconds
    assert engine_with(engine).generate([5], max_new_tokens=1).statistics.stage_seconds == {}


def test_the_step_that_ends_a_text_counts_in_its_speed(engine):
    free = engine.generate([5, 6, 7], max_new_tokens=8, ignore_eos=True).tokens
    place = next(i for i in range(2, 8) if free[i] not in free[:i])
    ended = engine_with(engine, eos=[free[place]])
    found = ended.generate([5, 6, 7], max_new_tokens=8).statistics
    assert (found.new_tokens, found.decode_tokens) == (place, place)
    assert found.tokens_per_second == pytest.approx(place / found.decode_seconds)
    assert ended.statistics.tokens_per_second == pytest.approx(found.tokens_per_second)
    at_once = engine_with(engine, eos=[free[0]]).generate([5, 6, 7], max_new_tokens=8).statistics
    assert (at_once.new_tokens, at_once.decode_tokens) == (0, 0)


def test_what_closed_and_failed_texts_did_counts(made):
    engine = engine_with(made.engine, profile=True)
    events = engine.stream([5, 6, 7], max_new_tokens=50, ignore_eos=True)
    for _ in range(4):
        next(events)
    events.close()
    closed = engine.statistics
    assert closed.texts == {"closed": 1}
    assert (closed.prompt_tokens, closed.new_tokens, closed.exits) == (3, 4, {4: 4})
    assert closed.layers_executed == closed.layers_dense == 4 * (3 + 3)
    assert closed.tokens_per_second == pytest.approx(3 / closed.decode_seconds)
    assert sum(closed.stage_seconds.values()) > 0

    cancel, asked = CancelToken(), []
    cancel.cancel()
    chunked = engine_with(made.engine, max_rows=5)
    request = {"max_new_tokens": 5, "cancel": lambda: asked.append(0) or len(asked) > 7}
    assert chunked.generate([5] * 60, **request).layers_saved == 0.0
    part = chunked.statistics
    assert part.texts == {"cancelled": 1}
    # Six passes of five rows; what was not read of the prompt is no saving.
    assert part.layers_executed == part.layers_dense == 6 * 5
    assert part.prompt_seconds > 0

    probes = iter(range(3))

    class Failing(Chunked):
        def probe(self, hidden):
            if next(probes, None) is None:
                raise RuntimeError("the device is gone")
            return self._inner.probe(hidden)

    failing = Engine(engine.manifest, Failing(made.engine.backend, 512), engine.tokenizer)
    with pytest.raises(RuntimeError):
        failing.generate([5, 6, 7], max_new_tokens=8, ignore_eos=True)
    failed = failing.statistics
    assert (failed.texts, failed.new_tokens) == ({"failed": 1}, 3)
    assert failed.layers_executed == 4 * (3 + 3)  # of the fourth token, whose probe failed, too
    assert failed.layers_saved == 0.0


def slowly_encoding(engine, seconds):
    """The same stages; text takes so long to become tokens."""

    class Slow:
        def __getattr__(self, name):
            return getattr(engine.tokenizer, name)

        def encode(self, text):
            time.sleep(seconds)
            return engine.tokenizer.encode(text)

        def encode_chat(self, messages):
            return self.encode(messages[-1]["content"])

    return Engine(engine.manifest, engine.backend, Slow())


def test_requests_arrive_before_they_are_tokens(engine):
    slow = slowly_encoding(engine, 0.1)
    options = {"max_new_tokens": 1, "ignore_eos": True}
    asked = [{"role": "user", "content": "hello"}]
    results = [
        slow.generate("hello", **options),
        slow.chat(asked, **options),
        *slow.generate_batch(["hello", "you"], **options),
    ]
    times = [result.statistics.time_to_first_token for result in results]
    assert min(times[:2]) >= 0.1
    assert min(times[2:]) >= 0.2
    with pytest.raises(DeadlineError, match="after 0 of 1 tokens"):
        slow.generate("hello", timeout=0.09, **options)
    # In a batch each text has its time from its own start.
    assert len(slow.generate_batch(["hello", "you"], timeout=0.09, **options)) == 2


@pytest.mark.parametrize("text", ["a\ud800b", "caf\udce9"])
def test_text_that_is_none_is_refused(engine, text):
    for call in (
        lambda: engine.generate(text),
        lambda: engine.choose(text, ["a", "b"]),
        lambda: engine.choose("a", ["b", text]),
        lambda: engine.generate_batch(["a", text]),
        lambda: engine.tokenizer.encode_continuation(text),
    ):
        with pytest.raises(RequestError, match=r"no valid Unicode: character .* a lone surrogate"):
            call()
    with pytest.raises(RequestError, match="text is needed, found bytes"):
        engine.tokenizer.encode(b"a")


def test_ends_given_by_iterators(engine):
    free = engine.generate("hello", max_new_tokens=20, ignore_eos=True)
    options = {"max_new_tokens": 20, "ignore_eos": True}
    stopped = engine.generate("hello", stop=(s for s in [free.text[4]]), **options)
    assert (stopped.finish_reason, stopped.text) == ("stop", free.text.split(free.text[4])[0])
    stopped = engine.generate("hello", stop_token_ids=iter([free.tokens[4]]), **options)
    assert stopped.finish_reason == "stop"
    assert stopped.tokens == free.tokens[: free.tokens.index(free.tokens[4])]


@pytest.mark.parametrize("kept", [0, 3])
def test_held_back_text_has_the_exit_layers_of_its_tokens(engine, kept):
    """The tiny tokenizer has a token per byte."""
    free = engine.generate("hello", max_new_tokens=8, ignore_eos=True)
    held = free.text[2:5]
    layers = [2, 3, 1, 4, 2, 1, 3, 4]
    stream = TextStream(engine.tokenizer, (), [held[:kept] + "\x00", "\x01"] if kept else ())
    spans = []
    for token, layer in zip(free.tokens, layers, strict=True):
        text = stream.push(token, layer)
        assert "".join(span.text for span in stream.spans) == text
        spans += stream.spans
    text = stream.flush()
    assert "".join(span.text for span in stream.spans) == text
    spans += stream.spans
    plain = TextStream(engine.tokenizer)
    by_token = [
        (plain.push(token), layer) for token, layer in zip(free.tokens, layers, strict=True)
    ]
    expected = [(c, layer) for text, layer in [*by_token, (plain.flush(), 4)] for c in text]
    assert [(c, layer) for text, layer in spans for c in text] == expected


def test_statistics_of_an_engine(engine):
    engine = engine_with(engine, profile=True)
    results = [engine.generate([5, 6, 7 + i], max_new_tokens=4, ignore_eos=True) for i in range(3)]
    total = engine.statistics
    assert total.stage_seconds["layers"] == pytest.approx(
        sum(r.statistics.stage_seconds["layers"] for r in results)
    )
    engine.choose("x:", ["a", "b"])
    before, total = total, engine.statistics
    assert total.stage_seconds["layers"] > before.stage_seconds["layers"]
    assert total.choice_seconds > 0
    assert total.texts == {"length": 3}
    assert (total.choices, total.prompt_tokens, total.new_tokens) == (1, 9, 12)
    assert total.exits == {4: 13}
    assert total.layers_executed >= sum(r.statistics.layers_executed for r in results)
    assert total.layers_saved == 0.0
    decode = sum(r.statistics.decode_seconds for r in results)
    assert total.decode_seconds == pytest.approx(decode)
    assert total.tokens_per_second == pytest.approx(9 / decode)


def test_times_go_to_the_request_that_took_them(engine):
    """Two streams that take turns in one thread."""
    engine = engine_with(engine, profile=True)
    short = engine.stream([5, 6], max_new_tokens=2, ignore_eos=True)
    next(short)
    engine.generate([5] * 60, max_new_tokens=30, ignore_eos=True)
    *_, last = short
    found = last.result.statistics
    assert sum(found.stage_seconds.values()) <= found.prompt_seconds + found.decode_seconds


@settings(max_examples=40, deadline=None)
@given(layers=st.lists(st.integers(1, 4), min_size=1, max_size=8))
def test_fills_are_what_early_exits_left_out(tiny, layers):
    """Every position is run at most once per layer; debts of older ones are fills."""
    session = tiny("llama").engine.session()
    decoder = PolicyDecoder(session, ByExits(layers), Greedy())
    request = GenerateRequest([5, 6, 7], len(layers))
    done = generate(session, decoder, request, 128)
    assert done.exit_layers == tuple(layers)
    depths, fills = [layers[0]] * 3, 0  # of each position; the prompt stops together
    for layer in layers[1:]:
        fills += sum(max(0, layer - depth) for depth in depths)
        depths = [*(max(depth, layer) for depth in depths), layer]
    count = done.prompt + done.decode
    assert count.deferred == fills
    assert count.executed == sum(depths)
    assert count.executed - count.deferred == 3 * layers[0] + sum(layers[1:])


def test_reuse_keeps_the_common_beginning(engine):
    session = engine.session()
    assert session.reuse([5, 6, 7]) == 0
    session.extend([5, 6, 7, 8])
    session.predict(FixedExit(2))
    assert session.reuse([5, 6, 9, 8]) == 2
    assert session.tokens == (5, 6)
    session.extend([9, 8])
    assert session.reuse([5, 6, 9, 8]) == 3  # the last one is asked about again
    assert session.reuse([5]) == 0
    assert session.length == 0
    fresh = engine.session()
    for one in (session, fresh):
        one.extend([5, 6, 9])
        one.complete()
    np.testing.assert_array_equal(session.hidden(), fresh.hidden())


def test_engine_without_tokenizer_streams_tokens(made):
    manifest = made.engine.manifest.model_copy(update={"tokenizer": None})
    engine = Engine(manifest, made.engine.backend, load_tokenizer(made.folder, manifest))
    *_, last = engine.stream([5, 6], max_new_tokens=3, ignore_eos=True, stop_token_ids=[4])
    assert last.result.text == ""
    with pytest.raises(TokenizerMissingError, match="give token ids instead of text"):
        engine.generate([5, 6], stop="x")


class Words:
    """What transformers' stop strings need of a tokenizer."""

    def __init__(self, folder):
        from transformers import PreTrainedTokenizerFast

        self.inner = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))


@pytest.mark.parametrize("variant", ["llama", "qwen2"])
def test_greedy_text_equals_transformers(tiny, variant):
    """Penalties, stop strings, minimum length and end tokens, on many prompts."""
    made = tiny(variant)
    tokenizer = Words(made.checkpoint).inner
    random = np.random.default_rng(0)
    reasons = set()
    for number in range(24):
        prompt = random.integers(2, 250, int(random.integers(1, 20))).tolist()
        free = made.engine.generate(prompt, max_new_tokens=24, ignore_eos=True)
        eos = [free.tokens[10]] if number % 3 == 0 else [1]
        penalty = float(random.choice([1.0, 1.2, 1.7]))
        minimum = int(random.choice([0, 14]))
        pairs = re.findall(r"(?=([!-~]{2}))", free.text[3:])  # two tokens, no broken characters
        stop = pairs[-1] if number % 2 and pairs else None
        options = {"stop": stop} if stop else {}
        mine = engine_with(made.engine, eos=eos).generate(
            prompt, max_new_tokens=24, min_new_tokens=minimum, repetition_penalty=penalty, **options
        )
        tokens, reason = transformers_greedy(
            made.reference, tokenizer, prompt, eos, penalty, minimum, stop
        )
        text = tokenizer.decode(tokens, skip_special_tokens=True)
        assert list(mine.tokens) == tokens, (number, mine.finish_reason)
        assert mine.finish_reason == reason
        assert mine.text == (text if stop is None or stop not in text else text.split(stop)[0])
        reasons.add(mine.finish_reason)
    assert reasons == {"eos", "stop", "length"}


def transformers_greedy(model, tokenizer, prompt, eos, penalty, minimum, stop):
    ids = torch.tensor([prompt])
    options = {"stop_strings": [stop], "tokenizer": tokenizer} if stop else {}
    if minimum:
        options["min_new_tokens"] = minimum
    with torch.no_grad():
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=24,
            do_sample=False,
            repetition_penalty=penalty,
            eos_token_id=eos,
            pad_token_id=0,
            **options,
        )
    tokens = out[0, len(prompt) :].tolist()
    if tokens[-1] in eos:
        return tokens[:-1], "eos"
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    return tokens, "stop" if stop and stop in text else "length"
