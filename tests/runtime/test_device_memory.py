"""Device memory and graphs: given back with whoever held them, after errors as well."""

from __future__ import annotations

import math

import numpy as np
import pytest

from adainfer_runtime import DecodeOptions, FixedExit, NoExit
from adainfer_runtime.backends.layout import ITEM_BYTES
from adainfer_runtime.errors import DeviceMemoryError, StageError

from ..export.exit_folder import make_exit_folder
from .device_engines import on_both

PROMPT = [5, 17, 200, 43, 9, 120, 77, 31, 250, 8]


@pytest.fixture(
    scope="module",
    params=[("onnx-std", "fp32"), ("tensorrt", "fp16"), ("tensorrt-basic", "fp32")],
    ids=lambda value: value[0],
)
def folder(request, tiny, tmp_path_factory):
    target, precision = request.param
    made = tiny("llama", target=target, precision=precision)
    return make_exit_folder(made.folder, tmp_path_factory.mktemp("exits") / "engines")


def live(driver):
    return driver.live_bytes, driver.graphs


def test_everything_is_given_back_with_the_engine(folder):
    pair = on_both(folder)
    engine, driver = pair.device, pair.driver
    always = DecodeOptions(exit_looks="always")
    for mode in ("adaptive", "context", "off"):
        decoding = DecodeOptions() if mode == "off" else always
        engine.generate(PROMPT, mode=mode, max_new_tokens=4, ignore_eos=True, decoding=decoding)
    engine.choose(PROMPT, ["a", "b"], mode="adaptive")
    result = engine.backend.probe(np.zeros(64, np.float32))
    assert live(driver)[0] > 0
    assert live(driver)[1] > 0  # of tensorrt-basic the embedding's alone
    del pair, engine
    assert live(driver)[0] > 0  # somebody may still ask for this one's logits
    assert len(result.logits) == 320
    del result
    assert live(driver) == (0, 0)


def test_what_the_sequences_share_is_freed_on_close(folder):
    pair = on_both(folder)
    row, _ = pair.device.backend.adapt(1, np.zeros(64, np.float32))
    pair.device.backend.close()
    assert live(pair.driver)[0] == 4 * 64  # which is still held
    del row
    pair.device.backend.close()  # once more changes nothing
    assert live(pair.driver) == (0, 0)


def test_graphs_go_with_their_sequence(folder):
    pair = on_both(folder)
    before = live(pair.driver)
    for _ in range(2):
        session = pair.device.session()
        session.extend(PROMPT)
        for _ in range(4):
            session.extend([session.predict(NoExit()).result.token])
        del session
        assert live(pair.driver) == before


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_a_sequence_that_does_not_fit_leaves_nothing_behind(folder, share):
    pair = on_both(folder)
    before = pair.driver.live_bytes
    sequence = pair.device.backend.open_sequence()
    size = pair.driver.live_bytes - before
    del sequence
    pair.driver.room = before + int(share * size)
    with pytest.raises(DeviceMemoryError):
        pair.device.generate(PROMPT, max_new_tokens=1)
    assert live(pair.driver) == (before, 0)
    pair.driver.room = None
    assert pair.device.generate(PROMPT, max_new_tokens=1, ignore_eos=True).tokens


def test_a_back_end_that_does_not_fit_leaves_nothing_behind(folder):
    pair = on_both(folder)
    backend, driver = pair.device.backend, pair.driver
    size = driver.live_bytes
    driver.room = size + 16_000  # of about 30,000
    with pytest.raises(DeviceMemoryError):
        type(backend)(backend.manifest, backend._stages, driver, backend.max_rows)
    assert live(driver) == (size, 0)


def test_adapters_and_translators_that_fail_leave_nothing_behind(folder, monkeypatch):
    pair = on_both(folder)
    backend, driver = pair.device.backend, pair.driver
    hidden = np.zeros((4, 64), np.float32)
    before = live(driver)
    for room in (0, 1024, 3000):  # the rows, K and V take 4096 bytes
        driver.room = before[0] + room
        with pytest.raises(DeviceMemoryError):
            backend.translate(1, hidden, 1)
        assert live(driver) == before
    driver.room = before[0]
    with pytest.raises(DeviceMemoryError):
        backend.adapt(1, hidden[0])
    driver.room = None

    def refuse(file, inputs, outputs):
        raise StageError("no")

    monkeypatch.setattr(backend, "_run", refuse)
    with pytest.raises(StageError, match="no"):
        backend.translate(1, hidden, 1)
    assert live(driver) == before


def test_keys_and_values_are_written_where_they_belong_and_nowhere_else(folder):
    pair = on_both(folder)
    kv, driver = pair.device.manifest.kv, pair.driver
    sequence, random = pair.device.backend.open_sequence(), np.random.default_rng(0)
    shape = (kv.num_heads, kv.max_length, kv.head_dim)
    expected = np.zeros((2, *shape), np.float32)
    for start, rows in ((3, 5), (0, 1), (kv.max_length - 2, 2)):
        new = random.normal(size=(2, kv.num_heads, rows, kv.head_dim)).astype(np.float32)
        driver.log.clear()
        sequence.write_kv(2, start, *new)
        moved = [(what, size) for what, _, size in driver.log]
        size = math.prod(new[0].shape) * ITEM_BYTES[kv.dtype]
        assert moved == [("upload", size)] * 2
        expected[:, :, start : start + rows] = new
    for length in (kv.max_length, 4, 0):
        found = sequence.kv(2, length)
        np.testing.assert_allclose(found, expected[:, :, :length], atol=1e-3)
    assert not np.any(sequence.kv(1, kv.max_length))


def test_a_context_exit_moves_what_it_writes(folder):
    """Not the caches, which hold the model's whole length."""
    pair = on_both(folder)
    session = pair.device.session()
    session.extend(PROMPT)
    pair.driver.log.clear()
    session.predict(FixedExit(1, kind="context"))
    kv = pair.device.manifest.kv
    row = kv.num_heads * kv.head_dim * ITEM_BYTES[kv.dtype]
    most = len(PROMPT) * row
    assert kv.max_length * row > 8 * most
    sizes = [size for what, _, size in pair.driver.log if what in ("upload", "download")]
    # Translations are read in float32, of all layers above at once.
    assert max(sizes) <= 3 * 4 * len(PROMPT) * kv.num_heads * kv.head_dim
