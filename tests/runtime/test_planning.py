"""Forecasts from stage times, and the mode that follows from them."""

from __future__ import annotations

import json
import math
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from adainfer_runtime import Engine
from adainfer_runtime.certificate import device_class
from adainfer_runtime.commands.app import build_app
from adainfer_runtime.engine_folder import load_manifest, write_manifest
from adainfer_runtime.errors import ExitUnavailableError, RequestError
from adainfer_runtime.evaluation.answers import ask
from adainfer_runtime.evaluation.methods import Method
from adainfer_runtime.exit_policy import ExitCheck, NoExit, first_checks
from adainfer_runtime.generation_options import GenerationOptions
from adainfer_runtime.manifest import (
    Certificate,
    CertificateLevel,
    ClassifierSpec,
    ExitPoint,
    ExitSpec,
    LengthShares,
    Manifest,
)
from adainfer_runtime.plan_spec import FillTimes, Machine, PlanSpec, StageTimes
from adainfer_runtime.planning import (
    RecentExits,
    RequestShape,
    TimePredictor,
    machine,
    measure_times,
)
from adainfer_runtime.tasks import TaskExample
from adainfer_runtime.text_request import prepare
from tests.export.exit_folder import make_exit_folder

from .test_deferred import PROMPT

# A layer takes 1 s + 1 s for 10 positions; other times are powers of ten, to be told apart.
TIMES = StageTimes(
    rows=(1, 10),
    layer=(1.1, 2.0),
    embed=(0.0, 0.0),
    pair_one=0.01,
    pair_many=0.02,
    step=7.0,
    step_past=4,
    probe=100.0,
    candidates=1000.0,
    adapter=1e4,
    classifier=1e5,
    context_rows=(2, 10),
    context={2: (2e6, 1e7)},
)
PREDICTOR = TimePredictor(TIMES, num_layers=4, max_rows=10)


def test_layers_are_added_up_in_passes():
    assert PREDICTOR.layers(1, 1) == pytest.approx(1.1)
    assert PREDICTOR.layers(3, 10) == pytest.approx(6.0)
    assert PREDICTOR.layers(1, 1, past=7) == pytest.approx(1.1 + 0.07)
    # Ten, then five more that attend to the ten before them.
    half = 1.1 + 0.9 * 4 / 9
    assert PREDICTOR.layers(1, 15) == pytest.approx(2.0 + half + 0.02 * 5 * 10)


def test_off_runs_everything():
    assert PREDICTOR.off(RequestShape(10)) == pytest.approx(8.0 + 100.0)
    assert PREDICTOR.off(RequestShape(10, candidates=True)) == pytest.approx(8.0 + 1000.0)
    step = 7.0 + 4 * 0.01 * (11 - 4)
    assert PREDICTOR.off(RequestShape(10, 3)) == pytest.approx(108.0 + 2 * step)


def test_exits_count_their_checks_and_what_they_skip():
    check = ExitCheck(3)
    look = 1e4 + 100.0 + 1e5
    half = PREDICTOR.exits([check], [0.5], RequestShape(10))
    assert half == pytest.approx(6.0 + look + 0.5 * (2.0 + 100.0))
    # A second token needs the context in the layers above: nothing was saved but the first probe.
    debt = PREDICTOR.exits([check], [0.5], RequestShape(10, 2))
    assert debt - half == pytest.approx(0.5 * 2.0 + 7.0 + 4 * 0.01 * (10 - 4))


def test_context_exits_grow_with_the_prompt():
    check = ExitCheck(2, "context")
    assert PREDICTOR.check(check, RequestShape(6)) == pytest.approx(6e6 + 100.0 + 1e5)
    assert PREDICTOR.check(check, RequestShape(20)) == pytest.approx(2e7 + 100.0 + 1e5)


def exits(shares, threshold=0.0, layers=(2,)):
    return ExitSpec(
        points=tuple(ExitPoint(exit_layer=layer) for layer in layers),
        classifier=ClassifierSpec(kind="svm", graph="x", state_size=3, features=()),
        threshold=threshold,
        thresholds=(2.0, 1.0, 0.0),
        exit_shares=shares,
        target_agreement=0.9,
    )


