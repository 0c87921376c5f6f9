from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adainfer_export.errors import UnsupportedError
from adainfer_export.gptq import ErrorFeedback, SecondMoment
from adainfer_export.int4 import dequantise_int4, quantise_int4
from adainfer_export.quantise import dequantise_blocks, quantise_blocks


def inputs(width, rows=400, rank=8, seed=0):
    """Correlated, of very different sizes, as hidden states are."""
    random = np.random.default_rng(seed)
    shared = random.normal(size=(rows, rank)) @ random.normal(size=(rank, width))
    sizes = np.exp(random.normal(size=width))
    return ((shared + 0.3 * random.normal(size=(rows, width))) * sizes).astype(np.float32)


def moment(x):
    return x.T @ x


def output_error(x, weight, stored):
    return float(np.square(x @ (stored - weight).T).sum())


@given(width=st.sampled_from([8, 32, 96]), seed=st.integers(0, 50))
def test_factor_is_the_triangle_of_the_damped_inverse(width, seed):
    second = moment(inputs(width, seed=seed))
    feedback = ErrorFeedback.of(second)
    assert sorted(feedback.order) == list(range(width))
    assert (np.diff(np.diag(second)[feedback.order]) <= 0).all()  # largest inputs first
    assert not np.tril(feedback.factor, -1).any()
    ordered = second[np.ix_(feedback.order, feedback.order)].astype(np.float64)
    ordered += np.eye(width) * 0.01 * np.diag(second).mean()
    upper = feedback.factor.astype(np.float64)
    np.testing.assert_allclose(upper.T @ upper @ ordered, np.eye(width), atol=2e-3)


def test_second_moment_adds_up_whatever_comes_at_once():
    x = inputs(16, rows=3000)
    added = SecondMoment(16)
    for start in (0, 1, 1500, 1700):
        added.add(x[start : {0: 1, 1: 1500, 1500: 1700, 1700: 3000}[start]])
    np.testing.assert_allclose(added.value(), moment(x), rtol=1e-4)


def test_without_correlation_every_value_goes_to_its_nearest_code():
    weight = np.random.default_rng(0).normal(size=(5, 64)).astype(np.float32)
    found = quantise_blocks(weight, 4, 32, ErrorFeedback.of(np.eye(64, dtype=np.float32)))
    expected = quantise_blocks(weight, 4, 32)
    np.testing.assert_array_equal(found.packed, expected.packed)
    np.testing.assert_array_equal(found.scales, expected.scales)


@pytest.mark.parametrize("width", [64, 320])  # more columns than are worked on at once
def test_what_layers_give_changes_less_and_weights_more(width):
    x = inputs(width)
    weight = np.random.default_rng(1).normal(size=(40, width)).astype(np.float32)
    feedback = ErrorFeedback.of(moment(x))
    nearest, made = quantise_blocks(weight, 4, 32), quantise_blocks(weight, 4, 32, feedback)
    np.testing.assert_array_equal(made.scales, nearest.scales)
    stored = [dequantise_blocks(m.packed, m.scales, 4) for m in (nearest, made)]
    errors = [output_error(x, weight, values) for values in stored]
    assert errors[1] < 0.4 * errors[0]
    assert made.squared_error > nearest.squared_error
    assert made.squared_error == pytest.approx(np.square(stored[1] - weight).sum(), rel=1e-3)


def test_columns_of_tensorrt_change_less_as_well():
    x = inputs(64)
    weight = np.random.default_rng(1).normal(size=(1500, 64)).astype(np.float32)
    feedback = ErrorFeedback.of(moment(x))
    made = [quantise_int4(weight, 32, np.float16, feedback=given) for given in (None, feedback)]
    np.testing.assert_array_equal(made[0][1], made[1][1])
    errors = [output_error(x, weight, dequantise_int4(*stored)) for stored in made]
    assert errors[1] < 0.4 * errors[0]


def test_rows_do_not_depend_on_each_other():
    feedback = ErrorFeedback.of(moment(inputs(64)))
    weight = np.random.default_rng(0).normal(size=(3000, 64)).astype(np.float32)
    many = quantise_blocks(weight, 4, 32, feedback)
    for row in (0, 1023, 2999):
        one = quantise_blocks(weight[row : row + 1], 4, 32, feedback)
        np.testing.assert_array_equal(many.packed[row], one.packed[0])


def test_blocks_of_zeros_stay_zero():
    weight = np.random.default_rng(0).normal(size=(3, 96)).astype(np.float32)
    weight[:, 32:64] = 0.0
    made = quantise_blocks(weight, 4, 32, ErrorFeedback.of(moment(inputs(96))))
    assert not dequantise_blocks(made.packed, made.scales, 4)[:, 32:64].any()


def test_inputs_that_are_always_zero_are_no_obstacle():
    x = inputs(64)
    x[:, 40:] = 0.0
    for second in (moment(x), np.zeros((64, 64), np.float32)):
        feedback = ErrorFeedback.of(second)
        weight = np.random.default_rng(0).normal(size=(3, 64)).astype(np.float32)
        made = quantise_blocks(weight, 4, 32, feedback)
        assert np.isfinite(dequantise_blocks(made.packed, made.scales, 4)).all()


def test_activations_that_overflow_are_refused():
    second = moment(inputs(8))
    second[3, 3] = np.inf
    with pytest.raises(UnsupportedError) as caught:
        ErrorFeedback.of(second)
    assert str(caught.value) == (
        "--rounding gptq: the model's activations are not finite; export with --rounding nearest"
    )
