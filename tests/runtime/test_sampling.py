"""Sampling: the same probabilities as transformers' processors, and draws that follow them."""

from __future__ import annotations

from dataclasses import fields
from typing import get_type_hints

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from adainfer_runtime.confidence import ConfidenceDecay
from adainfer_runtime.decode_costs import DecodeCosts
from adainfer_runtime.decode_options import DecodeOptions
from adainfer_runtime.draft_schedule import Fixed
from adainfer_runtime.errors import RequestError
from adainfer_runtime.generation_options import CancelToken, GenerationKeywords, GenerationOptions
from adainfer_runtime.mode_policies import MODES
from adainfer_runtime.sampling import Drawn, Greedy, MinimumLength, make_sampler
from adainfer_runtime.sampling_options import SamplingKeywords, SamplingOptions

OPTIONS = st.builds(
    dict,
    temperature=st.sampled_from([0.3, 0.7, 1.0, 1.6]),
    top_k=st.sampled_from([0, 1, 5, 40, 10_000]),
    top_p=st.sampled_from([1.0, 0.05, 0.5, 0.9]),
    min_p=st.sampled_from([0.0, 0.05, 0.4]),
    repetition_penalty=st.sampled_from([1.0, 0.8, 1.3]),
    logit_bias=st.sampled_from([{}, {3: 2.5}, {1: -4.0, 7: 1.0}]),
)


def theirs(options, logits, tokens, prompt_length, minimum=0, ends=(1,)):
    """What `generate` would draw from, by the processors that it makes of these options."""
    processors = LogitsProcessorList()
    if options["logit_bias"]:
        bias = {(token,): value for token, value in options["logit_bias"].items()}
        processors.append(SequenceBiasLogitsProcessor(bias))
    if options["repetition_penalty"] != 1.0:
        processors.append(RepetitionPenaltyLogitsProcessor(options["repetition_penalty"]))
    if minimum:
        processors.append(
            MinNewTokensLengthLogitsProcessor(prompt_length, minimum, torch.tensor(ends))
        )
    processors.append(TemperatureLogitsWarper(options["temperature"]))
    if options["top_k"]:
        processors.append(TopKLogitsWarper(options["top_k"]))
    if options["top_p"] < 1.0:
        processors.append(TopPLogitsWarper(options["top_p"]))
    if options["min_p"]:
        processors.append(MinPLogitsWarper(options["min_p"]))
    scores = processors(torch.tensor([tokens]), torch.tensor(logits[None].astype(np.float64)))
    return torch.softmax(scores, -1)[0].numpy()


@settings(max_examples=150, deadline=None)
@given(options=OPTIONS, seed=st.integers(0, 10**6), size=st.sampled_from([12, 900]))
def test_probabilities_are_those_of_transformers(options, seed, size):
    random = np.random.default_rng(seed)
    logits = (random.normal(size=size) * random.choice([0.5, 3.0])).astype(np.float32)
    tokens = random.integers(0, size, 9).tolist()
    minimum = int(random.choice([0, 8]))
    sampler = Drawn(SamplingOptions(**options), 4, MinimumLength(minimum, frozenset({1})))
    before = logits.copy()
    np.testing.assert_allclose(
        sampler.probabilities(logits, tokens),
        theirs(options, logits, tokens, 4, minimum),
        atol=1e-9,
    )
    np.testing.assert_array_equal(logits, before)


def test_penalties_of_occurrences_count_the_text_alone():
    """OpenAI's formula: logits − frequency · count − presence · (count > 0)."""
    logits = np.linspace(-1, 1, 6).astype(np.float32)
    options = SamplingOptions(temperature=1.0, frequency_penalty=0.5, presence_penalty=0.25)
    found = Drawn(options, 2).probabilities(logits, [5, 5, 3, 3, 0])
    expected = logits.astype(np.float64) - [0.75, 0, 0, 1.25, 0, 0]
    expected = np.exp(expected) / np.exp(expected).sum()
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_greedy_with_penalties_takes_the_largest_of_the_changed_logits():
    logits = np.array([1.0, 3.0, 2.9], np.float32)
    sampler = make_sampler(SamplingOptions(repetition_penalty=1.5), 0)
    assert not sampler.plain
    assert sampler.draw(sampler.probabilities(logits, [])) == 1
    assert sampler.draw(sampler.probabilities(logits, [1])) == 2
    forbidden = make_sampler(SamplingOptions(logit_bias={1: float("-inf")}), 0)
    assert forbidden.draw(forbidden.probabilities(logits, [])) == 2


