"""What counts as different in two texts."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adainfer_export.calibrate.text_loss import (
    WrittenText,
    differing_shares,
    first_difference,
    teacher_forced_share,
)

LENGTH = 6


def text(tokens, ended=False):
    return WrittenText(tuple(tokens), ended)


@st.composite
def written(draw):
    """What a request for LENGTH tokens may write."""
    tokens = draw(st.lists(st.integers(0, 2), max_size=LENGTH))
    return text(tokens, ended=len(tokens) < LENGTH)


def edit_distance(one, other):
    row = list(range(len(other) + 1))
    for i, a in enumerate(one, 1):
        previous, row[0] = row[0], i
        for j, b in enumerate(other, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (a != b))
    return row[-1]


@pytest.mark.parametrize(
    ("early", "full", "expected"),
    [
        (text([5, 6, 7, 8, 9, 4]), text([5, 6, 7, 8, 9, 4]), [0, 0, 0, 0, 0, 0]),
        (text([5, 6, 0, 8, 9, 4]), text([5, 6, 7, 8, 9, 4]), [0, 0, 1 / 3, 1 / 4, 1 / 5, 1 / 6]),
        # One word later: all of it.
        (text([1, 5, 6, 7, 8, 9]), text([5, 6, 7, 8, 9, 4]), [1, 1, 1, 1, 1, 1]),
        # The end is a token, and behind both ends there are none.
        (text([5], True), text([5], True), [0, 0, 0, 0, 0, 0]),
        (text([5], True), text([5, 6], True), [0, 1 / 2, 2 / 3, 2 / 3, 2 / 3, 2 / 3]),
        (text([], True), text([], True), [0, 0, 0, 0, 0, 0]),
        (text([], True), text([5, 6, 7, 8, 9, 4]), [1, 1, 1, 1, 1, 1]),
    ],
)
def test_differing_shares(early, full, expected):
    np.testing.assert_allclose(differing_shares(early, full, LENGTH), expected)
    np.testing.assert_allclose(differing_shares(full, early, LENGTH), expected)


@given(written(), written())
def test_shares_bound_the_edit_distance_of_texts_cut_anywhere(early, full):
    shares = differing_shares(early, full, LENGTH)
    assert shares.shape == (LENGTH,) and (shares >= 0).all() and (shares <= 1).all()
    for length in range(1, LENGTH + 1):
        mine, own = early.places[:length].tolist(), full.places[:length].tolist()
        assert edit_distance(mine, own) / max(len(mine), len(own)) <= shares[length - 1] + 1e-12
    first = first_difference(early, full)
    assert (first is None) == (early == full) == (shares.max() == 0)
    if first is not None:
        assert early.places[:first].tolist() == full.places[:first].tolist()
        assert early.places[first] != full.places[first]


def test_teacher_forced_share():
    eos = (1, 3)
    # Behind the difference at place 1 the full model agrees: one of four.
    assert teacher_forced_share(text([5, 6, 7], True), 1, [7, 3], eos) == 1 / 4
    # It would have gone on (8), where the text ended.
    assert teacher_forced_share(text([5, 6, 7], True), 1, [7, 8], eos) == 2 / 4
    # It would have ended, where the text went on.
    assert teacher_forced_share(text([5, 6, 7, 8, 9, 4]), 2, [8, 1, 4], eos) == 2 / 6
    assert teacher_forced_share(text([], True), 0, [], eos) == 1.0
