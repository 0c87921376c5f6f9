"""What exits are expected to be worth in decode."""

from __future__ import annotations

from dataclasses import replace

import pytest

from adainfer_runtime.decode_costs import DecodeCosts, FillCosts
from adainfer_runtime.decode_plan import forecast_decode
from adainfer_runtime.draft_schedule import agreement_by_layer, default_draft_layer
from adainfer_runtime.exit_looks import ExitCosts
from adainfer_runtime.manifest import ClassifierSpec, ExitPoint, ExitSpec, ShortlistSpec

CHEAP = DecodeCosts(32, probe=0.2, adapter=0.05)
DEAR = DecodeCosts(30, probe=12.0, adapter=3.0)


@pytest.fixture
def manifest(tiny):
    found = tiny("llama").engine.manifest
    assert found.shortlist is None
    return found


def with_exits(manifest, agreement):
    layers = {int(layer) for layer in agreement}
    points = tuple(ExitPoint(exit_layer=layer) for layer in sorted(layers))
    spec = ExitSpec(
        points=points,
        classifier=ClassifierSpec(kind="svm", graph="x", state_size=3, features=()),
        threshold=0.5,
        target_agreement=0.98,
        calibration={"agreement_by_layer": agreement},
    )
    return manifest.model_copy(update={"exit": spec})


def test_cheap_probes_pay_from_the_share_at_which_they_cost_what_off_costs(manifest):
    made = with_exits(manifest, {"2": 0.9, "3": 0.95})
    found = forecast_decode(made, lambda probe: CHEAP, ((16, 24), (0.3, 0.3)))
    (looks,) = [forecast for forecast in found if forecast.mode == "adaptive"]
    exits = ExitCosts(CHEAP, (16, 24))
    assert looks.relative == pytest.approx(exits.token((0.3, 0.3)) / CHEAP.token)
    assert looks.share == pytest.approx(0.6)
    assert looks.pays_from is not None
    assert exits.cheapest([looks.pays_from / 2] * 2)[0].layers == (24,)
    assert exits.cheapest([looks.pays_from / 2 - 0.005] * 2)[0].layers == ()
    drafts = {forecast.layers[0]: forecast for forecast in found if forecast.mode == "verified"}
    assert set(drafts) == {2, 3}
    for layer, forecast in drafts.items():
        assert forecast.relative == pytest.approx(
            CHEAP.per_token(layer, forecast.drafts, forecast.share) / CHEAP.token
        )
        assert all(
            forecast.relative <= CHEAP.per_token(layer, n, forecast.share) / CHEAP.token
            for n in range(1, 9)
        )
    assert (drafts[2].share, drafts[3].share) == (0.9, 0.95)


def with_shortlist(manifest, agreement):
    spec = ShortlistSpec(
        file="x", rank=4, rows=64, multiply_adds=10, recall={}, agreement=agreement
    )
    return manifest.model_copy(update={"shortlist": spec})


def test_a_shortlist_drafts_by_its_own_agreement(manifest):
    full = with_exits(manifest, {"2": 0.97, "3": 0.98})
    made = with_shortlist(full, {"2": 0.3, "3": 0.9})
    found = forecast_decode(made, lambda probe: CHEAP, None)
    shares = {(forecast.probe, forecast.layers[0]): forecast.share for forecast in found}
    assert shares == {
        ("full", 2): 0.97, ("full", 3): 0.98, ("shortlist", 2): 0.3, ("shortlist", 3): 0.9,
    }  # fmt: skip
    assert default_draft_layer(made, CHEAP) == 2
    assert default_draft_layer(made, CHEAP, "shortlist") == 3


def test_a_shortlist_that_was_not_measured_is_taken_for_the_full_probe(manifest):
    made = with_shortlist(with_exits(manifest, {"2": 0.97, "3": 0.98}), {})
    assert agreement_by_layer(made, "shortlist") == agreement_by_layer(made) == {2: 0.97, 3: 0.98}


def test_dear_probes_never_pay(manifest):
    made = with_exits(manifest, {"3": 0.6})
    found = forecast_decode(made, lambda probe: DEAR, ((28,), (0.2,)))
    (looks,) = [forecast for forecast in found if forecast.mode == "adaptive"]
    assert looks.pays_from is None
    assert looks.relative > 1.0


def test_exits_are_forecast_under_every_kv_policy_that_fills_there(manifest):
    fills = {
        "propagate": FillCosts((1,), {16: (0.5,), 24: (0.25,)}),
        "translated": FillCosts((1,), {8: (0.1,)}),  # no exit point of answers
    }
    costs = replace(CHEAP, fills=fills)
    found = forecast_decode(manifest, lambda probe: costs, ((16, 24), (0.3, 0.3)))
    by_policy = {forecast.kv_policy: forecast for forecast in found}
    assert set(by_policy) == {"deferred", "propagate"}
    token = ExitCosts(costs, (16, 24), "propagate").token((0.3, 0.3))
    assert by_policy["propagate"].relative == pytest.approx(token / costs.token)
    assert by_policy["propagate"].relative < by_policy["deferred"].relative


def test_engines_without_exits_have_nothing_to_plan(tiny):
    assert tiny("llama").engine.decode_forecasts() == ()
