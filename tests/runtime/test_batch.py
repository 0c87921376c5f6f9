"""Texts that advance together: each is what it would be alone."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adainfer_runtime.batch import ContinuousBatching, TakeTurns
from adainfer_runtime.decode_options import DecodeOptions
from adainfer_runtime.draft_schedule import Fixed
from adainfer_runtime.engine import Engine
from adainfer_runtime.errors import DeadlineError, PromptTooLongError, RequestError
from adainfer_runtime.exit_policy import FixedExit, NoExit

from ..export.context_folder import make_context_folder

PROMPTS = [[5, 17, 200], [43], [9, 120, 77, 5, 6, 8, 31], [250, 251], [12, 13, 14, 15], [99, 3]]
SCHEDULERS = [TakeTurns, ContinuousBatching]


@settings(max_examples=24, deadline=None)
@given(
    order=st.permutations(range(len(PROMPTS))),
    at_once=st.integers(1, 8),
    scheduler=st.sampled_from(SCHEDULERS),
    mode=st.sampled_from(["off", "verified"]),
    new=st.integers(1, 14),
)
def test_results_depend_on_neither_order_nor_company(tiny, order, at_once, scheduler, mode, new):
    engine = tiny("llama").engine
    drafting = DecodeOptions(draft_layer=3, draft_schedule=Fixed(2))
    options = drafting if mode == "verified" else DecodeOptions()
    settings = {"max_new_tokens": new, "mode": mode, "decoding": options}
    alone = [engine.generate(prompt, **settings) for prompt in PROMPTS]
    together = engine.generate_batch(
        [PROMPTS[place] for place in order], scheduler=scheduler(at_once), **settings
    )
    for place, result in zip(order, together, strict=True):
        expected = alone[place]
        assert result.tokens == expected.tokens
        assert result.exit_layers == expected.exit_layers
        assert result.finish_reason == expected.finish_reason
        assert result.statistics.drafts == expected.statistics.drafts
        assert result.layers_saved == expected.layers_saved


def walk(prompt, exits):
    """A text that exits at given layers (0: nowhere), and leaves its caches."""

    def text(session):
        tokens, before = [], session.count
        session.extend(prompt)
        for layer in exits:
            policy = FixedExit(layer) if layer else NoExit()
            tokens.append(session.predict(policy).result.token)
            yield
            session.extend(tokens[-1:])
        session.complete()
        caches = [session.kv(layer) for layer in range(1, session.depth + 1)]
        copies = [(key.copy(), value.copy()) for key, value in caches]
        return tokens, session.filled, session.count - before, copies

    return text


@settings(max_examples=40, deadline=None)
@given(
    exits=st.lists(st.lists(st.integers(0, 4), max_size=9), min_size=2, max_size=6),
    at_once=st.integers(2, 6),
)
def test_texts_that_exit_at_different_layers_leave_the_caches_that_they_leave_alone(
    tiny, exits, at_once
):
    engine = tiny("llama").engine
    texts = [walk(prompt, layers) for prompt, layers in zip(PROMPTS, exits, strict=False)]
    together = ContinuousBatching(at_once).run(texts, engine)
    alone = TakeTurns().run(texts, engine)
    for (tokens, filled, count, caches), expected in zip(together, alone, strict=True):
        assert (tokens, filled, count) == expected[:3]
        np.testing.assert_allclose(caches, expected[3], atol=2e-5)


def counted_runs(engine, monkeypatch):
    """Rows of every pass of the first stage that several texts share."""
    rows = []
    opened = engine.backend.open_batch

    def open_batch(slots):
        batch = opened(slots)
        run = batch.run_stage

        def run_stage(index, first, pasts):
            if index == 0:
                rows.append(len(pasts))
            run(index, first, pasts)

        monkeypatch.setattr(batch, "run_stage", run_stage)
        return batch

    monkeypatch.setattr(engine.backend, "open_batch", open_batch)
    return rows


def test_passes_are_shared_and_ranks_are_closed(tiny, monkeypatch):
    engine = tiny("llama").engine
    rows = counted_runs(engine, monkeypatch)
    prompts = [[5, 17, 200], [43, 2], [9, 120], [250, 251]]
    lengths = [2, 6, 3, 6]
    texts = [walk(prompt, [0] * new) for prompt, new in zip(prompts, lengths, strict=True)]
    together = ContinuousBatching().run(texts, engine)
    # The last token of each is completed as well. When the first and third text have ended, the
    # other two share passes although they began in the slots 2 and 4.
    assert rows == [4, 4, 3, 2, 2, 2]
    assert [tokens for tokens, *_ in together] == [
        tokens for tokens, *_ in TakeTurns().run(texts, engine)
    ]


def test_a_newcomer_joins_in_the_step_of_the_others(tiny, monkeypatch):
    engine = tiny("llama").engine
    rows = counted_runs(engine, monkeypatch)
    texts = [walk(prompt, [0] * new) for prompt, new in zip(PROMPTS[2:5], [2, 8, 3], strict=True)]
    ContinuousBatching(2).run(texts, engine)
    assert rows == [2] * 5


def test_where_passes_cannot_be_shared_texts_take_turns(tiny, monkeypatch):
    engine = tiny("llama").engine
    monkeypatch.setattr(engine.backend, "open_batch", lambda slots: None)
    results = engine.generate_batch(PROMPTS, max_new_tokens=4)
    assert [result.tokens for result in results] == [
        engine.generate(prompt, max_new_tokens=4).tokens for prompt in PROMPTS
    ]


def test_stages_of_other_dialects_are_not_batched(tiny):
    assert tiny("llama").engine.backend.open_batch(2) is not None
    assert tiny("llama", target="onnx-std").engine.backend.open_batch(2) is None


def test_shares_of_shared_passes_add_up(tiny):
    engine = Engine.load(tiny("llama").folder, profile=True)
    results = engine.generate_batch(PROMPTS, max_new_tokens=8, ignore_eos=True)
    for result in results:
        seconds = result.statistics.stage_seconds
        assert {"embed", "layers", "probe"} <= seconds.keys()
        assert 0 < sum(seconds.values()) <= result.seconds


def test_the_first_token_takes_what_other_texts_took_too(tiny):
    """Of the last of four prompts, which is read when the others have been."""
    engine = tiny("llama").engine
    results = engine.generate_batch([[5 + n] * 60 for n in range(4)], max_new_tokens=2)
    last = results[-1].statistics
    assert last.time_to_first_token >= sum(r.statistics.prompt_seconds for r in results)


def counting(number, tokens, log):
    for token in range(tokens):
        log.append((number, token))
        yield token
    return number * 10


def test_turns_are_fair_and_room_is_limited(tiny):
    log = []
    texts = [lambda _, n=n: counting(n, 2 + n, log) for n in range(3)]
    engine = tiny("llama").engine
    assert TakeTurns(2).run(texts, engine) == [0, 10, 20]
    assert log == [(0, 0), (1, 0), (0, 1), (1, 1), (1, 2), (2, 0), (2, 1), (2, 2), (2, 3)]
    assert TakeTurns().run([], engine) == []
    assert ContinuousBatching().run([], engine) == []


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_a_failure_closes_the_others(tiny, scheduler):
    closed = []

    def patient(session):
        session.extend([5, 6])
        try:
            while True:
                session.extend([session.predict(NoExit()).result.token])
                yield
        except GeneratorExit:
            closed.append(True)
            raise

    def failing(session):
        session.extend([7])
        session.predict(NoExit())
        yield
        raise DeadlineError("over")

    with pytest.raises(DeadlineError, match="over"):
        scheduler().run([patient, failing, patient], tiny("llama").engine)
    assert len(closed) == 2
    with pytest.raises(RequestError, match="at_once must be at least 1, found 0"):
        scheduler(0)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_an_engine_outlives_a_batch_that_failed(tiny, scheduler):
    engine = tiny("llama").engine
    with pytest.raises(DeadlineError):
        engine.generate_batch(
            PROMPTS, scheduler=scheduler(), max_new_tokens=40, timeout=0.0, ignore_eos=True
        )
    with pytest.raises(RequestError, match="token id 999 is outside"):
        engine.generate_batch([[5], [999]], max_new_tokens=4)
    assert len(engine.generate_batch(["a", "bc"], max_new_tokens=3, ignore_eos=True)[1].tokens) == 3


@pytest.fixture(scope="module")
def exits(tiny, tmp_path_factory):
    """An engine with context exits, an answer exit that leaves by top prob, and a shadow."""
    folder = make_context_folder(tiny("llama").folder, tmp_path_factory.mktemp("batch") / "engines")
    return Engine.load(folder, shadow_every=2)


OPTIONS = {
    "context": {"mode": "context", "threshold": -1e9},
    "translated": {
        "mode": "context",
        "threshold": -1e9,
        "decoding": DecodeOptions(kv_policy="translated"),
    },
    "sampled": {"temperature": 0.9, "seed": 3},
    "penalties": {"repetition_penalty": 1.3, "logprobs": 2},
    "stopped": {"stop_token_ids": (5, 17), "min_new_tokens": 2},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_means_the_same_in_company(exits, name):
    options = {"max_new_tokens": 9, "ignore_eos": True, **OPTIONS[name]}
    together = exits.generate_batch(PROMPTS, **options)
    for prompt, result in zip(PROMPTS, together, strict=True):
        alone = exits.generate(prompt, **options)
        assert result.tokens == alone.tokens
        assert result.exit_layers == alone.exit_layers
        if "mode" not in options:  # sessions that are used again know some first tokens' K and V
            assert result.layers_saved == alone.layers_saved
            assert result.compute_saved == alone.compute_saved
    if "mode" in options:
        assert any(result.exit_layers[0] < 4 for result in together)
        assert sum(entry.checked for entry in exits.shadow) > 0


def test_kv_policies_fill_while_others_wait(tiny):
    """Exits at random places, what is skipped filled by the layers' own weights."""
    engine = tiny("llama").engine

    def text(prompt, layers, session):
        tokens = []
        session.extend(prompt)
        for layer in layers:
            policy = FixedExit(layer) if layer else NoExit()
            tokens.append(session.predict(policy, kv_policy="propagate").result.token)
            yield
            session.extend(tokens[-1:])
        states = [session.kv_states(layer) for layer in range(1, session.depth + 1)]
        return tokens, session.filled, states

    exits = [[2, 0, 1, 3, 0], [0, 0, 2, 0, 0, 1, 0], [3, 3, 0], [1, 0]]
    texts = [partial(text, p, layers) for p, layers in zip(PROMPTS, exits, strict=False)]
    together = ContinuousBatching(3).run(texts, engine)
    assert together == TakeTurns().run(texts, engine)
    assert any("propagated" in states[-1] for _, _, states in together)


