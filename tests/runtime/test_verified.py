"""Mode `verified`: whatever is drafted, text and cache are those of mode off."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from adainfer_runtime import Engine
from adainfer_runtime.decode_costs import DecodeCosts
from adainfer_runtime.decode_options import DecodeOptions
from adainfer_runtime.draft_schedule import Acceptance, Adaptive, Fixed
from adainfer_runtime.errors import DeadlineError, ExitUnavailableError, RequestError
from adainfer_runtime.generate import GenerateRequest, generate, stream
from adainfer_runtime.results import DraftCount
from adainfer_runtime.sampling import Greedy
from adainfer_runtime.text_progress import TextProgress
from adainfer_runtime.verified import ExitDrafter, VerifiedDecoder

from .scripted import ScriptedDrafter, SoftmaxSampler, TableSession

PROMPT = [5, 17, 200, 43, 9, 120, 77]


class RandomLengths:
    """Draft lengths by script; drafting may also end early."""

    def __init__(self, lengths, declined=()):
        self._lengths, self._declined = iter(lengths), set(declined)
        self._asked = 0

    def length(self, acceptance):
        return next(self._lengths, 1)

    def keeps(self, confidence, drafts):
        self._asked += 1
        return self._asked not in self._declined


def off_text(engine, prompt, new):
    session = engine.session()
    tokens = engine.generate(prompt, max_new_tokens=new, ignore_eos=True).tokens
    session.extend([*prompt, *tokens[:-1]])
    session.complete()
    return tokens, session


def assert_same_cache(session, off):
    session.complete()
    assert session.tokens == off.tokens
    assert session.filled == off.filled
    for layer in range(1, session.depth + 1):
        for mine, full in zip(session.kv(layer), off.kv(layer), strict=True):
            np.testing.assert_allclose(mine, full, atol=1e-4)


class WatchedSession:
    """A session whose every change is checked for the ledger's invariants."""

    def __init__(self, session):
        self._session = session

    def __getattr__(self, name):
        found = getattr(self._session, name)
        if not callable(found):
            return found

        def call(*arguments):
            before = self._session.filled
            result = found(*arguments)
            filled = self._session.filled
            assert list(filled) == sorted(filled, reverse=True)
            assert filled[0] <= self._session.length
            if name not in ("roll_back", "truncate"):
                assert all(new >= old for new, old in zip(filled, before, strict=True))
            return result

        return call


@settings(max_examples=40, deadline=None)
@given(
    layer=st.sampled_from([1, 2, 3]),
    lengths=st.lists(st.integers(0, 6), max_size=20),
    wrong=st.sets(st.integers(8, 40), max_size=12),
    declined=st.sets(st.integers(1, 20), max_size=4),
    new=st.integers(1, 24),
    prompt=st.lists(st.integers(2, 319), min_size=1, max_size=12),
)
def test_wrong_drafts_change_neither_text_nor_cache(
    tiny, layer, lengths, wrong, declined, new, prompt
):
    engine = tiny("llama").engine
    tokens, off = off_text(engine, prompt, new)
    session = WatchedSession(engine.session())
    drafter = ScriptedDrafter(layer, [*prompt, *tokens], wrong, 320)
    limit = len(prompt) + new - 1
    decoder = VerifiedDecoder(session, Greedy(), drafter, RandomLengths(lengths, declined), limit)
    done = generate(session, decoder, GenerateRequest(prompt, new), engine.manifest.max_seq_len)
    assert done.tokens == tokens
    assert session.length == limit
    assert_same_cache(session, off)
    counts = decoder.drafts
    assert 0 <= counts.accepted <= counts.proposed
    assert done.exit_layers.count(layer) == counts.accepted
    # What was asked for is what mode off is asked for; rejected drafts are work beyond it.
    work = done.prompt + done.decode
    assert (work.dense, work.dense_compute) == dense_work(engine, prompt, new)
    assert work.executed <= work.dense + engine.manifest.depth * (counts.proposed - counts.accepted)


def dense_work(engine, prompt, new):
    session = engine.session()
    session.extend(prompt)
    session.extend([2] * (new - 1)) if new > 1 else None
    count = session.count
    return count.dense, count.dense_compute + new * engine.manifest.probe.multiply_adds


@settings(max_examples=15, deadline=None)
@given(k=st.integers(1, 5), layers_per_engine=st.sampled_from([1, 2]), rows=st.integers(1, 4))
def test_prompts_in_chunks_and_drafts_of_the_exit_itself(tiny, k, layers_per_engine, rows):
    engine = tiny("llama", layers_per_engine=layers_per_engine).engine
    tokens, off = off_text(engine, PROMPT, 16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(engine.backend), "max_rows", rows)
        session = engine.session()
        decoder = VerifiedDecoder(session, Greedy(), ExitDrafter(2), Fixed(k), len(PROMPT) + 15)
        done = generate(session, decoder, GenerateRequest(PROMPT, 16), 128)
    assert done.tokens == tokens
    assert_same_cache(session, off)