def test_only_unchanged_greedy_is_plain():
    assert isinstance(make_sampler(SamplingOptions(), 3), Greedy)
    assert isinstance(make_sampler(SamplingOptions(top_k=5, top_p=0.5, seed=3), 3), Greedy)
    assert not make_sampler(SamplingOptions(), 3, MinimumLength(2, frozenset({1}))).plain
    assert not make_sampler(SamplingOptions(temperature=0.1), 3).plain


def test_draws_follow_the_distribution():
    probabilities = np.array([0.0, 0.5, 0.0, 0.2, 0.25, 0.05, 0.0])
    sampler = Drawn(SamplingOptions(temperature=1.0, seed=1), 0)
    draws = np.bincount([sampler.draw(probabilities) for _ in range(20_000)], minlength=7)
    assert draws[probabilities == 0].sum() == 0
    held = probabilities > 0
    assert chisquare(draws[held], probabilities[held] * 20_000).pvalue > 1e-4
    scaled = Drawn(SamplingOptions(temperature=1.0, seed=1), 0)
    again = [scaled.draw(probabilities * 0.3) for _ in range(20_000)]  # need not sum to 1
    np.testing.assert_array_equal(np.bincount(again, minlength=7), draws)


def test_the_last_token_of_positive_probability_bounds_the_draw():
    sampler = Drawn(SamplingOptions(temperature=1.0), 0)
    sampler._random = type("Highest", (), {"random": lambda self: 1.0})()
    assert sampler.draw(np.array([0.5, 0.5, 0.0])) == 1


def test_seeds():
    probabilities = np.full(50, 0.02)

    def draws(seed):
        sampler = Drawn(SamplingOptions(temperature=1.0, seed=seed), 0)
        return [sampler.draw(probabilities) for _ in range(20)]

    assert draws(7) == draws(7)
    assert draws(7) != draws(8)
    assert draws(None) != draws(None)


@pytest.mark.parametrize("temperature", [1e-310, 5e-324, 1e-3])
@pytest.mark.parametrize("cut", [{}, {"top_k": 2}, {"top_p": 0.9}, {"min_p": 0.1}])
def test_however_small_a_temperature_the_largest_logit_is_taken(temperature, cut):
    logits = np.array([-3.0, 4.0, 30.0, 29.0], np.float32)
    sampler = Drawn(SamplingOptions(temperature=temperature, seed=0, **cut), 0)
    probabilities = sampler.probabilities(logits, [])
    np.testing.assert_allclose(probabilities, [0, 0, 1, 0], atol=1e-12)
    assert sampler.draw(probabilities) == 2


def test_infinite_logits_are_told_from_forbidden_ones():
    options = SamplingOptions(logit_bias={0: 1e307}, repetition_penalty=0.01)
    too_large = pytest.raises(RequestError, match="logit_bias is too large for the penalties")
    with too_large, np.errstate(over="ignore"):
        Drawn(options, 0).probabilities(np.zeros(2, np.float32), [0])


@pytest.mark.parametrize("given", [list, tuple, iter, np.array])
def test_ends_may_be_given_by_any_iterable(given):
    options = GenerationOptions.of({"stop": given(["a", "b"]), "stop_token_ids": given([7, 8])})
    assert (options.stop_strings, options.stop_ids) == (("a", "b"), (7, 8))
    assert options.ends([1]) == ({1}, {7, 8})
    assert GenerationOptions.of({"stop": "ab"}).stop_strings == ("ab",)
    assert GenerationOptions.of({"stop": None, "stop_token_ids": None}).stop_ids == ()