def test_engines_that_calibration_joined_share_passes(tiny):
    engine = tiny("llama", layers_per_engine=2).engine
    assert len(engine.manifest.layer_stages) == 2
    together = engine.generate_batch(PROMPTS, max_new_tokens=7)
    alone = [engine.generate(prompt, max_new_tokens=7) for prompt in PROMPTS]
    assert [result.tokens for result in together] == [result.tokens for result in alone]


def test_seconds_are_each_texts_share(tiny):
    engine = tiny("llama").engine
    start = time.perf_counter()
    results = engine.generate_batch(PROMPTS, max_new_tokens=20, ignore_eos=True)
    elapsed = time.perf_counter() - start
    assert 0.3 * elapsed < sum(result.seconds for result in results) <= elapsed


def test_an_interrupt_closes_every_text(tiny, monkeypatch):
    engine = tiny("llama").engine
    before, start = engine.statistics, time.perf_counter()
    opened = engine.backend.open_batch

    def open_batch(slots):
        batch = opened(slots)
        passes = iter(range(9))

        def run_stage(index, first, pasts, run=batch.run_stage):
            if next(passes, None) is None:
                time.sleep(0.3)  # all texts wait for it, or for their turn
                raise KeyboardInterrupt
            run(index, first, pasts)

        monkeypatch.setattr(batch, "run_stage", run_stage)
        return batch

    monkeypatch.setattr(engine.backend, "open_batch", open_batch)
    with pytest.raises(KeyboardInterrupt):
        engine.generate_batch(PROMPTS, max_new_tokens=20, ignore_eos=True)
    closed = engine.statistics.texts.get("closed", 0) - before.texts.get("closed", 0)
    assert closed == len(PROMPTS)
    # What they had done counts, but not that they waited for each other.
    assert engine.statistics.layers_executed > before.layers_executed
    spent = engine.statistics.decode_seconds + engine.statistics.prompt_seconds
    assert 0 < spent - before.decode_seconds - before.prompt_seconds <= time.perf_counter() - start


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": None}, "prompts must be a list, found NoneType"),
        ({"prompts": 5}, "prompts must be a list, found int"),
        ({"prompts": {"a": 1}}, "prompts must be a list, found dict"),
        ({"scheduler": 2}, r"such as ContinuousBatching\(\), found 2"),
        ({"scheduler": TakeTurns}, r"such as ContinuousBatching\(\), found <class"),
    ],
)
def test_what_is_no_batch(tiny, arguments, message):
    with pytest.raises(RequestError, match=message):
        tiny("llama").engine.generate_batch(**{"prompts": PROMPTS, **arguments})


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("at_once", [2.5, "2", True])
def test_only_whole_numbers_of_texts_advance_at_once(scheduler, at_once):
    with pytest.raises(RequestError, match="at_once must be a whole number, found"):
        scheduler(at_once)