def certified(pair):
    """One level, with its threshold."""
    level, threshold = pair
    levels = (CertificateLevel(level=level, confidence=0.95, prompts=500, threshold=threshold),)
    return Certificate(
        target="ort-cpu", precision="fp32", device_class=device_class(), data=("x",), levels=levels
    )


def planned(engine, spec, **times):
    known = Machine(device_class=engine.device_class, processor="y", threads=1)
    plan = PlanSpec(machine=known, times=TIMES.model_copy(update=times))
    manifest = engine.manifest.model_copy(update={"exit": spec, "plan": plan})
    return Engine(manifest, engine.backend, engine.tokenizer)


FREE = {"adapter": 0.0, "classifier": 0.0, "probe": 0.0}


def test_auto_exits_where_that_is_faster_and_nowhere_else(tiny):
    engine = tiny("llama").engine
    often, never = exits(((0.0,), (0.4,), (0.8,))), exits(((0.0,), (0.0,), (0.0,)))
    paying = planned(engine, often, **FREE)
    shape = RequestShape(10)
    assert paying.policy("auto", shape=shape).checks == (ExitCheck(2),)
    off, adaptive = paying.forecasts(shape)
    assert (off.mode, adaptive.mode) == ("off", "adaptive")
    assert adaptive.shares == (0.8,)
    assert adaptive.seconds == pytest.approx(off.seconds * (0.2 + 0.8 * 0.5))
    # Dear checks, exits that never happen, a text that goes on: every layer is run.
    assert planned(engine, often).policy("auto", shape=shape).checks == ()
    assert planned(engine, never, **FREE).policy("auto", shape=shape).checks == ()
    assert paying.policy("auto", shape=RequestShape(10, 5)).checks == ()


def test_shares_are_those_of_the_threshold_that_applies(tiny):
    engine = tiny("llama").engine
    rows = ((0.1,), (0.4,), (0.8,))
    for threshold, share in ((3.0, 0.0), (1.0, 0.4), (0.5, 0.4), (0.0, 0.8)):
        _, adaptive = planned(engine, exits(rows, threshold), **FREE).forecasts(RequestShape(10))
        assert adaptive.shares == (share,)
    strict = planned(engine, exits(rows), **FREE).forecasts(RequestShape(10), level=0.01)
    assert [forecast.mode for forecast in strict] == ["off"]  # no certificate, no such mode


def by_length(**shares):
    """`exits`, with what prompts of some lengths do at the lowest threshold."""
    known = tuple(
        LengthShares(tokens=int(name[1:]), prompts=60, exit_shares=((0.0,), (0.0,), (share,)))
        for name, share in shares.items()
    )
    return exits(((0.0,), (0.4,), (0.8,))).model_copy(update={"length_shares": known})


def test_prompts_leave_as_those_of_their_length_did(tiny):
    """Between two lengths interpolated, beyond them like the nearest."""
    engine = planned(tiny("llama").engine, by_length(n10=0.0, n20=0.4, n40=0.8), **FREE)
    for tokens, share in (
        (1, 0.0),
        (10, 0.0),
        (15, 0.2),
        (20, 0.4),
        (30, 0.6),
        (40, 0.8),
        (99, 0.8),
    ):
        _, adaptive = engine.forecasts(RequestShape(tokens))
        assert adaptive.shares == pytest.approx((share,))
    # So a short prompt is not asked, which pooled shares would have done.
    assert engine.policy("auto", shape=RequestShape(10)).checks == ()
    assert engine.policy("auto", shape=RequestShape(40)).checks == (ExitCheck(2),)
    pooled = planned(tiny("llama").engine, exits(((0.0,), (0.4,), (0.8,))), **FREE)
    assert pooled.policy("auto", shape=RequestShape(10)).checks == (ExitCheck(2),)
    # Thresholds apply as they do to pooled shares; in decode the text's tokens tell, not lengths.
    none = planned(tiny("llama").engine, by_length(n10=0.0).model_copy(update={"threshold": 3.0}))
    assert none.forecasts(RequestShape(10))[1].shares == (0.0,)
    (looks,) = [
        f for f in engine.decode_forecasts() if (f.mode, f.kv_policy) == ("adaptive", "deferred")
    ]
    assert looks.share == 0.8


