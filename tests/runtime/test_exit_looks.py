"""Whether tokens of a text look at exit points."""

from __future__ import annotations

import pytest

from adainfer_runtime import ClassifierExit, DecodeOptions, Engine
from adainfer_runtime.decode_costs import DecodeCosts
from adainfer_runtime.decoding import PolicyDecoder
from adainfer_runtime.exit_looks import Always, ExitCosts, Paying
from adainfer_runtime.sampling import Greedy

from .test_deferred import PROMPT, _Scorer
from .test_planning import exits

LARGE = DecodeCosts(layers=32, probe=0.5, classifier=0.25, rows=((1, 1.0), (2, 0.6), (4, 0.5)))
SMALL = DecodeCosts(layers=30, probe=5.0)  # a dear head: SmolLM2's


def test_cost_of_a_token_that_looks():
    two = ExitCosts(LARGE, (16, 24))
    # Nobody leaves: every layer, and two looks more.
    assert two.token((0.0, 0.0)) == pytest.approx(LARGE.token + 2 * 0.75)
    # Half leave at 16: the others go on, with one skipped row along (a fifth of its own pass).
    left = 16.75 + 0.5 * (8.75 + 8.5) + 0.5 * 16 * 0.2
    assert two.token((0.5, 0.0)) == pytest.approx(left)
    filled = ExitCosts(LARGE, (16, 24), fills=True)
    assert filled.token((0.5, 0.0)) == pytest.approx(left - 1.6)
    confirmed = ExitCosts(LARGE, (16, 24), confirmed=True)
    assert confirmed.token((0.5, 0.0)) == pytest.approx(left + 0.25)
    # Many wait for one that goes deeper: their rows are cheaper together.
    assert two.token((0.75, 0.0)) == pytest.approx(16.75 + 0.25 * 17.25 + 0.75 * 16 * 1 / 3)
    assert two.token((0.25, 0.5)) == pytest.approx(
        16.75 + 0.75 * 8.75 + 0.25 * 8.5 + (0.25 * 16 + 0.5 * 8) / 3
    )


def looked(paying, exits, tokens):
    """At which of so many tokens it looks, where looks leave at `exits(token)`."""
    found = []
    for token in range(tokens):
        due = paying.due()
        paying.record(exits(token) if due else None)
        if due:
            found.append(token)
    return found


def test_looks_go_on_while_they_pay():
    assert looked(Paying(ExitCosts(LARGE, (16,)), (0.6,)), lambda token: 16, 50) == [*range(50)]


def test_a_dear_head_is_asked_once_in_a_while():
    paying = Paying(ExitCosts(SMALL, (22, 26)), (0.3, 0.2))
    assert looked(paying, lambda token: 30, 200) == [0, 65, 130, 195]


def test_an_easier_passage_is_noticed():
    paying = Paying(ExitCosts(LARGE, (16,)), (0.0,), retry_every=10)
    found = looked(paying, lambda token: 16 if token > 25 else 32, 60)
    assert found[:4] == [0, 11, 22, 33]
    assert found[3:] == [*range(33, 60)]


def test_exits_that_can_never_pay_are_never_looked_at():
    assert looked(Paying(ExitCosts(SMALL, (29,)), (0.9,)), lambda token: 29, 200) == []
    assert looked(Always(), lambda token: 29, 5) == [*range(5)]


def test_a_decoder_looks_when_it_is_due(tiny):
    engine = tiny("llama").engine
    depths = {1: 0.25, 2: 0.5, 3: 0.75}
    policy = ClassifierExit(_Scorer(engine.backend, 1.0), "svm", (1, 2, 3), depths, 0.5, 1)

    class EveryThird:
        def __init__(self):
            self.seen = []

        def due(self):
            return len(self.seen) % 3 == 0

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
