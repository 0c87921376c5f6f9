"""The tool for machines with a GPU, with the CPU in the GPU's place."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import gpu_check as tool
import numpy as np
import pytest
from gpu_compare import compare, failures, run_modes
from gpu_needs import lacking

from adainfer_runtime import Engine
from adainfer_runtime.devices import GpuInfo
from adainfer_runtime.engine_folder import load_manifest, write_manifest

from .export.context_folder import examples, make_context_folder
from .runtime.device_engines import on_both
from .runtime.fake_device import FakeDriver, FakePlan
from .runtime.test_doctor import machine as doctored

PROMPTS = [example.prompt for example in examples(60, 66)]
ORIN = GpuInfo("Orin", 87, 8 << 30, "12.6")
COMPILER = {"torch": "2.13", "mobius-onnx": "0.1.0", "onnxruntime": "1.32"}
TENSORRT = {"onnx": "1.22", **COMPILER, "cuda-python": "12.6"}


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    """A context exit that takes every prompt."""
    made = make_context_folder(tiny("llama").folder, tmp_path_factory.mktemp("check") / "engines")
    manifest = load_manifest(made)
    always = manifest.context_exit.model_copy(update={"threshold": -1e9})
    write_manifest(made, manifest.model_copy(update={"context_exit": always}))
    return made


def rows(device, cpu):
    return {"precision": "fp16", **compare(device, cpu), "modes": run_modes(device, PROMPTS)}


def test_equal_engines_pass_with_every_mode(folder):
    engine = Engine.load(folder)
    row = rows(engine, Engine.load(folder))
    assert row["same_tokens"] == row["decode_same_tokens"] == 1.0
    for name in ("hidden_relative", "decode_hidden_relative", "cache_relative"):
        assert row[name] == 0.0
    assert failures(row | {"modes": {}}) == []
    context = row["modes"]["context"]
    assert context["left_early"] == len(PROMPTS)
    assert 0.0 < context["layers_saved"] < 1.0
    assert {"same_first_token", "same_text"} <= set(context)


def test_depths_come_from_the_manifest(tiny):
    """Four layers, and one engine that holds them all."""
    for settings in ({}, {"layers_per_engine": 4}):
        engine = tiny("llama", **settings).engine
        assert compare(engine, engine)["cache_relative"] == 0.0


def test_modes_without_exits_are_marked_and_pass(tiny):
    engine = tiny("llama").engine
    row = rows(engine, engine)
    assert "unavailable" in row["modes"]["context"]
    assert failures(row) == []


def test_what_leaves_the_tolerances_is_named():
    row = {
        "precision": "fp16",
        "same_tokens": 0.5,
        "hidden_relative": 0.5,
        "decode_hidden_relative": 0.25,
        "cache_relative": np.nan,
        "modes": {
            "verified": {"same_text": 0.5, "same_first_token": 1.0},
            "context": {"same_text": 0.0, "same_first_token": 0.9},
            "adaptive": {"unavailable": "none"},
        },
    }
    assert failures(row) == [
        "same_tokens 0.500 < 0.95",
        "hidden_relative 0.5 > 0.03",
        "decode_hidden_relative 0.25 > 0.03",
        "cache_relative nan > 0.03",
        "verified: same_text 0.50 < 0.7",
    ]
    assert failures(row | {"precision": "bf16"})[0] == "same_tokens 0.500 < 0.85"


def test_other_engines_fail(tiny):
    """Another model's weights behind the same shapes."""
    found = compare(tiny("llama-bias").engine, tiny("llama").engine)
    assert failures({"precision": "fp16", **found, "modes": {}})


def test_bf16_is_compared_with_the_graphs_in_fp16(tiny, tmp_path):
    made = tiny("llama")
    check = tool.Check(tmp_path, str(made.checkpoint), "tensorrt", "bf16", "tensorrt", 0, 87)
    assert check.reference().manifest.precision == "fp16"
    assert [path.name for path in tmp_path.iterdir()] == ["tensorrt-fp16"]


@pytest.fixture
def pair(folder_fp16):
    return on_both(folder_fp16, max_rows=128)  # no remainder of one row


@pytest.fixture(scope="module")
def folder_fp16(tiny):
    return tiny("llama", target="tensorrt", precision="fp16").folder


def test_the_simulated_device_passes(pair):
    assert failures({"precision": "fp16", **compare(pair.device, pair.cpu), "modes": {}}) == []