@settings(max_examples=20, deadline=None)
@given(stop=st.integers(0, 14), k=st.integers(1, 6))
def test_a_text_that_ends_amid_confirmed_drafts_takes_the_rest_back(tiny, stop, k):
    engine = tiny("llama").engine
    tokens, _ = off_text(engine, PROMPT, 20)
    end = tokens[stop]
    session = engine.session()
    drafter = ScriptedDrafter(2, [*PROMPT, *tokens], (), 320)
    decoder = VerifiedDecoder(session, Greedy(), drafter, Fixed(k), len(PROMPT) + 19)
    done = generate(session, decoder, GenerateRequest(PROMPT, 20, frozenset({end})), 128)
    kept = tokens[: tokens.index(end)]
    assert (done.tokens, done.finish_reason) == (kept, "eos")
    assert session.tokens == (*PROMPT, *kept)  # the end-of-text token has no position
    # Drafts behind the end are work that mode off does not do.
    off = engine_that_ends(engine, end).generate(PROMPT, max_new_tokens=20)
    work = done.prompt + done.decode
    assert (work.dense, work.dense_compute) == dense_work(engine, PROMPT, len(kept) + 1)
    assert work.dense == off.statistics.layers_executed
    assert work.layers_saved == 1.0 - work.executed / off.statistics.layers_executed
    # After the first token each round gives k drafts and one of the full model.
    assert decoder.drafts.accepted == sum(n % (k + 1) < k for n in range(len(kept)))
    session.extend([9])
    fresh = engine.session()
    fresh.extend([*PROMPT, *kept, 9])
    fresh.complete()
    assert_same_cache(session, fresh)


def engine_that_ends(engine, end):
    """The same stages, whose texts end at this token."""
    model = engine.manifest.model.model_copy(update={"eos_token_ids": (end,)})
    manifest = engine.manifest.model_copy(update={"model": model})
    return Engine(manifest, engine.backend, engine.tokenizer)


def test_savings_of_a_request_that_ends_amid_confirmed_drafts(tiny):
    """In the result and in the engine's statistics; every draft is right."""
    engine = tiny("llama").engine
    tokens, _ = off_text(engine, PROMPT, 20)
    stop = next(i for i in range(2, 5) if tokens[i] not in tokens[:i])
    engine = engine_that_ends(engine, tokens[stop])
    with pytest.MonkeyPatch.context() as patch:
        drafter = ScriptedDrafter(2, [*PROMPT, *tokens], (), 320)
        patch.setattr("adainfer_runtime.verified.ExitDrafter", lambda *_: drafter)
        options = DecodeOptions(draft_layer=2, draft_schedule=Fixed(5))
        found = engine.generate(PROMPT, max_new_tokens=20, mode="verified", decoding=options)
    before = engine.statistics
    off = engine.generate(PROMPT, max_new_tokens=20)
    assert found.tokens == off.tokens == tokens[:stop]
    executed = found.statistics.layers_executed
    assert executed > off.statistics.layers_executed
    saved = 1.0 - executed / off.statistics.layers_executed
    assert found.layers_saved == before.layers_saved == pytest.approx(saved)
    assert found.statistics.drafts.accepted <= stop + 1
    assert before.drafts == found.statistics.drafts


def test_a_late_text_leaves_what_it_emitted(tiny):
    """Between two tokens, while more of them are confirmed."""
    engine = tiny("llama").engine
    tokens, _ = off_text(engine, PROMPT, 20)
    session = engine.session()
    drafter = ScriptedDrafter(2, [*PROMPT, *tokens], (), 320)
    decoder = VerifiedDecoder(session, Greedy(), drafter, Fixed(5), len(PROMPT) + 19)
    request = GenerateRequest(PROMPT, 20, timeout=3600.0, since=time.perf_counter())
    progress = TextProgress(session)
    events = stream(session, decoder, request, 128, progress=progress)
    emitted = [next(events).token for _ in range(3)]
    assert session.length > len(PROMPT) + 2
    with pytest.MonkeyPatch.context() as patch, pytest.raises(DeadlineError, match="after 3 of 20"):
        patch.setattr("adainfer_runtime.generate.time.perf_counter", lambda: math.inf)
        next(events)
    assert session.tokens == (*PROMPT, *emitted[:-1])
    assert (progress.work.dense, progress.work.dense_compute) == dense_work(engine, PROMPT, 3)


