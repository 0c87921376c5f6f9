"""What decoding costs: by the plan of this machine, or by multiply-adds."""

from __future__ import annotations

import pytest

from adainfer_runtime import Engine
from adainfer_runtime.batch import ContinuousBatching
from adainfer_runtime.decode_costs import DecodeCosts, decode_costs
from adainfer_runtime.decode_options import DecodeOptions, make_decoder
from adainfer_runtime.exit_looks import ExitCosts
from adainfer_runtime.exit_policy import NoExit
from adainfer_runtime.manifest import ClassifierSpec, ExitPoint, ExitSpec, ShortlistSpec
from adainfer_runtime.plan_spec import FillTimes, Machine, PlanSpec, StageTimes
from adainfer_runtime.sampling import Greedy

HERE = Machine(device_class="cpu", processor="this one", threads=2)
# After 100 positions a layer takes 1 s for one row and, per row, 0.6 s for two.
TIMES = StageTimes(
    rows=(1, 2, 8, 128),
    layer=(0.9, 1.0, 2.2, 20.0),
    embed=(0.05, 0.05, 0.05, 0.05),
    pair_one=0.001,
    pair_many=0.001,
    step=10.0,
    step_past=100,
    probe=5.0,
    candidates=0.1,
    adapter=0.25,
    classifier=0.125,
)


@pytest.fixture
def manifest(tiny):
    return tiny("llama").engine.manifest  # four layers


def planned(manifest, **changes):
    times = TIMES.model_copy(update=changes)
    return manifest.model_copy(update={"plan": PlanSpec(machine=HERE, times=times)})


def test_measured_times_in_layers_of_one_row(manifest):
    costs = decode_costs(planned(manifest), HERE)
    assert (costs.layers, costs.probe) == (4, pytest.approx(5.0))
    assert (costs.adapter, costs.classifier) == (pytest.approx(0.25), pytest.approx(0.125))
    assert costs.rows == ((1, 1.0), (2, pytest.approx(0.6)), (8, pytest.approx(0.375)))
    assert costs.batch(8) == pytest.approx(3.0)
    # A whole token was measured too: what layers and probe leave of it is overhead.
    assert costs.token == pytest.approx(10.0)
    assert costs.overhead == pytest.approx(1.0)
    assert decode_costs(planned(manifest, step=1.0), HERE).overhead == 0.0


def test_only_the_machine_that_was_measured_is_trusted(manifest):
    other = HERE.model_copy(update={"threads": 4})
    by_work = DecodeCosts.of_manifest(manifest)
    assert decode_costs(planned(manifest), other) == by_work
    assert decode_costs(planned(manifest), None) == by_work
    assert decode_costs(manifest, HERE) == by_work
    assert decode_costs(planned(manifest), HERE) != by_work


def test_a_shortlist_costs_what_was_measured_or_its_share_of_the_probe(manifest):
    spec = ShortlistSpec(
        file="x", rank=1, rows=2, multiply_adds=manifest.probe.multiply_adds // 4, recall={}
    )
    with_one = planned(manifest.model_copy(update={"shortlist": spec}))
    assert decode_costs(with_one, HERE).draft_probe is None
    guessed = decode_costs(with_one, HERE, shortlist=True)
    assert guessed.draft_probe == pytest.approx(1.25)
    assert guessed.draft_check == pytest.approx(1.5)
    assert guessed.exit_check == pytest.approx(1.625)
    measured = planned(with_one, shortlist=0.5)
    assert decode_costs(measured, HERE, shortlist=True).draft_probe == pytest.approx(0.5)
    assert decode_costs(planned(manifest), HERE, shortlist=True).draft_probe is None


def exiting(manifest, *layers):
    """With answer exits after these layers, and a context exit after the first of them."""
    points = tuple(ExitPoint(exit_layer=layer) for layer in layers)
    spec = ExitSpec(
        points=points,
        classifier=ClassifierSpec(kind="svm", graph="x", state_size=3, features=()),
        threshold=0.5,
        target_agreement=0.98,
    )
    first = points[0].model_copy(update={"translate": "t", "multiply_adds": 600})
    context = spec.model_copy(update={"points": (first,)})
    return manifest.model_copy(update={"exit": spec, "context_exit": context})