def test_what_came_lately_counts_for_every_length(tiny):
    engine = planned(tiny("llama").engine, by_length(n10=0.2, n40=0.8), **FREE)
    policy = engine.policy("adaptive")
    engine.recent.record(policy, 4)
    for tokens, share in ((10, 0.2), (40, 0.8)):
        _, adaptive = engine.forecasts(RequestShape(tokens))
        assert adaptive.shares == pytest.approx((4 * share / 5,))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ([(20, 3), (10, 3)], "ascending, found [20, 10]"),
        ([(10, 3), (10, 3)], "ascending, found [10, 10]"),
        ([(10, 3), (20, 2)], "as many rows and shares"),
        ([(10, 0)], "as many rows and shares"),
    ],
)
def test_shares_by_length_fit_those_of_all_prompts(changes, said):
    data = exits(((0.0,), (0.4,), (0.8,))).model_dump(mode="json")
    data["length_shares"] = [
        {"tokens": tokens, "prompts": 60, "exit_shares": [[0.1]] * rows} for tokens, rows in changes
    ]
    with pytest.raises(ValueError, match=re.escape(said)):
        ExitSpec.model_validate(data)


def test_folders_from_before_shares_by_length_are_good(tiny, tmp_path):
    engine = planned(tiny("llama").engine, exits(((0.0,), (0.4,), (0.8,))), **FREE)
    data = engine.manifest.model_dump(mode="json")
    assert data["exit"].pop("length_shares") == []
    assert data["plan"]["times"].pop("fills") is None
    assert data["schema_version"] == 5
    old = Manifest.model_validate(data)
    assert old.exit == engine.manifest.exit
    made = Engine(old, engine.backend, engine.tokenizer)
    assert {made.forecasts(RequestShape(n))[1].shares for n in (5, 50)} == {(0.8,)}


def test_auto_needs_a_plan_and_a_shape(tiny):
    engine = tiny("llama").engine
    with pytest.raises(ExitUnavailableError, match=r"has no plan.*: run `adainfer bench DIR`"):
        engine.generate("x", mode="auto")
    with pytest.raises(RequestError, match="mode auto decides by the request's shape"):
        engine.policy("auto")


def test_measured_times_are_positive_and_parallel(tiny):
    engine = tiny("llama", precision="int4").engine
    steps = []
    times = measure_times(engine, repeats=1, on_step=steps.append)
    assert steps
    assert 47 in times.rows and 48 in times.rows  # where the wide graphs take over
    assert times.rows[-1] == 128  # the engine takes no more
    assert all(seconds > 0 for seconds in (*times.layer, times.step, times.probe, times.candidates))
    assert times.context == {}
    # The lengths of fills are those that the engine takes, one of a single position among them.
    assert times.fills.rows == (1, 2, 4, 8, 16, 64)
    assert all(seconds > 0 for seconds in times.fills.propagate)
    assert times.fills.translated == {}
    assert engine.generate([5, 6, 7], max_new_tokens=2, ignore_eos=True).tokens  # still in order


def test_bench_and_plan_commands(tiny, tmp_path):
    folder = tmp_path / "engines"
    shutil.copytree(tiny("llama").folder, folder)
    manifest = load_manifest(folder)
    run = CliRunner().invoke
    done = run(build_app(), ["bench", str(folder), "--repeats", "1", "--json"])
    assert done.exit_code == 0
    spec = PlanSpec.model_validate_json(done.stdout)
    assert spec == load_manifest(folder).plan
    assert spec.machine == machine(None)
    write_manifest(folder, manifest.model_copy(update={"plan": spec}))
    done = run(build_app(), ["plan", str(folder), "--prompt-tokens", "8,32", "--json"])
    assert done.exit_code == 0
    plans = json.loads(done.stdout)
    assert [entry["prompt_tokens"] for entry in plans] == [8, 32]
    assert {entry["auto"] for entry in plans} == {"off"}
    assert all(math.isfinite(entry["modes"]["off"]["seconds"]) for entry in plans)
    assert [entry["kv_fills"] for entry in plans] == [spec.times.fills.model_dump(mode="json")] * 2
    shown = run(build_app(), ["plan", str(folder), "--prompt-tokens", "8"])
    assert "8 prompt tokens, 1 new token(s)" in shown.stdout
    assert "propagate, a layer" in shown.stdout
    wrong = run(build_app(), ["plan", str(folder), "--prompt-tokens", "x"])
    assert isinstance(wrong.exception, RequestError)


