"""A calibration that was killed goes on from the steps and layers that it had finished."""

from __future__ import annotations

import itertools
import json
import shutil
import time

import numpy as np
import pytest

from adainfer_export import ExportRequest, export
from adainfer_export.calibrate import (
    CalibrationRequest,
    context,
    distil,
    distil_translators,
    fitting,
    pipeline,
)
from adainfer_export.calibrate.affine import AffineMap
from adainfer_export.calibrate.distilled import Distilled
from adainfer_export.calibrate.kept import KeptSteps
from adainfer_export.calibrate.pipeline import recalibrate
from adainfer_export.errors import CalibrationError
from adainfer_export.folder import save_hashed
from adainfer_export.progress import SilentReporter
from adainfer_runtime.engine_folder import load_manifest, verify_files

from ..checkpoints import make_checkpoint

REST = ".calibration"


@pytest.fixture
def engines(tiny, tmp_path):
    folder = tmp_path / "engines"
    shutil.copytree(tiny("llama").folder, folder)
    return folder


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """Six layers: three take adapters, two translators."""
    checkpoint = tmp_path_factory.mktemp("deep") / "checkpoint"
    make_checkpoint(checkpoint, num_hidden_layers=6)
    return checkpoint


@pytest.fixture(scope="module")
def request_of(tmp_path_factory):
    prompts = tmp_path_factory.mktemp("prompts") / "p.jsonl"
    lines = (json.dumps({"prompt": f"{n % 7} {n}: x {n % 5}: y {n}:"}) for n in range(160))
    prompts.write_text("\n".join(lines))

    def make(**settings):
        few = {"target_agreement": 0.2, "context_exit": True}
        plain = {"adapters": "ridge", "translators": "ridge"}
        return CalibrationRequest((prompts,), **(few | plain | settings))

    return make


@pytest.fixture(scope="module")
def distilling(request_of):
    """A request whose maps are all distilled, soon, by a clock that takes all for equally long."""
    ticks = itertools.count()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distil, "_BATCH", 16)
        patch.setattr(distil, "_FEWEST_STEPS", 3)
        patch.setattr(distil, "_MOST_STEPS", 3)
        patch.setattr(distil_translators, "_FEWEST_PROMPTS", 20)
        patch.setattr(distil_translators, "_MOST_STEPS", 3)
        patch.setattr(distil_translators, "_WORTH_IT", (0.0, 1.0))
        patch.setattr(time, "perf_counter", lambda: float(next(ticks)))
        both = {"adapters": "distilled", "translators": "distilled"}
        yield request_of(classifiers=("threshold",), **both)


@pytest.fixture(scope="module")
def undisturbed(deep, distilling, tmp_path_factory):
    """What such a calibration comes to."""
    out = tmp_path_factory.mktemp("undisturbed") / "engines"
    export(ExportRequest(str(deep), out, calibration=distilling))
    assert load_manifest(out).context_exit is not None
    return contents(out)


def calibrated(folder, request):
    return recalibrate(folder, load_manifest(folder), request, SilentReporter())


def killed(*_, **__):
    raise KeyboardInterrupt


def fitted_again(*_, **__):
    raise AssertionError


def contents(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


def kept_in(folder):
    """Names of what is kept, without the stamps."""
    return {path.name.split(".")[0] for path in (folder / REST).iterdir()}


class Counted:
    """A function that notes its calls, and is killed at one of them."""

    def __init__(self, function, last=None):
        self.calls = 0
        self._function, self._last = function, last

    def __call__(self, *arguments):
        self.calls += 1
        if self.calls == self._last:
            raise KeyboardInterrupt
        return self._function(*arguments)

    def __get__(self, instance, owner):
        return lambda *arguments: self(instance, *arguments)


def test_a_killed_calibration_goes_on(engines, request_of, monkeypatch, tmp_path):
    other = tmp_path / "undisturbed"
    shutil.copytree(engines, other)
    undisturbed = calibrated(other, request_of())
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pipeline, "_observe", killed)
        calibrated(engines, request_of())
    assert kept_in(engines) == {"identity", "adapters", "translators"}
    assert load_manifest(engines).exit is None  # what was there stays in force
    monkeypatch.setattr(fitting, "trace_prompts", fitted_again)
    monkeypatch.setattr(context, "fit_translators", fitted_again)
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
    monkeypatch.setattr(
        fitting, "trace_prompts", lambda *a, **k: traced.append(1) or trace(*a, **k)
    )
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


@pytest.mark.parametrize(("step", "last"), [("adapters", 3), ("translators", 2)])
def test_distilling_goes_on_with_the_next_layer(
    deep, distilling, undisturbed, tmp_path, monkeypatch, step, last
):
    """Killed while it distilled a layer: the ones before are not distilled again."""
    place = {"adapters": (distil, "_distil"), "translators": (distil_translators._Course, "train")}
    engines, (owner, name) = tmp_path / "engines", place[step]
    export(ExportRequest(str(deep), engines))
    function = getattr(owner, name)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(owner, name, Counted(function, last))
        calibrated(engines, distilling)
    layers = {"adapters": {"adapters-003", "adapters-004"}, "translators": {"translators-004"}}
    whole = {"adapters"} - {step}
    assert kept_in(engines) == {"identity"} | whole | layers[step]
    again = Counted(function)
    monkeypatch.setattr(owner, name, again)
    calibrated(engines, distilling)
    assert again.calls == 1
    assert contents(engines) == undisturbed