def test_measured_fills_in_layers_of_one_row(manifest):
    fills = FillTimes(rows=(1, 8), propagate=(0.125, 0.5), translated={1: (0.25, 1.0)})
    costs = decode_costs(planned(exiting(manifest, 1, 3), fills=fills), HERE)
    # A layer of one row takes 1 s; of four, three lie above layer 1 and one above layer 3.
    assert costs.fill("propagate", 1, 1) == pytest.approx(3 * 0.125)
    assert costs.fill("propagate", 3, 8) == pytest.approx(0.5 / 8)
    assert costs.fill("propagate", 3, 16) == pytest.approx(0.5 / 8)
    assert costs.fill("translated", 1, 8) == pytest.approx(1.0 / 8)
    assert costs.fill("translated", 3, 8) is None
    assert costs.fill("deferred", 1, 1) is None
    # Texts that share passes fill each for itself.
    assert costs.of_texts(4).fill("propagate", 1, 1) == costs.fill("propagate", 1, 1)


def test_fills_that_were_not_measured_cost_their_multiply_adds(manifest):
    made = exiting(manifest, 1, 3)
    layer = sum(stage.multiply_adds for stage in manifest.layer_stages) / 4
    work = manifest.kv_fills[4].multiply_adds / layer
    assert 0.0 < work < 0.5
    for costs in (decode_costs(made, None), decode_costs(planned(made), HERE)):
        assert costs.fill("propagate", 3, 1) == pytest.approx(work)
        assert costs.fill("propagate", 1, 1) == pytest.approx(3 * work)
        assert costs.fill("propagate", 3, 2) == pytest.approx(work * costs.batch(2) / 2)
        assert costs.fill("translated", 1, 1) == pytest.approx(600 / layer)
        assert costs.fill("translated", 3, 1) is None
    bare = made.model_copy(update={"stages": (*manifest.cut, manifest.probe)})
    assert "propagate" not in DecodeCosts.of_manifest(bare).fills


def test_a_round_of_drafts():
    costs = DecodeCosts(32, 0.5, adapter=0.25, rows=((1, 1.0), (4, 0.5)), overhead=0.125)
    assert costs.token == 32.625
    # Four passes up to layer 24, three drafts read, four rows through the rest and the head.
    assert costs.round(24, 3) == pytest.approx(4 * 24.125 + 3 * 0.75 + 8.5 * 2.0)
    assert costs.per_token(24, 3, 1.0) == pytest.approx(costs.round(24, 3) / 4)
    row = costs.batch(3) - costs.batch(2)
    least = (24.125 + 8.5 * row) / 32.625
    assert costs.least_confidence(24, 1) == pytest.approx(least)


def test_engines_know_the_costs_of_their_machine(tiny):
    made = tiny("llama")
    here = Engine.of_manifest(made.folder, made.engine.manifest)._planner._here
    spec = PlanSpec(machine=here, times=TIMES)
    engine = Engine.of_manifest(made.folder, made.engine.manifest.model_copy(update={"plan": spec}))
    assert engine.decode_costs().token == pytest.approx(10.0)
    # Where measured drafts can never pay, none is tried; a request may know better.
    dear = engine.decode_costs()
    free = DecodeCosts(layers=4, probe=0.0, rows=((1, 1.0), (8, 0.125)))
    for options, drafts in (
        (DecodeOptions(draft_layer=3), 0),
        (DecodeOptions(draft_layer=1, costs=free), 1),
    ):
        session = engine.session()
        session.extend([5, 6, 7])
        decoder = make_decoder(
            session, engine.manifest, NoExit(), Greedy(), 20, options, dear, verified=True
        )
        decoder.step()
        assert decoder._schedule.length(decoder._acceptance) >= drafts
        assert (decoder._schedule.length(decoder._acceptance) > 0) == (drafts > 0)


def test_texts_share_passes_of_one_row_alone():
    """Drafts that pay for one text may not for several, whose passes are cheap already."""
    alone = DecodeCosts(32, probe=1.0, rows=((1, 1.0), (2, 0.6), (4, 0.5), (8, 0.45)))
    four = alone.of_texts(4)
    assert four.token == pytest.approx(alone.token * 0.5)
    assert four.round(16, 2) == pytest.approx(
        3 * 16 * 0.5 + 2 * 0.5 + (32 - 16 + 1) * four.batch(3)
    )
    assert alone.per_token(16, 2, 0.8) < alone.token
    assert four.per_token(16, 2, 0.8) > four.token
    assert four.least_confidence(16, 1) > alone.least_confidence(16, 1)
    looks, shared = ExitCosts(alone, (16,)), ExitCosts(four, (16,))
    assert shared.token((0.0,)) == pytest.approx(looks.token((0.0,)) * 0.5)
    assert shared.token((0.5,)) / four.token > looks.token((0.5,)) / alone.token
    assert alone.of_texts(1) == alone


def test_texts_of_a_batch_are_told_how_many_share(tiny):
    engine = tiny("llama").engine
    seen = []

    def text(session):
        seen.append(session.texts)
        yield

    ContinuousBatching(at_once=3).run([text] * 5, engine)
    assert seen == [3] * 5
    assert engine.session().texts == 1
