"""Codes of int8 caches."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from adainfer_export.storage import StorageRequest
from adainfer_runtime import Engine
from adainfer_runtime.backends.kv_scales import KV_SCALES, KvScales
from adainfer_runtime.errors import IntegrityError, StageError

INT8 = StorageRequest(kv_cache="int8")


@given(
    values=arrays.arrays(np.float32, (2, 5, 8), elements=st.floats(-10, 10, width=32)),
    steps=arrays.arrays(np.float32, (2, 2, 8), elements=st.floats(0.0625, 0.5, width=32)),
)
def test_values_within_reach_move_by_half_a_step(values, steps):
    scales = KvScales(np.stack([np.ones_like(steps), steps]))
    key, value = scales.quantise(2, values, -values)
    assert key.dtype == value.dtype == np.int8
    found = scales.dequantise(2, key, value)
    for part, (floats, expected) in enumerate(zip(found, (values, -values), strict=True)):
        step = steps[part][:, None]
        clipped = np.clip(expected, -128 * step, 127 * step)
        assert floats.dtype == np.float32
        assert (np.abs(floats - clipped) <= 0.5001 * step).all()


def test_layers_may_have_fewer_heads():
    scales = KvScales(np.full((1, 2, 3, 4), 0.5, np.float32))
    key, _ = scales.quantise(1, np.ones((2, 7, 4), np.float32), np.ones((2, 7, 4), np.float32))
    assert key.shape == (2, 7, 4)
    assert (key == 2).all()


def changed(made, tmp_path, content):
    folder = tmp_path / "engines"
    shutil.copytree(made.folder, folder)
    path = folder / KV_SCALES
    size = path.stat().st_size
    path.write_bytes(content(path).ljust(size, b"\0")[:size])
    return folder


def cut(path):
    return path.read_bytes()[:50]


def negative(path):
    np.save(path, -np.load(path))
    return path.read_bytes()


def of_other_caches(path):
    values = np.load(path)
    np.save(path, values.reshape(values.shape[0], 2, -1, 8))
    return path.read_bytes()


def pickled(path):
    np.save(path, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    return path.read_bytes()


def infinite(path):
    values = np.load(path)
    values[0] = np.inf
    np.save(path, values)
    return path.read_bytes()


def archive(path):
    np.savez(path.with_suffix(".npz"), np.load(path)[:1])
    return path.with_suffix(".npz").read_bytes()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (archive, "does not hold the scales"),
        (infinite, "does not hold the scales"),
        (cut, "cannot be read"),
        (pickled, "cannot be read"),
        (negative, "does not hold the scales"),
        (of_other_caches, "does not hold the scales"),
    ],
)
def test_other_files_are_refused(tiny, tmp_path, content, message):
    folder = changed(tiny("llama", precision="int4", storage=INT8), tmp_path, content)
    with pytest.raises(StageError, match=message):
        Engine.load(folder)
    with pytest.raises(IntegrityError, match=r"kv_scales\.npy has sha256"):
        Engine.load(folder, verify=True)