def test_an_export_keeps_what_its_calibration_had_fitted(
    deep, distilling, undisturbed, tmp_path, monkeypatch
):
    out = tmp_path / "out"
    asked = ExportRequest(str(deep), out, calibration=distilling, resume=True)
    for name, steps in (("fit_context", {"adapters"}), ("_observe", {"adapters", "translators"})):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(pipeline, name, killed)
            export(asked)
        (remains,) = tmp_path.glob(".out.partial-*")
        assert kept_in(remains) == {"identity"} | steps
    monkeypatch.setattr(fitting, "trace_prompts", fitted_again)
    monkeypatch.setattr(context, "fit_translators", fitted_again)
    export(asked)
    assert contents(out) == undisturbed
    assert not list(tmp_path.glob(".out.partial-*"))


def test_an_export_without_calibration_keeps_nothing_of_one(
    deep, tmp_path, request_of, monkeypatch
):
    plain, out = tmp_path / "plain", tmp_path / "out"
    export(ExportRequest(str(deep), plain))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pipeline, "fit_context", killed)
        export(ExportRequest(str(deep), out, calibration=request_of(), resume=True))
    (remains,) = tmp_path.glob(".out.partial-*")
    assert kept_in(remains) == {"identity", "adapters"}
    export(ExportRequest(str(deep), out, resume=True))
    assert contents(out) == contents(plain)


def test_files_of_a_killed_calibration_go_with_the_next(engines, request_of, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pipeline, "_observe", killed)
        calibrated(engines, request_of())
    named = {engines / name for name in (*load_manifest(engines).files, "manifest.json")}
    left = {path for path in engines.rglob("*") if path.is_file()} - named
    assert {path.parent.name for path in left} == {REST}  # an interrupt takes the rest away itself
    for name in ("stages/a.onnx", "adapters/a.onnx", "exit/a.onnx"):  # a kill does not
        save_hashed(engines, name, b"written")
    own = engines / "reports" / "notes.json"  # the user's: of no such name
    own.parent.mkdir(exist_ok=True)
    own.write_text("{}")
    before = {path for path in engines.rglob("*") if path.is_file()}
    monkeypatch.setattr(pipeline, "calibrate", killed)  # before it has done anything
    with pytest.raises(KeyboardInterrupt):
        calibrated(engines, request_of())
    removed = before - {path for path in engines.rglob("*") if path.is_file()}
    assert {path.parent.name for path in removed} == {"stages", "adapters", "exit"}
    assert own.is_file()
    assert kept_in(engines) == {"identity", "adapters", "translators"}
    verify_files(engines, load_manifest(engines), sha256=True)


def test_a_step_that_was_cut_short_is_made_again(tmp_path):
    kept = KeptSteps(tmp_path, {"a": 1})
    with pytest.raises(KeyboardInterrupt):
        kept.arrays("step", killed)
    assert not (tmp_path / REST).exists()
    made = {"x": np.arange(3)}
    assert kept.arrays("step", lambda: made) is made
    assert KeptSteps(tmp_path, {"a": 1}).arrays("step", killed)["x"].tolist() == [0, 1, 2]
    with pytest.raises(KeyboardInterrupt):
        KeptSteps(tmp_path, {"a": 2}).arrays("step", killed)


def test_a_damaged_step_is_made_again(tmp_path):
    KeptSteps(tmp_path, {}).arrays("step", lambda: {"x": np.arange(100)})
    (path,) = (tmp_path / REST).glob("step.*.npz")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    made = {"x": np.arange(2)}
    assert KeptSteps(tmp_path, {}).arrays("step", lambda: made) is made
    assert not path.exists()
    assert KeptSteps(tmp_path, {}).arrays("step", killed)["x"].tolist() == [0, 1]


def test_steps_with_a_damaged_identity_are_not_trusted(tmp_path):
    KeptSteps(tmp_path, {"a": 1}).arrays("step", lambda: {"x": np.arange(3)})
    (tmp_path / REST / "identity.json").write_bytes(b"\xff")  # no text at all
    KeptSteps(tmp_path, {"a": 1})
    assert not (tmp_path / REST).exists()


@pytest.mark.parametrize("up", [None, np.ones((2, 3), np.float32)])
def test_layers_are_kept_until_their_step_is(tmp_path, up):
    matrix = np.asfortranarray(np.arange(6, dtype=np.float32).reshape(3, 2))  # as solvers give it
    made = Distilled(AffineMap(matrix, np.zeros(3, np.float32), up), 0.25, 0.5)
    assert KeptSteps(tmp_path, {}).layers("step")(7, lambda: made) is made
    found = KeptSteps(tmp_path, {}).layers("step")(7, killed)
    assert str(found) == "0.250 → 0.500"
    assert found.affine.matrix.flags.f_contiguous  # products round by the order of their factors
    for mine, theirs in zip(found.affine.factors, made.affine.factors, strict=True):
        np.testing.assert_array_equal(mine, theirs)
    with pytest.raises(KeyboardInterrupt):
        KeptSteps(tmp_path, {}).layers("other")(7, killed)
    KeptSteps(tmp_path, {}).arrays("step", lambda: {"x": np.arange(1)})
    assert kept_in(tmp_path) == {"identity", "step"}