def test_fills_of_every_kv_policy_are_measured_and_shown(tiny, tmp_path):
    folder = make_exit_folder(tiny("llama").folder, tmp_path / "engines")
    run = CliRunner().invoke
    measured = run(build_app(), ["bench", str(folder), "--repeats", "1"]).stdout
    fills = load_manifest(folder).plan.times.fills
    assert fills.translated.keys() == {1, 2, 3}
    assert all(len(seconds) == len(fills.rows) > 1 for seconds in fills.translated.values())
    assert all(seconds > 0 for times in fills.translated.values() for seconds in times)
    shown = run(build_app(), ["plan", str(folder), "--prompt-tokens", "8"]).stdout
    for stdout in (measured, shown):
        for row in ("propagate, a layer", "translated, above 1", "translated, above 3"):
            assert row in stdout
    # The same folder, with shares by length: the plan shows them, and others for other lengths.
    manifest = load_manifest(folder)
    points = len(manifest.exit.points)
    rows = {tokens: ((share,) * points,) for tokens, share in ((8, 0.125), (24, 0.375))}
    shares = {
        "thresholds": (manifest.exit.threshold,),
        "exit_shares": ((0.25,) * points,),
        "length_shares": tuple(
            LengthShares(tokens=tokens, prompts=60, exit_shares=row) for tokens, row in rows.items()
        ),
    }
    spec = manifest.exit.model_copy(update=shares)
    write_manifest(folder, manifest.model_copy(update={"exit": spec}))
    lengths = ["--prompt-tokens", "8,16,24"]
    plans = json.loads(run(build_app(), ["plan", str(folder), *lengths, "--json"]).stdout)
    shown = [entry["modes"]["adaptive"]["checks"][0]["share"] for entry in plans]
    assert shown == pytest.approx([0.125, 0.25, 0.375])


def test_a_plan_from_before_fills_were_measured_is_good(tiny):
    """Its fills cost what multiply-adds say; the plan shows none."""
    engine = planned(tiny("llama").engine, exits(((0.0,), (0.4,), (0.8,))), **FREE)
    data = engine.manifest.plan.model_dump(mode="json")
    assert data["times"].pop("fills") is None
    assert PlanSpec.model_validate(data) == engine.manifest.plan
    shape = RequestShape(10, 2, kv_policy="propagate")
    (_, adaptive) = engine.forecasts(shape)
    assert adaptive.seconds < engine.forecasts(RequestShape(10, 2))[1].seconds


@pytest.mark.parametrize(
    "changes", [{"propagate": [0.1]}, {"translated": {"2": [0.1]}}, {"rows": []}, {"rows": [0, 1]}]
)
def test_fills_must_be_parallel_to_their_rows(changes):
    with pytest.raises(ValueError, match=r"rows"):
        FillTimes.model_validate({"rows": [1, 2]} | changes)


def test_auto_stops_looking_where_requests_do_not_exit_and_tries_again(tiny):
    """Held-out prompts are of other tasks than a request may be of."""
    engine = planned(tiny("llama").engine, exits(((0.0,), (0.4,), (0.8,))), **FREE | {"probe": 1.0})
    shape = RequestShape(10)
    policy = engine.policy("auto", shape=shape)
    assert policy.checks
    for _ in range(40):
        engine.recent.record(policy, 4)
    assert engine.policy("auto", shape=shape).checks == ()
    tries = 0
    for _ in range(200):
        asked = engine.policy("auto", shape=shape)
        tries += bool(asked.checks)
        engine.recent.record(asked, 4)
    assert tries == 200 // 33
    for _ in range(33):
        asked = engine.policy("auto", shape=shape)
        engine.recent.record(asked, 2 if asked.checks else 4)
    assert all(engine.policy("auto", shape=shape).checks for _ in range(3))  # another task


