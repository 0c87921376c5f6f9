from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from adainfer_export.quantise import dequantise_blocks, quantise_blocks


@given(
    weight=arrays(np.float32, (3, 64), elements=st.floats(-100, 100, width=32)),
    bits=st.sampled_from([4, 8]),
)
def test_error_is_at_most_one_step_and_extremes_are_exact(weight, bits):
    made = quantise_blocks(weight, bits, 32)
    packed, scales = made.packed, made.scales
    assert packed.shape == (3, 2, 32 * bits // 8)
    restored = dequantise_blocks(packed, scales, bits)
    found = np.square(restored.astype(np.float64) - weight).sum()
    assert made.squared_error == pytest.approx(found, rel=1e-3, abs=1e-9)
    step = np.repeat(np.abs(scales), 32, axis=1)
    assert (np.abs(restored - weight) <= step * 1.001 + 1e-30).all()
    blocks, back = weight.reshape(-1, 32), restored.reshape(-1, 32)
    largest = np.abs(blocks).max(axis=1, keepdims=True)
    # Of two extremes of either sign, one is exact.
    errors = np.where(np.abs(blocks) == largest, np.abs(back - blocks), np.inf).min(axis=1)
    assert (errors <= 1e-5 * largest[:, 0] + 1e-37).all()


@pytest.mark.parametrize("bits", [4, 8])
def test_many_rows_equal_few(bits):
    weight = np.random.default_rng(0).normal(size=(5000, 32)).astype(np.float32)
    many = quantise_blocks(weight, bits, 32)
    for row in (0, 2047, 2048, 4999):
        one = quantise_blocks(weight[row : row + 1], bits, 32)
        np.testing.assert_array_equal(many.packed[row], one.packed[0])
        np.testing.assert_array_equal(many.scales[row], one.scales[0])


def test_zero_blocks_stay_zero():
    made = quantise_blocks(np.zeros((2, 32), np.float32), 4, 32)
    assert not dequantise_blocks(made.packed, made.scales, 4).any()
