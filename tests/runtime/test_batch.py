"""Texts that advance together: each is what it would be alone."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adainfer_runtime.batch import TakeTurns, drain
from adainfer_runtime.decode_options import DecodeOptions
from adainfer_runtime.draft_schedule import Fixed
from adainfer_runtime.errors import DeadlineError, RequestError

PROMPTS = [[5, 17, 200], [43], [9, 120, 77, 5, 6, 8, 31], [250, 251], [12, 13, 14, 15], [99, 3]]


@settings(max_examples=12, deadline=None)
@given(
    order=st.permutations(range(len(PROMPTS))),
    at_once=st.integers(1, 8),
    mode=st.sampled_from(["off", "verified"]),
    new=st.integers(1, 14),
)
def test_results_depend_on_neither_order_nor_company(tiny, order, at_once, mode, new):
    engine = tiny("llama").engine
    options = DecodeOptions(draft_layer=3, draft_schedule=Fixed(2))
    settings = {"max_new_tokens": new, "mode": mode, "decoding": options}
    alone = [engine.generate(prompt, **settings) for prompt in PROMPTS]
    together = engine.generate_batch(
        [PROMPTS[place] for place in order], scheduler=TakeTurns(at_once), **settings
    )
    for place, result in zip(order, together, strict=True):
        expected = alone[place]
        assert result.tokens == expected.tokens
        assert result.exit_layers == expected.exit_layers
        assert result.finish_reason == expected.finish_reason
        assert result.statistics.drafts == expected.statistics.drafts
        assert result.layers_saved == expected.layers_saved


def counting(number, tokens, log):
    for token in range(tokens):
        log.append((number, token))
        yield token
    return number * 10


def test_turns_are_fair_and_room_is_limited():
    log = []
    begin = [lambda n=n: counting(n, 2 + n, log) for n in range(3)]
    assert TakeTurns(2).run(begin) == [0, 10, 20]
    assert log == [(0, 0), (1, 0), (0, 1), (1, 1), (1, 2), (2, 0), (2, 1), (2, 2), (2, 3)]
    assert TakeTurns().run([]) == []
    assert drain(counting(4, 3, log)) == 40


def test_a_failure_closes_the_others():
    closed = []

    def patient():
        try:
            while True:
                yield
        finally:
            closed.append(True)

    def failing():
        yield
        raise DeadlineError("over")

    with pytest.raises(DeadlineError, match="over"):
        TakeTurns().run([patient, failing, patient])
    assert len(closed) == 2
    with pytest.raises(RequestError, match="at_once must be at least 1, found 0"):
        TakeTurns(0)


def test_an_engine_outlives_a_batch_that_failed(tiny):
    engine = tiny("llama").engine
    with pytest.raises(DeadlineError):
        engine.generate_batch(PROMPTS, max_new_tokens=40, timeout=0.0, ignore_eos=True)
    with pytest.raises(RequestError, match="token id 999 is outside"):
        engine.generate_batch([[5], [999]], max_new_tokens=4)
    assert len(engine.generate_batch(["a", "bc"], max_new_tokens=3, ignore_eos=True)[1].tokens) == 3