def test_recent_exits_are_of_a_threshold_and_count_by_check(tiny):
    engine = planned(tiny("llama").engine, exits(((0.0,), (0.4,), (0.8,))))
    recent = RecentExits(memory=0.5, weight=1.0, retry_every=3)
    policy, stricter = (engine.policy("adaptive", threshold=threshold) for threshold in (0.0, 1.0))
    assert recent.shares(policy, (0.5,)) == (0.5,)
    recent.record(policy, 2)
    recent.record(policy, 4)  # the one before counts half now
    assert recent.shares(policy, (0.5,)) == pytest.approx(((0.5 + 0.5) / (1.0 + 1.5),))
    assert recent.shares(stricter, (0.5,)) == (0.5,)
    for _ in range(3):
        assert recent.shares(policy, (0.5,)) != (0.5,)
        recent.record(NoExit(), 4)
    assert recent.shares(policy, (0.5,)) == (0.5,)  # nobody asked it for long


def test_requests_with_thresholds_of_their_own_do_not_fill_the_memory(tiny):
    engine = planned(tiny("llama").engine, exits(((0.0,), (0.4,), (0.8,))))
    recent = RecentExits()
    policies = [engine.policy("adaptive", threshold=n / 1000) for n in range(200)]
    for policy in policies:
        recent.record(policy, 2)
    assert recent.shares(policies[0], (0.5,)) == (0.5,)  # the first ones are forgotten
    assert recent.shares(policies[-1], (0.5,)) != (0.5,)
    assert len(recent._counts) <= 64


def test_every_way_to_ask_is_recorded(tiny):
    engine = planned(tiny("llama").engine, exits(((0.0,), (0.4,), (0.8,))))
    seen = []
    engine.recent.record = lambda policy, layer: seen.append((policy.checks, layer))
    engine.generate([5, 6, 7], max_new_tokens=2, ignore_eos=True)
    engine.choose("abc", ["x", "y"])
    method = Method.of("off", engine, NoExit())
    ask(method, TaskExample(prompt="abc", task="t"), labels_only=False)
    assert seen == [((), 4)] * 3


def test_a_mode_takes_as_many_of_its_checks_as_pay(tiny):
    """A look costs as much for every prompt, and spares more the longer it is."""
    spec = exits(((0.3, 0.3),) * 3, layers=(1, 3))
    long = {"rows": (1, 10, 100), "layer": (1.1, 2.0, 11.0), "embed": (0.0, 0.0, 0.0)}
    engine = planned(tiny("llama").engine, spec, **FREE | long | {"classifier": 1.0})
    assert engine.policy("auto", shape=RequestShape(1)).checks == ()
    assert engine.policy("auto", shape=RequestShape(10)).checks == (ExitCheck(1),)
    assert engine.policy("auto", shape=RequestShape(60)).checks == (ExitCheck(1), ExitCheck(3))
    _, adaptive = engine.forecasts(RequestShape(10))
    assert (adaptive.shares, adaptive.looks) == ((0.3,), (1.0,))
    # What requests did that were asked once tells of those that would be asked twice.
    for _ in range(10):
        engine.recent.record(adaptive.policy, 4)
    _, adaptive = engine.forecasts(RequestShape(60))
    first = 4 * 0.3 / (4 + sum(0.97**n for n in range(10)))
    assert adaptive.shares == pytest.approx((first, (1 - first) * 0.3 / 0.7))
    for _ in range(30):
        engine.recent.record(adaptive.policy, 4)
    assert engine.policy("auto", shape=RequestShape(10)).checks == ()


