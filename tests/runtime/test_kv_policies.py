"""KV policies: what a position that stopped early leaves for those that go deeper."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adainfer_runtime import FixedExit, NoExit, Session
from adainfer_runtime.decoding import PolicyDecoder
from adainfer_runtime.errors import ExitUnavailableError, RequestError
from adainfer_runtime.generate import GenerateRequest, generate
from adainfer_runtime.ledger import Ledger, StageCost, WorkCount
from adainfer_runtime.manifest import ExitPoint, ExitSpec
from adainfer_runtime.sampling import Greedy

from ..scripted import ScriptedExit

PROMPT = [5, 17, 200, 43, 9, 120, 77]


class TrueKeysAndValues:
    """A back end whose approximations are the full model's own K and V."""

    def __init__(self, backend, full):
        self._backend, self._full = backend, full
        self.filled = []

    def __getattr__(self, name):
        return getattr(self._backend, name)

    def kv_fill(self, layer, hidden, start):
        self.filled.append((layer, start, len(hidden)))
        rows = slice(start, start + len(hidden))
        return tuple(part[:, rows].copy() for part in self._full.kv(layer))

    def translate(self, exit_layer, hidden, start):
        layers = range(exit_layer + 1, 5)
        return {layer: self.kv_fill(layer, hidden, start) for layer in layers}


def with_context_points(manifest, layers):
    """A manifest whose folder could translate after some layers (no files are read for that)."""
    points = tuple(
        ExitPoint(exit_layer=layer, translate="x.onnx", multiply_adds=1000 + layer)
        for layer in layers
    )
    spec = ExitSpec.model_construct(
        points=points, classifier=None, threshold=None, target_agreement=0.99
    )
    return manifest.model_copy(update={"context_exit": spec})


@settings(max_examples=30, deadline=None)
@given(
    exits=st.lists(st.integers(0, 3), min_size=1, max_size=14),
    kv_policy=st.sampled_from(["propagate", "translated"]),
)
def test_over_true_keys_and_values_deeper_positions_are_exact(tiny, exits, kv_policy):
    """So fills stand where later positions look for them, whatever the exits were."""
    engine = tiny("llama").engine
    text = [*PROMPT, *np.random.default_rng(len(exits)).integers(2, 320, len(exits)).tolist()]
    full = engine.session()
    full.extend(text)
    full.complete()
    backend = TrueKeysAndValues(engine.backend, full)
    session = Session(backend, with_context_points(engine.manifest, [1, 2, 3]))
    policy = ScriptedExit(exits, engine.manifest.boundaries[:-1])
    for step, _ in enumerate(exits):
        session.extend(text[: len(PROMPT)] if step == 0 else [text[session.length]])
        policy.next()
        prediction = session.predict(policy, kv_policy=kv_policy)
        assert list(session.filled) == sorted(session.filled, reverse=True)
        if prediction.exit_layer == 4:
            np.testing.assert_allclose(
                session.hidden()[-1], full.hidden()[session.length - 1], atol=1e-4
            )
            assert "pending" not in session.kv_states(4)
    for layer in range(1, 5):
        for mine, own in zip(session.kv(layer), full.kv(layer), strict=True):
            np.testing.assert_allclose(mine, own[:, : mine.shape[1]], atol=1e-4)
    filled = [
        position for _, start, rows in backend.filled for position in range(start, start + rows)
    ]
    assert 0 not in filled  # the first position is computed, in one row


@settings(max_examples=30, deadline=None)
@given(
    steps=st.lists(
        st.tuples(st.integers(0, 3), st.sampled_from(["deferred", "propagate"]), st.integers(0, 3)),
        min_size=1,
        max_size=12,
    )
)
def test_policies_may_change_within_a_sequence(tiny, steps):
    """The ledger tells which entries are exact; those of positions before any fill equal off's."""
    engine = tiny("llama").engine
    session = engine.session()
    session.extend(PROMPT)
    policy = ScriptedExit([layer for layer, _, _ in steps], engine.manifest.boundaries[:-1])
    for _, kv_policy, cut in steps:
        policy.next()
        session.predict(policy, kv_policy=kv_policy)
        if cut and session.length > cut + 1:
            session.truncate(session.length - cut)
        session.extend([11 + cut])
        states = [session.kv_states(layer) for layer in range(1, 5)]
        for above, below in zip(states[1:], states, strict=False):
            for deep, shallow in zip(above, below, strict=True):
                assert shallow == "exact" or deep != "exact"
                assert (shallow, deep) != ("pending", "propagated")
        for layer, state in enumerate(states, 1):
            assert session.kv(layer)[0].shape[1] == len(state) - state.count("pending")
    session.complete()
    exact = session.exact_length
    off = engine.session()
    off.extend(session.tokens)
    off.complete()
    assert all(session.kv_states(layer)[:exact] == ("exact",) * exact for layer in range(1, 5))
    for layer in range(1, 5):
        for mine, full in zip(session.kv(layer), off.kv(layer), strict=True):
            np.testing.assert_allclose(mine[:, :exact], full[:, :exact], atol=1e-4)
    np.testing.assert_allclose(session.hidden(0, exact), off.hidden(0, exact), atol=1e-4)
    if exact < session.length:
        session.truncate(exact)
        assert session.exact_length == exact


