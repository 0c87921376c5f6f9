"""Where held-out prompts leave, by their length."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from adainfer_export.calibrate.combined import combine
from adainfer_export.calibrate.length_shares import length_shares, share_fields
from adainfer_export.calibrate.scored import Scored
from adainfer_runtime.manifest import ExitSpec

GRID = np.array([1.0, 0.5])


def scored(lengths, scores):
    """One exit point; scores by prompt."""
    table = np.array(scores, np.float64)[:, None]
    return Scored(
        (5,), 10, table, table > -1.0, ("a",) * len(table), (0.1,), (0.0,),
        lengths=np.array(lengths, np.int64),
    )  # fmt: skip


def halves(count):
    """So many short prompts, which never leave, and as many long ones, which all do."""
    return scored(
        [*range(10, 10 + count), *range(1000, 1000 + count)], [0.0] * count + [0.7] * count
    )


def test_bins_have_their_own_shares_drawn_towards_those_of_all():
    short, long = length_shares(halves(50), GRID)
    assert (short.prompts, long.prompts) == (50, 50)
    assert (short.tokens, long.tokens) == (34, 1024)  # medians: 34.5 and 1024.5
    # Of 50 prompts and as many pooled ones, half of which leave.
    assert short.exit_shares == ((0.0,), (0.25,))
    assert long.exit_shares == ((0.0,), (0.75,))
    # More prompts are believed more.
    many = length_shares(halves(500), GRID)
    assert len(many) == 4
    assert [shares.prompts for shares in many] == [250] * 4
    assert many[0].exit_shares[1] == pytest.approx(((50 * 0.5) / 300,), abs=1e-4)
    assert many[-1].exit_shares[1] == pytest.approx(((250 + 50 * 0.5) / 300,), abs=1e-4)


@pytest.mark.parametrize("count", [0, 1, 49])
def test_few_prompts_say_nothing_of_lengths(count):
    assert length_shares(halves(count), GRID) == ()


def test_there_are_as_many_bins_as_have_prompts_enough():
    assert len(length_shares(halves(75), GRID)) == 3
    assert all(shares.prompts >= 50 for shares in length_shares(halves(99), GRID))


def test_prompts_of_one_length_stay_together():
    assert length_shares(scored([7] * 400, [0.7] * 400), GRID) == ()
    # Half of the prompts would be a bin, had not so many of them the same length.
    assert length_shares(scored([7] * 351 + [9] * 49, [0.7] * 400), GRID) == ()
    two = length_shares(scored([7] * 140 + [9] * 260, [0.7] * 400), GRID)
    assert [(shares.tokens, shares.prompts) for shares in two] == [(7, 140), (9, 260)]


def test_lengths_that_nobody_knows_have_no_shares():
    assert length_shares(replace(halves(100), lengths=None), GRID) == ()


def test_a_spec_takes_both_kinds_of_shares():
    fields = share_fields(halves(60), GRID)
    spec = ExitSpec.model_validate(
        {
            "points": [{"exit_layer": 5}],
            "classifier": {"kind": "svm", "graph": "x", "state_size": 1, "features": []},
            "threshold": 0.5,
            "target_agreement": 0.9,
            "thresholds": GRID.tolist(),
            **fields,
        }
    )
    assert spec.exit_shares == ((0.0,), (0.5,))
    assert len(spec.length_shares) == 2


def test_lengths_go_along_with_their_prompts():
    every = halves(60)
    some = every.scores[:, 0] > 0.5
    assert every.rows(some).lengths.tolist() == list(range(1000, 1060))
    # Combined exits are of the prompts that both graphs saw.
    context = replace(every.rows(some), layers=(3,))
    both = combine(every, context, ((0.5, 0.5),))
    assert both.lengths.tolist() == list(range(1000, 1060))