@given(
    scores=st.lists(st.floats(0.0, 1.0), min_size=4, max_size=4),
    agrees=st.lists(st.booleans(), min_size=4, max_size=4),
    count=st.integers(0, 4),
    memory=st.floats(0.0, 1.0),
)
def test_fewer_checks_are_never_wrong_where_all_are_right(scores, agrees, count, memory):
    """Whatever the classifier remembers of the checks before: so a certificate holds for them."""

    class Remembering:
        checks = tuple(ExitCheck(layer) for layer in (1, 2, 3, 4))
        promised = 0.02
        state_size = 1
        over_candidates = False

        def decide(self, check, evidence, state):
            score = scores[check.layer - 1] + state[0]
            return score >= 0.8, np.array([memory * score], np.float32)

    def wrong(policy):
        state = np.zeros(policy.state_size, np.float32)
        for check in policy.checks:
            stop, state = policy.decide(check, None, state)
            if stop:
                return not agrees[check.layer - 1]
        return False

    some = first_checks(Remembering(), count)
    assert len(some.checks) == count
    assert some.promised == 0.02
    assert not wrong(some) or wrong(Remembering())


def test_a_level_goes_by_one_exit_graph(tiny):
    """Requests dealt out among two graphs may be wrong as often as both together."""
    engine = tiny("llama").engine
    certificate = certified((0.02, 0.0))
    answer = exits(((0.8,),) * 3).model_copy(update={"certificate": certificate})
    plan = PlanSpec(
        machine=Machine(device_class=engine.device_class, processor="y", threads=1),
        times=TIMES.model_copy(update=FREE | {"context": {2: (0.0, 0.0)}}),
    )
    both = {"exit": answer, "context_exit": answer, "plan": plan}
    made = Engine(engine.manifest.model_copy(update=both), engine.backend, engine.tokenizer)
    shape = RequestShape(10)
    assert [f.mode for f in made.forecasts(shape)] == ["off", "adaptive", "context"]
    assert [f.mode for f in made.forecasts(shape, level=0.02)] == ["off", "context"]
    alone = Engine(
        engine.manifest.model_copy(update={"exit": answer, "plan": plan}),
        engine.backend,
        engine.tokenizer,
    )
    assert [f.mode for f in alone.forecasts(shape, level=0.02)] == ["off", "adaptive"]


def test_what_the_cache_holds_is_not_read_and_nothing_is_owed_for_approximate_entries():
    shape = RequestShape(10, reused_tokens=6)
    assert PREDICTOR.off(shape) == pytest.approx(PREDICTOR.layers(4, 4, 6) + 100.0)
    check = ExitCheck(2)
    owing, filling = (
        PREDICTOR.exits([check], [0.5], RequestShape(10, 2, kv_policy=policy))
        for policy in ("deferred", "propagate")
    )
    assert owing - filling == pytest.approx(0.5 * PREDICTOR.layers(2, 10))


# Seconds of 1 and 10 positions; a map of the context exit after layer 2 alone.
FILLS = FillTimes(rows=(1, 10), propagate=(0.25, 0.5), translated={2: (0.125, 0.375)})


def test_a_prompt_that_left_early_owes_the_fills_that_were_measured():
    filling = TimePredictor(TIMES.model_copy(update={"fills": FILLS}), num_layers=4, max_rows=10)

    def owed(policy, layer, positions=10):
        shape = RequestShape(positions, 2, kv_policy=policy)
        with_it = filling.exits([ExitCheck(layer)], [0.5], shape)
        return with_it - filling.exits([ExitCheck(layer)], [0.5], replace(shape, new_tokens=1))

    # Three layers above one are filled; what the policy does not serve is run.
    rest = owed("propagate", 1) - 0.5 * 3 * 0.5
    assert owed("propagate", 3) == pytest.approx(rest + 0.5 * 0.5)
    assert owed("translated", 2) == pytest.approx(rest + 0.5 * 0.375)
    assert owed("translated", 3) == pytest.approx(rest + 0.5 * filling.layers(1, 10))
    assert owed("deferred", 3) == owed("translated", 3)
    assert filling.fill("propagate", 2, 20) == pytest.approx(2 * 2 * 0.5)  # beyond: in proportion
    assert filling.fill("translated", 2, 1) == 0.125


