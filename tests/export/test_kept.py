"""A calibration that was killed goes on from the steps that it had finished."""

from __future__ import annotations

import json
import shutil

import pytest

from adainfer_export.calibrate import CalibrationRequest, context, fitting, pipeline
from adainfer_export.calibrate.kept import KeptSteps
from adainfer_export.calibrate.pipeline import recalibrate
from adainfer_export.errors import CalibrationError
from adainfer_export.progress import SilentReporter
from adainfer_runtime.engine_folder import load_manifest

REST = ".calibration"


@pytest.fixture
def engines(tiny, tmp_path):
    folder = tmp_path / "engines"
    shutil.copytree(tiny("llama").folder, folder)
    return folder


@pytest.fixture
def request_of(tmp_path):
    prompts = tmp_path / "p.jsonl"
    lines = (json.dumps({"prompt": f"{n % 7} {n}: x {n % 5}: y {n}:"}) for n in range(160))
    prompts.write_text("\n".join(lines))

    def make(**settings):
        settings = {"target_agreement": 0.2, "context_exit": True, "adapters": "ridge"} | settings
        return CalibrationRequest((prompts,), translators="ridge", **settings)

    return make


def calibrated(folder, request):
    return recalibrate(folder, load_manifest(folder), request, SilentReporter())


def killed(*_, **__):
    raise KeyboardInterrupt


def test_a_killed_calibration_goes_on(engines, request_of, monkeypatch, tmp_path):
    other = tmp_path / "undisturbed"
    shutil.copytree(engines, other)
    undisturbed = calibrated(other, request_of())
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pipeline, "_observe", killed)
        calibrated(engines, request_of())
    assert {path.name for path in (engines / REST).iterdir()} == {
        "identity.json", "adapters.npz", "translators.npz",
    }  # fmt: skip
    assert load_manifest(engines).exit is None  # what was there stays in force
    monkeypatch.setattr(fitting, "trace_prompts", killed)
    monkeypatch.setattr(context, "fit_translators", killed)
    resumed = calibrated(engines, request_of())
    assert not (engines / REST).exists()
    graphs = {name for name in undisturbed.files if name.endswith(".onnx")}
    assert {n: undisturbed.files[n] for n in graphs} == {n: resumed.files[n] for n in graphs}


def test_another_calibration_begins_anew(engines, request_of, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pipeline, "_observe", killed)
        calibrated(engines, request_of())
    traced = []
    trace = fitting.trace_prompts
    monkeypatch.setattr(fitting, "trace_prompts", lambda *a: traced.append(1) or trace(*a))
    calibrated(engines, request_of(seed=1))
    assert traced == [1]
    assert not (engines / REST).exists()


def test_data_that_cannot_be_used_leaves_nothing(engines, request_of, monkeypatch):
    def unusable(*_, **__):
        raise CalibrationError("no")

    monkeypatch.setattr(pipeline, "_observe", unusable)
    with pytest.raises(CalibrationError):
        calibrated(engines, request_of())
    assert not (engines / REST).exists()


def test_a_step_that_was_cut_short_is_made_again(tmp_path):
    kept = KeptSteps(tmp_path, {"a": 1})
    with pytest.raises(KeyboardInterrupt):
        kept.arrays("step", killed)
    assert not (tmp_path / REST).exists()
    made = {"x": fitting.np.arange(3)}
    assert kept.arrays("step", lambda: made) is made
    assert KeptSteps(tmp_path, {"a": 1}).arrays("step", killed)["x"].tolist() == [0, 1, 2]
    with pytest.raises(KeyboardInterrupt):
        KeptSteps(tmp_path, {"a": 2}).arrays("step", killed)
