"""Answer exits and context exits of one request."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from adainfer_export.calibrate.combined import combine, fit_path, path_grid
from adainfer_export.calibrate.scored import Scored
from adainfer_export.calibrate.select import choose_threshold, evaluate


def draw(random, prompts, layers, quality, cost):
    """Scores that know about the disagreement of their exit, the more the larger `quality`."""
    scores = random.normal(size=(prompts, len(layers)))
    agrees = random.random((prompts, len(layers))) < 1.0 / (1.0 + np.exp(-1.0 - quality * scores))
    count = len(layers)
    return Scored(layers, 10, scores, agrees, ("a",) * prompts, (cost,) * count, (cost,) * count)


def test_path_falls_and_its_places_are_the_scores():
    random = np.random.default_rng(0)
    answer = draw(random, 400, (5, 8), 3.0, 0.0)
    context = draw(random, 400, (6,), 5.0, 0.5)
    path = fit_path(answer, context)
    for column in zip(*path, strict=True):
        assert all(a >= b for a, b in pairwise(column))
    both = combine(answer, context, path)
    assert both.layers == (5, 6, 8)
    assert both.check_layers == (0.0, 0.5, 0.0)
    for place in (0, 60, 120, len(path) - 1):
        leaving, first = both.leave(path_grid(path)[place])
        exits = np.stack(
            [
                answer.scores[:, 0] >= path[place][0],
                context.scores[:, 0] >= path[place][1],
                answer.scores[:, 1] >= path[place][0],
            ],
            axis=1,
        )
        np.testing.assert_array_equal(leaving, exits.any(axis=1))
        np.testing.assert_array_equal(first[leaving], exits.argmax(axis=1)[leaving])


def test_both_save_more_than_either_at_the_same_agreement():
    random = np.random.default_rng(1)
    answer = draw(random, 3000, (5,), 4.0, 0.0)
    context = draw(random, 3000, (6,), 4.0, 0.1)
    both = combine(answer, context, fit_path(answer, context))
    saved = [choose_threshold(s, 0.97).net_saved for s in (answer, context, both)]
    assert saved[2] > max(saved[:2])


def test_only_common_prompts_are_combined():
    random = np.random.default_rng(2)
    answer = draw(random, 50, (5,), 4.0, 0.0)
    context = draw(random, 50, (6,), 4.0, 0.1).rows(np.arange(50) % 2 == 1)
    both = combine(answer, context, fit_path(answer, context))
    np.testing.assert_array_equal(both.numbers, np.arange(1, 50, 2))
    np.testing.assert_array_equal(both.agrees[:, 0], answer.agrees[1::2, 0])


def test_scores_that_know_nothing_never_exit():
    random = np.random.default_rng(3)
    answer = draw(random, 500, (5,), 4.0, 0.0)
    upside_down = draw(random, 500, (6,), -4.0, 0.1)
    path = fit_path(answer, upside_down)
    both = combine(answer, upside_down, path)
    assert not np.isfinite(both.scores[:, 1]).any()
    assert evaluate(both, -len(path) + 1).layers_saved == pytest.approx(
        evaluate(answer, path[-1][0]).layers_saved
    )