def test_auto_drafts_where_that_is_expected_to_be_faster(tiny):
    engine = tiny("llama").engine
    spec = exits(((0.0,),) * 3).model_copy(
        update={"calibration": {"agreement_by_layer": {"2": 0.95}}}
    )
    made = planned(engine, spec, **FREE)
    assert made.plan(RequestShape(10)).mode == "off"
    assert made.plan(RequestShape(10, 64)).mode == "verified"
    off = engine.generate(PROMPT, max_new_tokens=20, ignore_eos=True)
    done = made.generate(PROMPT, max_new_tokens=20, ignore_eos=True, mode="auto")
    assert done.tokens == off.tokens
    assert done.compute_saved < 0.0  # of a random model one draft was looked at


def test_a_conversation_is_planned_by_what_is_new(tiny):
    engine = planned(tiny("llama").engine, exits(((0.0,), (0.4,), (0.8,))), **FREE)
    shapes = []
    plan = engine.plan
    engine.plan = lambda shape, **settings: shapes.append(shape) or plan(shape, **settings)
    session = engine.session()
    options = GenerationOptions(max_new_tokens=2, mode="auto", ignore_eos=True)
    for tokens in ([5, 6, 7], [5, 6, 7, 8, 9]):
        for _ in prepare(engine, tokens, options, session).run(session):
            pass
    assert [shape.reused_tokens for shape in shapes] == [0, 3]


def test_an_answer_that_ends_the_text_is_remembered_too(tiny):
    engine = planned(tiny("llama").engine, exits(((0.0,), (0.4,), (0.8,))))
    seen = []
    engine.recent.record = lambda policy, layer: seen.append(layer)
    (first,) = engine.generate(PROMPT, max_new_tokens=1, ignore_eos=True).tokens
    done = engine.generate(PROMPT, max_new_tokens=4, stop_token_ids=[first])
    assert (done.tokens, seen) == ((), [4, 4])


def test_levels_of_answers_promise_nothing_of_choices(tiny):
    """A folder without exits for choices: the likeliest label is another matter."""
    certificate = certified((0.02, 0.0))
    spec = exits(((0.8,),) * 3).model_copy(update={"certificate": certificate})
    engine = planned(tiny("llama").engine, spec)
    assert engine.policy("adaptive", level=0.02).promised == 0.02
    policy = engine.choice_policy("adaptive")
    assert (policy.checks, policy.promised) == ((ExitCheck(2),), None)
    with pytest.raises(ExitUnavailableError) as caught:
        engine.choice_policy("adaptive", level=0.02)
    assert str(caught.value) == NO_CHOICES.format(mode="adaptive")
    with pytest.raises(ExitUnavailableError) as caught:
        engine.choose("hello", ["a", "b"], mode="adaptive", level=0.02)
    assert str(caught.value) == NO_CHOICES.format(mode="adaptive")
    # Modes that run every layer keep any level, and mode auto takes one of them.
    for mode in ("off", "verified", "auto"):
        assert engine.choose("hello", ["a", "b"], mode=mode, level=0.02).exit_layer == 4


NO_CHOICES = (
    "level 0.02 is certified for answers, not for choices in mode {mode}: use mode adaptive of an "
    "engine that was calibrated on prompts with labels, or leave the level out"
)


