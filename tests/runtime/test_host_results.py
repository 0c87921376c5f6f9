"""Results of the probe on the CPU: features, and logits that the next probe overwrites."""

from __future__ import annotations

import gc
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from adainfer_runtime import Engine
from adainfer_runtime.backends.host_results import HostProbe
from adainfer_runtime.backends.ort_cpu import open_session
from adainfer_runtime.engine_folder import load_manifest, write_manifest


def softmax(logits):
    weights = np.exp(logits.astype(np.float64) - logits.max())
    return weights / weights.sum()


@given(
    npst.arrays(
        np.float32, st.integers(2, 40), elements=st.floats(-30, 30, width=32, allow_subnormal=False)
    )
)
def test_features_are_those_of_the_softmax(logits):
    result = HostProbe(logits, threading.Lock())
    ordered = np.sort(softmax(logits))[::-1]
    assert result.token == int(np.argmax(logits))  # of equal ones the lowest
    assert result.top_prob == pytest.approx(ordered[0], rel=1e-5)
    assert result.gap == pytest.approx(ordered[0] - ordered[1], abs=1e-6)


@pytest.mark.parametrize("precision", ["fp32", "int4"])
def test_features_are_those_of_the_graph(tiny, precision):
    made = tiny("llama", precision=precision)
    manifest = made.engine.manifest
    graph = open_session(made.folder / manifest.probe.file)
    rows = np.random.default_rng(0).normal(size=(20, manifest.model.hidden_size))
    for row in rows.astype(np.float32):
        logits, token, top_prob, gap = graph.run(None, {"hidden": row[None, None]})
        result = made.engine.backend.probe(row)
        assert result.token == token.item()
        assert result.top_prob == pytest.approx(top_prob.item(), rel=1e-5)
        assert result.gap == pytest.approx(gap.item(), abs=1e-6)
        np.testing.assert_allclose(result.logits, logits[0, 0], atol=1e-5)
    tokens, top_prob, gap = made.engine.backend.probe_features(rows.astype(np.float32))
    expected = graph.run(["token", "top_prob", "gap"], {"hidden": rows[None].astype(np.float32)})
    for found, wanted in zip((tokens, top_prob, gap), expected, strict=True):
        np.testing.assert_allclose(found, wanted[0], atol=1e-6)


def test_results_that_are_held_outlive_the_next_probe(tiny):
    backend = tiny("llama").engine.backend
    rows = np.random.default_rng(0).normal(size=(4, 64)).astype(np.float32)
    alone = [backend.probe(row).logits for row in rows]
    gc.collect()
    held = [backend.probe(row) for row in rows]
    for result, logits in zip(held, alone, strict=True):
        expected = HostProbe(logits, threading.Lock())
        assert (result.logits == logits).all()
        assert (result.token, result.top_prob, result.gap) == (
            expected.token,
            expected.top_prob,
            expected.gap,
        )
    kept = held[0].logits.copy()
    held[1].logits[:] = 0.0  # everybody's own
    assert (held[0].logits == kept).all()
    assert (backend.probe(rows[1]).logits == alone[1]).all()


def test_threads_do_not_share_what_they_write_to(tiny):
    backend = tiny("llama").engine.backend
    rows = np.random.default_rng(0).normal(size=(4, 64)).astype(np.float32)
    expected = [backend.probe(row).logits for row in rows]
    wrong = []

    def work(number):
        for _ in range(200):
            if (backend.probe(rows[number]).logits != expected[number]).any():
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(rows))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_folders_without_the_bare_probe_run(tiny, tmp_path):
    """As older exports made them."""
    made = tiny("llama")
    expected = made.engine.generate([5, 6, 7], max_new_tokens=8, ignore_eos=True).tokens
    for path in made.folder.rglob("*"):
        if path.is_file():
            copy = tmp_path / "engines" / path.relative_to(made.folder)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
    manifest = load_manifest(made.folder)
    assert manifest.probe.logits_file in manifest.files
    stages = tuple(
        stage.model_copy(update={"logits_file": None}) if stage.kind == "probe" else stage
        for stage in manifest.stages
    )
    write_manifest(tmp_path / "engines", manifest.model_copy(update={"stages": stages}))
    engine = Engine.load(tmp_path / "engines")
    assert engine.generate([5, 6, 7], max_new_tokens=8, ignore_eos=True).tokens == expected