@pytest.mark.parametrize("variant", ["llama-tied", "qwen3", "mistral-window"])
def test_requests_in_mode_verified(tiny, variant):
    engine = Engine.load(tiny(variant).folder)  # its statistics are this test's alone
    off = engine.generate("hello", max_new_tokens=30, ignore_eos=True)
    proposed = DraftCount()
    for drafts in (0, 1, 4):
        options = DecodeOptions(draft_layer=3, draft_schedule=Fixed(drafts))
        result = engine.generate(
            "hello", max_new_tokens=30, mode="verified", ignore_eos=True, decoding=options
        )
        assert (result.tokens, result.text) == (off.tokens, off.text)
        assert (result.statistics.drafts.proposed > 0) == (drafts > 0)
        proposed += result.statistics.drafts
    assert engine.statistics.drafts == proposed
    adaptive = engine.generate(
        "hello", max_new_tokens=30, mode="verified", ignore_eos=True,
        decoding=DecodeOptions(draft_layer=3),
    )  # fmt: skip
    # Drafts of a random model are not worth their row: after a look at the first, mode off.
    assert (adaptive.tokens, adaptive.statistics.drafts) == (off.tokens, DraftCount())
    assert adaptive.layers_saved == 0.0
    assert adaptive.compute_saved < 0.0  # that look is counted


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.7, "seed": 3}])
def test_logprobs_are_the_full_models(tiny, sampling):
    """Of accepted drafts, of what replaced wrong ones and of what followed them: every token's
    are those that mode off gives after the same text.
    """
    engine = tiny("llama").engine
    settings = {"max_new_tokens": 24, "ignore_eos": True, "logprobs": 5}
    options = DecodeOptions(draft_layer=3, draft_schedule=Fixed(3))
    done = engine.generate(PROMPT, mode="verified", decoding=options, **settings, **sampling)
    drafts = done.statistics.drafts
    assert 0 < drafts.accepted < drafts.proposed
    session = engine.session()
    session.extend([*PROMPT, *done.tokens[:-1]])
    full = session.log_probs(len(PROMPT) - 1)
    for found, row, token in zip(done.logprobs, full, done.tokens, strict=True):
        assert found.token == token
        assert found.logprob == pytest.approx(row[token], abs=1e-4)
        tokens, logprobs = zip(*found.alternatives, strict=True)
        np.testing.assert_allclose(logprobs, row[list(tokens)], atol=1e-4)
        np.testing.assert_allclose(logprobs, np.sort(row)[:-6:-1], atol=1e-4)
    if not sampling:
        off = engine.generate(PROMPT, **settings)
        assert done.tokens == off.tokens
        for mine, theirs in zip(done.logprobs, off.logprobs, strict=True):
            assert mine.logprob == pytest.approx(theirs.logprob, abs=1e-4)
            # To one rounding error: equal ones may change places.
            assert dict(mine.alternatives) == pytest.approx(dict(theirs.alternatives), abs=1e-4)


def test_what_cannot_draft(tiny):
    engine = tiny("llama").engine
    with pytest.raises(ExitUnavailableError, match=r"no exit point to draft at: run `adainfer cal"):
        engine.generate([5], mode="verified")
    with pytest.raises(
        ExitUnavailableError, match="draft_layer 4 is no boundary between engines: 1, 2, 3"
    ):
        engine.stream([5], mode="verified", decoding=DecodeOptions(draft_layer=4))
    assert engine.generate([5, 6], max_new_tokens=2, ignore_eos=True).tokens


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (lambda: DecodeOptions(draft_schedule=3), r"such as Fixed\(2\), found 3"),
        (lambda: DecodeOptions(draft_schedule=Fixed), r"such as Fixed\(2\), found <class"),
        (lambda: DecodeOptions(confidence=4.0), r"confidence must be ConfidenceDecay, found 4\.0"),
        (lambda: DecodeOptions(costs=1), "costs must be DecodeCosts, found 1"),
        (lambda: Fixed(-1), "drafts must be 0 or more, found -1"),
        (lambda: Fixed(1.5), r"drafts must be a whole number, found 1\.5"),
    ],
)
def test_bad_decode_options_are_one_line(options, message):
    with pytest.raises(RequestError, match=message):
        options()


# --- sampling --------------------------------------------------------------------------------