def test_everything_forbidden():
    sampler = Drawn(SamplingOptions(logit_bias={0: -np.inf, 1: -np.inf}), 0)
    with pytest.raises(RequestError, match="logit_bias and min_new_tokens forbid every token"):
        sampler.probabilities(np.zeros(2, np.float32), [])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, "temperature must be 0 (greedy) or more, found -0.1"),
        ({"temperature": float("nan")}, "temperature must be 0 (greedy) or more, found nan"),
        ({"temperature": float("inf")}, "temperature must be 0 (greedy) or more, found inf"),
        ({"top_k": -1}, "top_k must be 0 (all) or more, found -1"),
        ({"top_k": 2.5}, "top_k must be a whole number, found 2.5"),
        ({"top_p": 0}, "top_p must be above 0 and at most 1, found 0"),
        ({"top_p": 1.1}, "top_p must be above 0 and at most 1, found 1.1"),
        ({"min_p": 1.5}, "min_p must be between 0 and 1, found 1.5"),
        (
            {"repetition_penalty": 0.0},
            "repetition_penalty must be between 0.01 and 100.0 (1 does nothing), found 0.0",
        ),
        (
            {"repetition_penalty": 1e-320},
            "repetition_penalty must be between 0.01 and 100.0 (1 does nothing), found 1e-320",
        ),
        ({"frequency_penalty": 3}, "frequency_penalty must be between -2 and 2, found 3"),
        ({"presence_penalty": -2.5}, "presence_penalty must be between -2 and 2, found -2.5"),
        ({"seed": -1}, "seed must be 0 or more, found -1"),
        (
            {"logit_bias": {4: float("nan")}},
            "logit_bias of token 4 must be finite, or minus infinity, found nan",
        ),
        ({"logit_bias": {"a": 1.0}}, "logit_bias token must be a whole number, found 'a'"),
        ({"max_new_tokens": 4, "min_new_tokens": 5}, "min_new_tokens must be between 0 and"),
        ({"logprobs": 101}, "logprobs must be between 0 and 100 alternatives, found 101"),
        ({"timeout": -1.0}, "timeout must be 0 or more seconds, found -1.0"),
        ({"stop": ["a", ""]}, "a stop string is empty"),
        ({"level": 0.02, "temperature": 0.5}, "certificates speak of greedy decoding"),
        ({"level": 0.02, "repetition_penalty": 1.1}, "certificates speak of greedy decoding"),
        ({"max_new_tokens": "2"}, "max_new_tokens must be a whole number, found '2'"),
        ({"max_new_tokens": 2.5}, "max_new_tokens must be a whole number, found 2.5"),
        ({"max_new_tokens": None}, "max_new_tokens must be a whole number, found None"),
        ({"min_new_tokens": True}, "min_new_tokens must be a whole number, found True"),
        ({"logprobs": 1.0}, "logprobs must be a whole number, found 1.0"),
        ({"timeout": "1"}, "timeout must be a number, found '1'"),
        ({"temperature": "1"}, "temperature must be a number, found '1'"),
        ({"top_k": None}, "top_k must be a whole number, found None"),
        ({"logit_bias": None}, "logit_bias must map token ids to numbers, found None"),
        ({"logit_bias": {4: "a"}}, "logit_bias of token 4 must be a number, found 'a'"),
        ({"stop": 5}, "stop must be a list, found 5"),
        ({"stop": {"a": 1}}, "stop must be a list, found {'a': 1}"),
        ({"stop_token_ids": {5: 1}}, "stop_token_ids must be a list, found {5: 1}"),
        ({"stop": [5]}, "stop must be text, or a list of texts, found 5 in it"),
        ({"stop_token_ids": 5}, "stop_token_ids must be a list, found 5"),
        ({"stop_token_ids": ["a"]}, "a token id of stop_token_ids must be a whole number, found"),
        ({"decoding": {"draft_layer": 3}}, "decoding must be DecodeOptions, found {'draft"),
        ({"cancel": True}, "cancel must be a CancelToken, found True"),
        (
            {"level": 0.02, "decoding": DecodeOptions(probe="shortlist")},
            "certificates speak of exits as they were calibrated; leave confidence decay and the",
        ),
        (
            {"level": 0.02, "decoding": DecodeOptions(confidence=ConfidenceDecay(4.0, 8))},
            "certificates speak of exits as they were calibrated",
        ),
    ],
)
def test_bad_options_are_one_line(options, message):
    with pytest.raises(RequestError) as caught:
        GenerationOptions.of(options)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_none_stops_nothing():
    options = GenerationOptions(stop=None, stop_token_ids=None)
    assert (options.stop_strings, options.stop_ids) == ((), ())
    assert options.ends((7,)) == (frozenset({7}), frozenset())


