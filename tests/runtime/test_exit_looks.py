"""Whether tokens of a text look at exit points."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adainfer_runtime import ClassifierExit, DecodeOptions, Engine, FixedExit, NoExit
from adainfer_runtime.decode_costs import DecodeCosts, FillCosts
from adainfer_runtime.decoding import PolicyDecoder
from adainfer_runtime.exit_looks import Always, ExitCosts, Paying
from adainfer_runtime.exit_policy import ExitCheck
from adainfer_runtime.sampling import Greedy

from .test_deferred import PROMPT, _Scorer
from .test_planning import exits

LARGE = DecodeCosts(layers=32, probe=0.5, classifier=0.25, rows=((1, 1.0), (2, 0.6), (4, 0.5)))
SMALL = DecodeCosts(layers=30, probe=5.0)  # a dear head: SmolLM2's
# Of one position, and of four together; only what left after layer 16 has a map.
FILLS = {
    "propagate": FillCosts((1, 4), {8: (6.0, 12.0), 16: (4.0, 8.0), 24: (2.0, 4.0)}),
    "translated": FillCosts((1, 4), {16: (1.0, 3.0)}),
}


def test_cost_of_a_token_that_looks():
    two = ExitCosts(LARGE, (16, 24))
    # Nobody leaves: every layer, and two looks more.
    assert two.token((0.0, 0.0)) == pytest.approx(LARGE.token + 2 * 0.75)
    # Half leave at 16: the others go on, with one skipped row along (a fifth of its own pass).
    left = 16.75 + 0.5 * (8.75 + 8.5) + 0.5 * 16 * 0.2
    assert two.token((0.5, 0.0)) == pytest.approx(left)
    filled = ExitCosts(LARGE, (16, 24), "propagate")
    assert filled.token((0.5, 0.0)) == pytest.approx(left - 1.6)  # of an unknown price: none
    confirmed = ExitCosts(LARGE, (16, 24), confirmed=True)
    assert confirmed.token((0.5, 0.0)) == pytest.approx(left + 0.25)
    # Many wait for one that goes deeper: their rows are cheaper together.
    assert two.token((0.75, 0.0)) == pytest.approx(16.75 + 0.25 * 17.25 + 0.75 * 16 * 1 / 3)
    assert two.token((0.25, 0.5)) == pytest.approx(
        16.75 + 0.75 * 8.75 + 0.25 * 8.5 + (0.25 * 16 + 0.5 * 8) / 3
    )


def test_a_token_that_leaves_pays_for_what_fills_its_layers():
    costs = replace(LARGE, fills=FILLS)
    free, propagated, translated, deferred = (
        ExitCosts(known, (16, 24), policy)
        for known, policy in (
            (LARGE, "propagate"), (costs, "propagate"), (costs, "translated"), (costs, "deferred"),
        )
    )  # fmt: skip
    half, often = (0.5, 0.0), (0.8, 0.0)
    assert propagated.token(half) == pytest.approx(free.token(half) + 0.5 * 4.0)
    assert translated.token(half) == pytest.approx(free.token(half) + 0.5 * 1.0)
    # Four wait for one that goes deeper, and are filled in one go.
    assert propagated.token(often) == pytest.approx(free.token(often) + 0.8 * 8.0 / 4)
    # The policy has no map there: what waits is run, as under the exact policy.
    assert translated.token((0.0, 0.5)) == pytest.approx(deferred.token((0.0, 0.5)))
    assert propagated.token((0.0, 0.5)) != pytest.approx(deferred.token((0.0, 0.5)))


def test_dear_fills_are_not_worth_a_look():
    """Half of the tokens leave: that pays unless filling eats what it spares."""
    dear = {"propagate": FillCosts((1,), {24: (9.0,)})}
    shares = (0.0, 0.5)
    for fills, layers in ((FILLS, (24,)), (dear, ())):
        every = ExitCosts(replace(LARGE, fills=fills), (16, 24), "propagate")
        assert every.cheapest(shares)[0].layers == layers
    # A text's tokens then look no more, but for one now and then.
    costs = replace(LARGE, fills=dear)
    paying = Paying(ExitCosts(costs, (24,), "propagate"), (0.5,), retry_every=10)
    assert looked(paying, lambda token: 24, 30, layer=24) == []


def looked(paying, exits, tokens, layer=16):
    """At which of so many tokens it looks, where looks leave at `exits(token)`."""
    found = []
    for token in range(tokens):
        due = bool(paying.narrow(FixedExit(layer)).checks)
        paying.record(exits(token) if due else None)
        if due:
            found.append(token)
    return found


def test_looks_go_on_while_they_pay():
    assert looked(Paying(ExitCosts(LARGE, (16,)), (0.6,)), lambda token: 16, 50) == [*range(50)]


def test_a_dear_head_is_asked_once_in_a_while():
    paying = Paying(ExitCosts(SMALL, (22, 26)), (0.3, 0.2))
    assert looked(paying, lambda token: 30, 200, layer=22) == [0, 65, 130, 195]


def test_an_easier_passage_is_noticed():
    paying = Paying(ExitCosts(LARGE, (16,)), (0.0,), retry_every=10)
    found = looked(paying, lambda token: 16 if token > 25 else 32, 60)
    assert found[:4] == [0, 11, 22, 33]
    assert found[3:] == [*range(33, 60)]


def test_exits_that_can_never_pay_are_never_looked_at():
    assert looked(Paying(ExitCosts(SMALL, (29,)), (0.9,)), lambda token: 29, 200) == []
    assert looked(Always(), lambda token: 29, 5) == [*range(5)]


@given(
    shares=st.lists(st.floats(0.0, 0.3), min_size=3, max_size=3),
    check=st.floats(0.0, 6.0),
    probe=st.floats(0.0, 6.0),
    policy=st.sampled_from(["deferred", "propagate", "translated"]),
    confirmed=st.booleans(),
)
def test_points_are_those_that_cost_least(shares, check, probe, policy, confirmed):
    """Against every set of points, one by one."""
    costs = DecodeCosts(layers=32, probe=probe, classifier=check, rows=LARGE.rows, fills=FILLS)
    every = ExitCosts(costs, (8, 16, 24), policy, confirmed=confirmed)

    def cost(kept):
        layers = tuple(every.layers[point] for point in kept)
        bounds = (-1, *kept)
        moved = [sum(shares[a + 1 : b + 1]) for a, b in pairwise(bounds)]
        return replace(every, layers=layers).token(moved)

    sets = [kept for n in range(4) for kept in combinations(range(3), n)]
    chosen, moved = every.cheapest(shares)
    assert chosen.token(moved) == pytest.approx(min(map(cost, sets)))
    assert set(chosen.layers) <= set(every.layers)


def test_a_text_looks_where_it_pays():
    """A dear look at the first point, at which few leave, is left out; now and then it is taken."""
    costs = DecodeCosts(layers=32, probe=0.5, classifier=1.5, rows=LARGE.rows)
    paying = Paying(ExitCosts(costs, (8, 24), "propagate"), (0.02, 0.9), retry_every=10)
    policy = Scripted((8, 24))
    seen = []
    for _ in range(30):
        narrowed = paying.narrow(policy)
        seen.append(tuple(check.layer for check in narrowed.checks))
        paying.record(24)
    assert seen[0] == (8, 24)
    assert seen[1:10] == [(24,)] * 9
    assert seen.count((8, 24)) == 3


class Scripted:
    """Exit points alone."""

    def __init__(self, layers):
        self.checks = tuple(ExitCheck(layer) for layer in layers)


def test_a_decoder_looks_when_it_is_due(tiny):
    engine = tiny("llama").engine
    depths = {1: 0.25, 2: 0.5, 3: 0.75}
    policy = ClassifierExit(_Scorer(engine.backend, 1.0), "svm", (1, 2, 3), depths, 0.5, 1)

    class EveryThird:
        def __init__(self):
            self.seen = []

        def narrow(self, policy):
            return NoExit() if len(self.seen) % 3 else policy

        def record(self, exit_layer):
            self.seen.append(exit_layer)

    session, looks = engine.session(), EveryThird()
    session.extend(PROMPT)
    decoder = PolicyDecoder(session, policy, Greedy(), looks=looks)
    # The first token looks in any case: its exit is the prompt's. It tells of the others too.
    assert [decoder.step().exit_layer for _ in range(7)] == [1, 4, 4, 1, 4, 4, 1]
    assert looks.seen == [1, None, None, 1, None, None, 1]


def test_requests_take_what_pays_or_always_look(tiny):
    engine = tiny("llama").engine
    spec = exits(((0.9,), (0.9,), (0.9,)))
    manifest = engine.manifest.model_copy(update={"exit": spec})
    backend = _Scorer(engine.backend, 1.0)
    looking = Engine(manifest, backend, engine.tokenizer)
    dear = DecodeCosts(layers=4, probe=30.0)
    free = DecodeCosts(layers=4, probe=0.0)
    settings = {"max_new_tokens": 6, "mode": "adaptive", "ignore_eos": True}
    for options, expected in (
        (DecodeOptions(costs=dear), (2, 4, 4, 4, 4, 4)),
        (DecodeOptions(costs=dear, exit_looks="always"), (2,) * 6),
        (DecodeOptions(costs=free), (2,) * 6),
    ):
        result = looking.generate(PROMPT, decoding=options, **settings)
        assert result.exit_layers == expected


def test_approximate_fills_are_counted(tiny):
    engine = tiny("llama").engine
    manifest = engine.manifest.model_copy(update={"exit": exits(((0.9,), (0.9,), (0.9,)))})
    backend = _Scorer(engine.backend, 1.0)
    looking = Engine(manifest, backend, engine.tokenizer)
    backend.classify = lambda kind, result, depth, state: (next(scores), state)
    scores = iter([1.0, -1.0, 1.0])
    always = DecodeOptions(kv_policy="propagate", exit_looks="always")
    settings = {"max_new_tokens": 3, "mode": "adaptive", "ignore_eos": True}
    done = looking.generate(PROMPT, decoding=always, **settings)
    assert done.exit_layers == (2, 4, 2)
    # The prompt left two of four layers out, which the second token went through; the first
    # position is computed.
    assert (done.statistics.kv_filled, done.statistics.kv_fills) == (2 * (len(PROMPT) - 1), 0)
    assert looking.statistics.kv_filled == done.statistics.kv_filled


def test_requests_pay_the_fills_of_their_kv_policy(tiny):
    """Under `propagate` dear fills keep a text from looking; under `deferred` nothing is filled."""
    engine = tiny("llama").engine
    manifest = engine.manifest.model_copy(update={"exit": exits(((0.9,), (0.9,), (0.9,)))})
    looking = Engine(manifest, _Scorer(engine.backend, 1.0), engine.tokenizer)
    settings = {"max_new_tokens": 6, "mode": "adaptive", "ignore_eos": True}
    cheap, dear = (
        DecodeCosts(layers=4, probe=0.0, fills={"propagate": FillCosts((1,), {2: (price,)})})
        for price in (0.25, 3.0)
    )
    for costs, policy, expected in (
        (cheap, "propagate", (2,) * 6),
        (dear, "propagate", (2, 4, 4, 4, 4, 4)),
        (dear, "deferred", (2,) * 6),
    ):
        options = DecodeOptions(costs=costs, kv_policy=policy)
        assert looking.generate(PROMPT, decoding=options, **settings).exit_layers == expected