@pytest.mark.parametrize("drafts", [1, 3])
def test_sampled_tokens_are_distributed_as_in_mode_off(drafts):
    """Chi-square of 100,000 draws (twice): given the two tokens before, each follows the full
    model's distribution.
    """
    vocabulary, new = 5, 4000
    sampler = SoftmaxSampler(np.random.default_rng(7))
    expected = np.zeros((vocabulary,) * 3)
    observed = np.zeros((vocabulary,) * 3)
    accepted = 0
    for text in range(25):
        session = TableSession(vocabulary)
        session.extend([text % vocabulary, text // vocabulary % vocabulary])
        limit = session.length + new
        decoder = VerifiedDecoder(session, sampler, ExitDrafter(1), Fixed(drafts), limit)
        tokens = [*session.tokens, *(decoder.step().token for _ in range(new))]
        decoder.close()
        assert session.tokens == tuple(tokens[:-1])
        accepted += decoder.drafts.accepted
        for a, b, c in zip(tokens, tokens[1:], tokens[2:], strict=False):
            observed[a, b, c] += 1
            expected[a, b] += sampler.probabilities(session.full[a, b], ())
    assert observed.sum() == 100_000
    assert accepted > 10_000  # or nothing is tested
    statistic = ((observed - expected) ** 2 / expected).sum()
    freedom = vocabulary**2 * (vocabulary - 1)
    assert 0.001 < stats.chi2.sf(statistic, freedom) < 0.999
    # The test can fail: against what the drafts alone follow it does.
    early = np.stack([sampler.probabilities(row, ()) for row in session.early.reshape(-1, 5)])
    biased = observed.sum(axis=2, keepdims=True) * early.reshape(observed.shape)
    assert stats.chi2.sf(((observed - biased) ** 2 / biased).sum(), freedom) < 1e-6


# --- draft lengths ---------------------------------------------------------------------------


def after_a_wrong_draft(rate):
    acceptance = Acceptance(rate, prior_weight=1e9)
    acceptance.record(1, 0)
    return acceptance


def test_draft_lengths_follow_cost_and_acceptance():
    costs = DecodeCosts(layers=32, probe=0.65)
    schedule = Adaptive(costs, draft_layer=8)
    lengths = [schedule.length(after_a_wrong_draft(rate)) for rate in (0.05, 0.4, 0.7, 0.99)]
    assert lengths == sorted(lengths)
    assert (lengths[0], lengths[-1]) == (0, 7)
    for rate, length in zip((0.05, 0.4, 0.7, 0.99), lengths, strict=True):
        best = min(range(8), key=lambda n: costs.per_token(8, n, rate))
        assert length == best
    assert costs.per_token(8, 0, 0.5) == costs.token == 32.65
    # Two drafts, both right: 3 rows below, 2 checks, 3 rows together above and in the head.
    assert costs.round(8, 2) == pytest.approx(3 * 8 + 2 * 0.65 + 24.65 * 3 * 0.57)
    assert costs.per_token(8, 2, 1.0) == pytest.approx(costs.round(8, 2) / 3)


def test_drafts_that_can_never_pay_are_never_tried():
    dear_head = DecodeCosts(layers=30, probe=8.0)
    never = Adaptive(dear_head, draft_layer=27)
    record = Acceptance(0.9)
    record.record(1, 0)
    for _ in range(500):
        record.record_idle()
        assert never.length(record) == 0


def test_after_bad_luck_a_draft_is_tried_now_and_then():
    schedule = Adaptive(DecodeCosts(layers=32, probe=0.65), draft_layer=8, retry_every=10)
    record = Acceptance(0.6)
    assert schedule.length(record) > 0
    for _ in range(60):
        record.record(1, 0)
    lengths = []
    for _ in range(30):
        lengths.append(schedule.length(record))
        if lengths[-1]:
            record.record(1, 0)
        else:
            record.record_idle()
    assert lengths.count(1) == 2
    assert set(lengths) == {0, 1}
    for _ in range(10):
        record.record_idle()
    for _ in range(60):
        assert schedule.length(record) >= 1  # what is right is tried again at once
        record.record(1, 1)
    assert schedule.length(record) > 1


def test_a_request_begins_with_one_draft_where_drafts_might_pay():
    schedule = Adaptive(DecodeCosts(layers=32, probe=0.65), draft_layer=24)
    record = Acceptance(0.6)
    assert schedule._best(0.6) == 0
    assert schedule.length(record) == 1
    record.record(1, 0)
    assert schedule.length(record) == 0


def test_a_doubtful_draft_is_not_verified():
    costs = DecodeCosts(layers=30, probe=5.0)
    schedule = Adaptive(costs, draft_layer=10)
    least = costs.least_confidence(10, 0)
    assert least == pytest.approx((10 + 25 * (2 * 0.65 - 1)) / 35)
    assert schedule.keeps(least + 0.01, 0)
    assert not schedule.keeps(least - 0.01, 0)