def wrong_profile(monkeypatch):
    """Layers of one row, as if their profile held a wrong kernel."""
    execute = FakePlan._execute

    def broken(plan, shapes, addresses):
        execute(plan, shapes, addresses)
        if "layer" in plan.path.name and shapes["hidden"][1] == 1:
            for name, value in plan._outputs.items():
                if name not in plan._alias:
                    plan._tensor(value, shapes["hidden"], addresses[name])[...] *= 1.5

    monkeypatch.setattr(FakePlan, "_execute", broken)


def stale_graph(monkeypatch):
    """A graph that does nothing: what it writes is of the run before."""
    monkeypatch.setattr(FakeDriver, "launch", lambda driver, recorded: None)


@pytest.mark.parametrize("broken", [wrong_profile, stale_graph])
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_what_is_wrong_in_decoding_alone_fails(pair, monkeypatch, broken, precision):
    """Prompts never run with one row, nor as a graph."""
    broken(monkeypatch)
    found = compare(pair.device, pair.cpu)
    assert found["hidden_relative"] <= 0.03
    lines = failures({"precision": precision, **found, "modes": {}})
    assert any(line.startswith("decode_hidden_relative") for line in lines)


def machine(monkeypatch, gpu, versions):
    """What the tool finds."""
    found = doctored(gpu, **versions)
    monkeypatch.setattr(tool, "diagnose", lambda: found)
    return found


@pytest.mark.parametrize(
    ("target", "precision", "backend", "missing"),
    [
        ("tensorrt-basic", "fp16", "tensorrt", ""),
        ("tensorrt-basic", "fp8", "tensorrt", "SM 89 or later for fp8, found 87"),
        ("tensorrt", "fp16", "tensorrt", "TensorRT 10.15 or later, found 10.3.0"),
        ("tensorrt", "fp16", "tensorrt-rtx", "adainfer-export[tensorrt-rtx]"),
        ("ort-cuda", "fp16", "tensorrt", "adainfer-export[cuda]"),
    ],
)
def test_what_a_target_lacks_is_what_doctor_says(target, precision, backend, missing):
    """An Orin with JetPack 6.2."""
    versions = {**TENSORRT, "tensorrt": "10.3.0"}
    found = doctored(ORIN, **versions)
    reasons = lacking(found, target, precision, backend)
    assert bool(reasons) == bool(missing)
    assert missing in "; ".join(reasons)


@pytest.mark.parametrize("versions", [{}, {"tensorrt": "10.3.0"}])
def test_every_row_needs_the_compiler_and_the_drivers_bindings(versions):
    found = doctored(ORIN, **versions)
    reasons = "; ".join(lacking(found, "tensorrt-basic", "fp16"))
    for extra in ("export", "cpu", "tensorrt"):
        assert f"adainfer-export[{extra}]" in reasons


class Scripted:
    """`run_check` that writes down what it is asked, and answers as told."""

    def __init__(self, outcomes=()):
        self.outcomes, self.checks = dict(outcomes), []

    def __call__(self, check):
        self.checks.append(check)
        outcome = self.outcomes.get((check.target, check.precision), True)
        if isinstance(outcome, BaseException):
            raise outcome
        return {"target": check.target, "precision": check.precision, "passed": outcome}

    @property
    def names(self):
        return [f"{check.target} {check.precision}" for check in self.checks]


def run(monkeypatch, tmp_path, scripted, *arguments):
    monkeypatch.setattr(tool, "run_check", scripted)
    paths = ["--work", str(tmp_path / "work"), "--out", str(tmp_path / "out.json")]
    status = tool.main([*paths, *arguments])
    return status, json.loads((tmp_path / "out.json").read_text())


@pytest.fixture
def orin(monkeypatch):
    return machine(monkeypatch, ORIN, {**TENSORRT, "tensorrt": "10.3.0"})


def test_what_cannot_run_is_skipped_before_any_work(orin, monkeypatch, tmp_path, capsys):
    scripted = Scripted()
    status, report = run(monkeypatch, tmp_path, scripted)
    assert status == 0
    assert scripted.names == ["tensorrt-basic fp16", "tensorrt-basic int4"]
    skipped = {(row["target"], row["skipped"]) for row in report["rows"] if "skipped" in row}
    assert ("tensorrt", "TensorRT 10.15 or later, found 10.3.0") in skipped
    assert "2 of 2 passed, 7 skipped; please send" in capsys.readouterr().out