def test_propagated_entries_are_made_from_the_exits_hidden_state(tiny):
    engine = tiny("llama").engine
    session = engine.session()
    session.extend(PROMPT)
    session.predict(FixedExit(2), kv_policy="propagate")
    hidden = session.hidden().copy()
    before = session.count
    session.extend([9])
    session.predict(FixedExit(2), kv_policy="propagate")
    assert session.filled == (8, 8, 0, 0)  # nobody went deeper: nothing had to be filled
    session.predict(NoExit(), kv_policy="propagate")
    states = ("exact", *["propagated"] * 6, "exact")
    assert [session.kv_states(layer) for layer in (2, 3, 4)] == [("exact",) * 8, states, states]
    assert session.exact_length == 1
    for layer in (3, 4):
        made = engine.backend.kv_fill(layer, hidden[1:], 1)
        for mine, own in zip(session.kv(layer), made, strict=True):
            np.testing.assert_allclose(mine[:, 1:7], own, atol=1e-6)
    work = session.count - before
    # Position 7 ran 4 layers, position 0 the two above its exit; 6 positions were filled there.
    assert (work.executed, work.filled) == (4 + 2, 12)
    fills = 6 * 2 * engine.manifest.kv_fills[3].multiply_adds
    assert work.compute > fills > 0


def test_fills_cost_what_the_manifest_says(tiny):
    engine = tiny("llama").engine
    counts = {}
    for kv_policy in ("deferred", "propagate"):
        session = engine.session()
        session.extend(PROMPT)
        session.predict(FixedExit(2), kv_policy=kv_policy)
        session.extend([9])
        before = session.count
        session.predict(NoExit(), kv_policy=kv_policy)
        counts[kv_policy] = session.count - before
    assert (counts["deferred"].executed, counts["deferred"].filled) == (4 + 7 * 2, 0)
    assert (counts["propagate"].executed, counts["propagate"].filled) == (4 + 2, 12)
    assert counts["propagate"].compute < counts["deferred"].compute
    stages = engine.manifest.layer_stages
    exact = sum(stage.multiply_adds for stage in stages[2:])
    per_pair = 2 * 4 * 16
    attention = 2 * per_pair * (sum(range(1, 8)) - 1)
    saved = 6 * (exact - 2 * engine.manifest.kv_fills[3].multiply_adds) + attention
    assert counts["deferred"].compute - counts["propagate"].compute == saved


def test_positions_that_no_map_serves_stay_deferred(tiny):
    engine = tiny("llama").engine
    full = engine.session()
    full.extend([*PROMPT, 9])
    full.complete()
    backend = TrueKeysAndValues(engine.backend, full)
    session = Session(backend, with_context_points(engine.manifest, [3]))
    session.extend(PROMPT)
    session.predict(FixedExit(2), kv_policy="translated")
    session.extend([9])
    session.predict(NoExit(), kv_policy="translated")
    assert backend.filled == []
    assert session.kv_states(4) == ("exact",) * 8
    np.testing.assert_allclose(session.hidden(), full.hidden(), atol=1e-4)


def test_decoders_pass_the_policy_on(tiny):
    engine = tiny("llama").engine
    session = engine.session()
    policy = ScriptedExit([2, 0, 3, 0, 2], engine.manifest.boundaries[:-1])

    class Stepped(PolicyDecoder):
        def step(self):
            policy.next()
            return super().step()

    decoder = Stepped(session, policy, Greedy(), "propagate")
    done = generate(session, decoder, GenerateRequest(PROMPT, 5), 128)
    assert done.exit_layers == (2, 4, 3, 4, 2)
    assert (done.prompt + done.decode).filled == 6 * 2 + 1 * 1
    assert session.exact_length == 1


def test_bad_policies(tiny):
    engine = tiny("llama").engine
    session = engine.session()
    session.extend(PROMPT)
    with pytest.raises(RequestError, match="kv_policy 'copy' is unknown: deferred, propagate, tra"):
        session.predict(NoExit(), kv_policy="copy")
    with pytest.raises(
        ExitUnavailableError, match="translated needs a context exit: run `adainfer"
    ):
        session.predict(NoExit(), kv_policy="translated")
    stages = tuple(stage for stage in engine.manifest.stages if stage.kind != "kv_fill")
    bare = Session(engine.backend, engine.manifest.model_copy(update={"stages": stages}))
    bare.extend(PROMPT)
    with pytest.raises(ExitUnavailableError, match="target ort-cpu has no kv_fill stages"):
        bare.predict(NoExit(), kv_policy="propagate")
    assert session.predict(NoExit()).exit_layer == 4


def test_the_ledger_counts_fills():
    ledger = Ledger((StageCost(2), StageCost(3), StageCost(1)))
    ledger.admit(4)
    for todo in ledger.plan(1, 9):
        ledger.record(todo)
    ledger.stop()
    assert ledger.waiting == range(3)  # the last position may still be asked to go deeper
    ledger.admit(1)
    assert ledger.waiting == range(4)
    ledger.fill(0, 1, None)
    ledger.fill(1, 4, "translated", compute=50)
    assert ledger.filled == (4, 4, 4)
    assert [ledger.computed(position) for position in range(5)] == [3, 1, 1, 1, 0]
    assert [ledger.state(2, position) for position in range(5)] == [
        "exact",
        "translated",
        "translated",
        "translated",
        "pending",
    ]
    assert ledger.count == WorkCount(8, 30, 50, 0, filled=12)
    ledger.truncate(1)
    assert (ledger.exact_length, ledger.filled, ledger.waiting) == (1, (1, 1, 1), range(1, 0))