def test_text_that_is_none_fails_alone(tiny):
    errors = {}
    found = tiny("llama").engine.generate_batch(
        ["ab", "a\ud800b"], max_new_tokens=3, on_error=errors.__setitem__
    )
    assert len(found) == 1
    assert str(errors[1]).startswith("the text is no valid Unicode: character 2")


def test_failures_may_be_told_of_instead_of_raised(tiny):
    engine = tiny("llama").engine
    prompts = [PROMPTS[0], [999_999], [5] * 500, PROMPTS[1]]
    results, errors = {}, {}
    found = engine.generate_batch(
        prompts,
        max_new_tokens=4,
        on_result=results.__setitem__,
        on_error=lambda place, error: errors.__setitem__(place, str(error)),
    )
    assert found == [results[0], results[3]]
    assert errors[1].startswith("token id 999999 is outside the vocabulary")
    assert errors[2].startswith("500 prompt tokens and 4 new ones do not fit")
    with pytest.raises(PromptTooLongError, match="prompt 2: 500 prompt tokens"):
        engine.generate_batch([prompts[0], prompts[3], prompts[2]], max_new_tokens=4)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_callbacks_see_their_callers_context(tiny, scheduler):
    wanted = ContextVar("wanted")
    wanted.set("mine")
    seen = []
    tiny("llama").engine.generate_batch(
        PROMPTS[:2],
        scheduler=scheduler(),
        max_new_tokens=2,
        on_result=lambda place, result: seen.append(wanted.get()),
    )
    assert seen == ["mine", "mine"]


def test_threads_may_run_batches_of_one_engine(tiny):
    engine = tiny("llama").engine
    expected = [engine.generate(p, max_new_tokens=8, ignore_eos=True).tokens for p in PROMPTS]

    def run(_):
        results = engine.generate_batch(PROMPTS, max_new_tokens=8, ignore_eos=True)
        return [result.tokens for result in results]

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(run, range(6))) == [expected] * 6