def test_a_row_that_fails_is_the_exit_status(orin, monkeypatch, tmp_path, capsys):
    scripted = Scripted({("tensorrt-basic", "int4"): False})
    status, report = run(monkeypatch, tmp_path, scripted)
    assert status == 1
    assert [row["passed"] for row in report["rows"] if "passed" in row] == [True, False]
    assert "1 of 2 passed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("gpu", "versions", "arguments", "message"),
    [
        (None, TENSORRT, [], "no NVIDIA GPU was found: see `adainfer doctor`"),
        (ORIN, COMPILER, [], r"cannot be checked here.*ort-cuda \(pip.*tensorrt-basic \("),
        (ORIN, COMPILER, ["--list"], "cannot be checked here"),
        (
            ORIN,
            {**TENSORRT, "tensorrt": "10.3.0"},
            ["--targets", "tensorrt-basic,ort-cuda"],  # one of those that were asked for
            r"cannot be checked here, for something is missing: ort-cuda \(pip install '[^;]*'\)$",
        ),
    ],
)
def test_nothing_to_check_is_one_line(monkeypatch, tmp_path, gpu, versions, arguments, message):
    machine(monkeypatch, gpu, versions)
    with pytest.raises(SystemExit, match=message) as caught:
        run(monkeypatch, tmp_path, Scripted(), *arguments)
    assert "\n" not in str(caught.value)  # a text: Python prints it, and ends with status 1


def test_unknown_targets_are_refused(orin, monkeypatch, tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        run(monkeypatch, tmp_path, Scripted(), "--targets", "tensort")
    assert caught.value.code == 2
    assert "no target 'tensort' is checked; there are ort-cuda, tensorrt" in capsys.readouterr().err


def test_the_file_is_there_before_the_first_row(orin, monkeypatch, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(monkeypatch, tmp_path, Scripted({("tensorrt-basic", "fp16"): KeyboardInterrupt()}))
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["machine"]["gpu"]["name"] == "Orin"
    assert all("skipped" in row for row in report["rows"])


def test_an_interrupted_run_goes_on(orin, monkeypatch, tmp_path):
    engines = tmp_path / "work" / "tensorrt-basic-int4"
    failed = {("tensorrt-basic", "int4"): False}
    run(monkeypatch, tmp_path, Scripted(failed))
    engines.mkdir()
    again = Scripted()
    status, report = run(monkeypatch, tmp_path, again)
    assert (status, again.names) == (0, ["tensorrt-basic int4"])  # what passed is kept
    assert len(report["rows"]) == 9
    assert engines.is_dir()
    anew = Scripted()
    run(monkeypatch, tmp_path, anew, "--force")
    assert len(anew.names) == 2
    assert not engines.exists()


@pytest.mark.parametrize("other", ["gpu", "code", "option"])
def test_what_belongs_to_other_settings_is_not_kept(orin, monkeypatch, tmp_path, other):
    run(monkeypatch, tmp_path, Scripted())
    engines = tmp_path / "work" / "tensorrt-basic-int4"
    engines.mkdir()
    if other == "gpu":
        machine(monkeypatch, replace(ORIN, sm=110), {**TENSORRT, "tensorrt": "10.3.0"})
    if other == "code":
        monkeypatch.setattr(tool, "_digest_of_code", lambda: "0")
    arguments = ["--calibration-limit", "0"] if other == "option" else []
    again = Scripted()
    run(monkeypatch, tmp_path, again, *arguments)
    assert len(again.names) == 2
    assert not engines.exists()


def test_a_list_checks_nothing(orin, monkeypatch, capsys):
    monkeypatch.setattr(tool, "run_check", Scripted({("tensorrt-basic", "fp16"): AssertionError()}))
    assert tool.main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "tensorrt-basic int4: can be checked" in lines
    assert "tensorrt fp16: skipped: TensorRT 10.15 or later, found 10.3.0" in lines


@pytest.mark.parametrize(("backend", "sm"), [("tensorrt-rtx", (121,)), ("tensorrt", ())])
def test_plans_are_for_the_gpu_that_is_there(folder_fp16, monkeypatch, backend, sm):
    """TensorRT finds it by itself; TensorRT-RTX's default families lack A100, Turing and Spark."""
    asked = []

    def build_plans(folder, manifest, request, reporter):
        asked.append(request)
        raise KeyboardInterrupt

    monkeypatch.setattr(tool, "build_plans", build_plans)
    check = tool.Check(Path(), "", "tensorrt", "fp16", backend, 0, 121)
    monkeypatch.setattr(tool.Check, "folder", folder_fp16)
    with pytest.raises(KeyboardInterrupt):
        check.build()
    assert [(request.backend, request.sm) for request in asked] == [(backend, sm)]


def test_finished_folders_are_kept(tiny, tmp_path):
    made = tiny("llama")
    check = tool.Check(tmp_path, str(made.checkpoint), "tensorrt", "fp16", "tensorrt", 0, 87)
    check.export()
    before = (check.folder / "manifest.json").stat().st_mtime_ns
    check.export()
    assert (check.folder / "manifest.json").stat().st_mtime_ns == before