@pytest.mark.parametrize(
    ("options", "takers"),
    [
        ({"threshold": 0.5}, "adaptive, context or auto"),
        ({"kv_policy": "propagate"}, "adaptive, context, combined or auto"),
        ({"confidence": ConfidenceDecay(4.0, 8)}, "adaptive or auto"),
        ({"probe": "shortlist"}, "adaptive, combined, verified or auto"),
        ({"exit_looks": "always"}, "adaptive, context, combined or auto"),
        ({"draft_layer": 3}, "verified or auto"),
        ({"draft_schedule": Fixed(2)}, "verified or auto"),
        ({"acceptance": 0.5}, "verified or auto"),
        ({"costs": DecodeCosts(4, probe=1.0)}, "adaptive, verified or auto"),
    ],
)
def test_modes_refuse_what_they_would_ignore(options, takers):
    """And `takers` is all of them: nobody else takes the option, each of them does."""
    (name,) = options
    given = options if name == "threshold" else {"decoding": DecodeOptions(**options)}
    for mode in MODES:
        if mode in takers.replace(",", " ").split():
            assert GenerationOptions(mode=mode, **given).mode == mode
        else:
            with pytest.raises(RequestError) as caught:
                GenerationOptions(mode=mode, **given)
            assert str(caught.value).startswith(name)
            assert f"has no effect in mode {mode}: leave it out, or use mode {takers}" in str(
                caught.value
            )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"acceptance": 7}, "acceptance must be between 0 and 1, found 7"),
        ({"acceptance": float("nan")}, "acceptance must be between 0 and 1, found nan"),
        ({"draft_layer": 2.0}, "draft_layer must be a whole number, found 2.0"),
        ({"kv_policy": "copy"}, "kv_policy 'copy' is unknown: deferred, propagate, translated"),
        ({"probe": None}, "probe None is unknown: full, shortlist"),
        ({"exit_looks": "never"}, "exit_looks 'never' is unknown: paying, always"),
    ],
)
def test_bad_decode_options(options, message):
    with pytest.raises(RequestError) as caught:
        DecodeOptions(**options)
    assert str(caught.value) == message


def test_unknown_option():
    with pytest.raises(RequestError, match=r"^tempature is no option of a request: did you mean "):
        GenerationOptions.of({"tempature": 1.0})
    with pytest.raises(RequestError, match=r"did you mean max_new_tokens\?$"):
        GenerationOptions.of({"max_tokens": 4})
    with pytest.raises(RequestError, match="zzz is no option of a request: there are cancel, deco"):
        GenerationOptions.of({"zzz": 4})


def test_keywords_are_the_options():
    names = {field.name for field in fields(GenerationOptions)} - {"sampling"}
    sampling = {field.name for field in fields(SamplingOptions)}
    assert set(get_type_hints(GenerationKeywords)) == names | sampling
    assert set(get_type_hints(SamplingKeywords)) == sampling
    theirs, ours = get_type_hints(SamplingKeywords), get_type_hints(SamplingOptions)
    assert theirs == {name: ours[name] for name in theirs}
    theirs, ours = get_type_hints(GenerationKeywords), get_type_hints(GenerationOptions)
    assert {name: theirs[name] for name in names} == {name: ours[name] for name in names}


def test_cancel_token():
    token = CancelToken()
    assert not token()
    token.cancel()
    assert token()