def test_levels_of_choices_are_of_labels_of_one_token(tiny):
    """The certificate is of the labels' first tokens; further ones add to an early score."""
    spec = exits(((0.8,),) * 3).model_copy(update={"certificate": certified((0.02, 2.0))})
    made = planned(tiny("llama").engine, spec, **FREE)
    both = {"choice_exit": spec, "context_exit": spec}
    engine = Engine(made.manifest.model_copy(update=both), made.backend, made.tokenizer)
    policy = engine.choice_policy("adaptive", level=0.02)
    assert (policy.threshold, policy.promised, policy.over_candidates) == (2.0, 0.02, True)
    with pytest.raises(ExitUnavailableError) as caught:
        engine.choose("x ", ["ab", "c"], mode="adaptive", level=0.02)
    assert str(caught.value) == (
        "level 0.02: choices are certified by the first token of each label, and one has 2 tokens: "
        "give labels of one token, or leave the level out"
    )
    # Labels that begin alike are told apart by all layers.
    assert engine.choose("x ", ["ab", "ac"], mode="adaptive", level=0.02).exit_layer == 4
    with pytest.raises(ExitUnavailableError) as caught:
        engine.choose("x ", ["a", "c"], mode="context", level=0.02)
    assert str(caught.value) == NO_CHOICES.format(mode="context")
    # Mode auto takes the certified exits, and none for other labels.
    shape = RequestShape(10, candidates=True)
    assert [f.mode for f in engine.forecasts(shape, level=0.02)] == ["off", "adaptive"]
    assert engine.choice_policy("auto", level=0.02, shape=shape, longest_label=2).checks == ()
    assert engine.choose("x ", ["ab", "c"], mode="auto", level=0.02).exit_layer == 4


def test_forecasts_of_texts_at_a_level_are_of_what_certificates_cover(tiny):
    engine = tiny("llama").engine
    spec = exits(((0.8,),) * 3).model_copy(update={"certificate": certified((0.02, 0.0))})
    answers = planned(engine, spec, **FREE)
    shape = RequestShape(10, 2)
    assert [f.mode for f in answers.forecasts(shape)] == ["off", "adaptive"]
    assert [f.mode for f in answers.forecasts(shape, level=0.02)] == ["off"]
    assert answers.generate("x", mode="auto", level=0.02, max_new_tokens=2).tokens
    found = [(f.mode, f.kv_policy) for f in answers.decode_forecasts()]
    assert sorted(found) == [
        ("adaptive", "deferred"), ("adaptive", "propagate"), ("verified", "deferred"),
    ]  # fmt: skip
    assert [f.mode for f in answers.decode_forecasts(level=0.02)] == ["verified"]
    # After a context exit, the text is the full model's, given its first token; not over others.
    times = TIMES.model_copy(update=FREE | {"context": {2: (0.0, 0.0)}})
    plan = answers.manifest.plan.model_copy(update={"times": times})
    context = {"context_exit": spec, "plan": plan}
    both = Engine(answers.manifest.model_copy(update=context), engine.backend, engine.tokenizer)
    assert [f.mode for f in both.forecasts(shape, level=0.02)] == ["off", "context"]
    translated = RequestShape(10, 2, kv_policy="translated")
    assert [f.mode for f in both.forecasts(translated, level=0.02)] == ["off"]


@pytest.mark.parametrize("name", ["policy", "choice_policy"])
def test_policies_refuse_what_their_mode_does_not_take(tiny, name):
    engine = planned(tiny("llama").engine, exits(((0.0,),) * 3))
    policy = getattr(engine, name)
    for mode, option, takers in (
        ("off", {"threshold": 0.5}, "adaptive, context or auto"),
        ("verified", {"threshold": 0.5}, "adaptive, context or auto"),
        ("combined", {"threshold": 0.5}, "adaptive, context or auto"),
        ("context", {"classifier": "svm"}, "adaptive"),
    ):
        with pytest.raises(RequestError) as caught:
            policy(mode, **option)
        (said,) = option
        assert str(caught.value) == (
            f"{said} has no effect in mode {mode}: leave it out, or use mode {takers}"
        )
    assert policy("off", level=0.02).checks == ()  # which it keeps


def test_a_plan_of_another_machine_is_told_once(tiny, caplog):
    engine = planned(tiny("llama").engine, exits(((0.0,),) * 3))
    here = Machine(device_class=engine.device_class, processor="z", threads=2)
    moved = Engine(engine.manifest, engine.backend, engine.tokenizer, here=here)
    for _ in range(2):
        moved.forecasts(RequestShape(10))
    (record,) = caplog.records
    assert "measured on y with 1 threads, this is z with 2: run `adainfer bench DIR`" in (
        record.getMessage()
    )
